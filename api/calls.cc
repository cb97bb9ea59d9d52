#include "api/calls.h"

#include <algorithm>

namespace vattn::api {
namespace {

thread_local std::string last_error_text;
thread_local const char* last_error = "";  // into last_error_text, or a text that needs no memory

}  // namespace

vattn_code Fail(vattn_code code, const char* text) noexcept {
  try {
    last_error_text = text;
    last_error = last_error_text.c_str();
  } catch (const std::bad_alloc&) {
    last_error = "the system refused memory, also for the text of this error";
  }
  return code;
}

absl::Status NotNull(const char* name, const void* pointer) {
  return pointer != nullptr ? absl::OkStatus()
                            : InvalidArgumentError(name, " is NULL, must be given");
}

absl::Status UsableHere(const Runtime& runtime) {
  if (runtime.cuda() == nullptr || runtime.home().IsHere()) return absl::OkStatus();
  return InvalidArgumentError(
      "the runtime was made by process ", runtime.home().id(),
      " and uses CUDA, which does not follow into a process that is forked from it, must be used "
      "by that one alone; make a runtime after the fork");
}

absl::Status Usable(const vattn_runtime* runtime) {
  VATTN_RETURN_IF_ERROR(NotNull("runtime", runtime));
  return UsableHere(*runtime->impl);
}

absl::Status Usable(const vattn_batch* batch) {
  VATTN_RETURN_IF_ERROR(NotNull("batch", batch));
  if (batch->impl->runtime().closed())
    return InvalidArgumentError("batch outlived its runtime, may only be destroyed");
  return UsableHere(batch->runtime());
}

absl::Status Usable(const vattn_paged* paged) {
  VATTN_RETURN_IF_ERROR(NotNull("paged", paged));
  if (paged->runtime().closed())
    return InvalidArgumentError("paged outlived its runtime, may only be destroyed");
  return UsableHere(paged->runtime());
}

absl::Status CheckStructSize(size_t size) {
  if (size >= sizeof(size_t) && size <= 4096) return absl::OkStatus();
  return OutOfRangeError("struct_size", size, sizeof(size_t), 4096);
}

Use::Use(const vattn_sequence* sequence) {
  status_ = NotNull("sequence", sequence);
  if (!status_.ok()) return;
  impl_ = sequence->impl.get();
  if (impl_->runtime().closed()) {
    status_ = InvalidArgumentError("sequence outlived its runtime, may only be destroyed");
    return;
  }
  status_ = UsableHere(impl_->runtime());
  if (!status_.ok()) return;
  lock_ = std::unique_lock<std::mutex>(impl_->use());
  impl_->Touch();
}

absl::Status GiveText(const std::string& text, char* buffer, size_t size, size_t* needed) {
  VATTN_RETURN_IF_ERROR(NotNull("needed", needed));
  if (buffer == nullptr && size > 0)
    return InvalidArgumentError("buffer is NULL with size ", size, ", must be given");
  *needed = text.size();
  if (size > 0) {
    const size_t count = std::min(size - 1, text.size());
    std::copy_n(text.data(), count, buffer);
    buffer[count] = '\0';
  }
  return absl::OkStatus();
}

}  // namespace vattn::api

extern "C" {

const char* vattn_last_error(void) { return vattn::api::last_error; }
const char* vattn_code_name(int32_t code) {
  return vattn::CodeName(static_cast<vattn::Code>(code));
}
const char* vattn_version(void) { return VATTN_VERSION_TEXT; }
const char* vattn_build_info(void) { return VATTN_BUILD_TEXT; }

}  // extern "C"
