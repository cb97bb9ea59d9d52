// Shared by the sources of the C API: handle structs, checks of arguments, and Guard, which turns a
// Status or an exception into a vattn_code.
#ifndef VATTN_API_CALLS_H_
#define VATTN_API_CALLS_H_

#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "api/structs.h"
#include "api/vattn.h"
#include "runtime/batch.h"
#include "runtime/log.h"
#include "runtime/paged.h"
#include "runtime/runtime.h"
#include "runtime/sequence.h"
#include "runtime/status.h"

struct vattn_runtime {
  std::shared_ptr<vattn::Runtime> impl;
  vattn_log_function log;
  void* log_user;
};
struct vattn_sequence {
  std::unique_ptr<vattn::Sequence> impl;
  const vattn::Runtime& runtime() const { return impl->runtime(); }
};
struct vattn_batch {
  std::unique_ptr<vattn::Batch> impl;
  const vattn::Runtime& runtime() const { return impl->runtime(); }
};
struct vattn_paged {
  std::unique_ptr<vattn::Paged> impl;
  const vattn::Runtime& runtime() const { return impl->runtime(); }
};

namespace vattn::api {

inline constexpr int64_t kMostPrefill = 65536;  // tokens of a call

// Keeps the text for vattn_last_error and returns the code.
vattn_code Fail(vattn_code code, const char* text) noexcept;

// Runs a body that returns absl::Status and translates whatever comes out of it. Lines for the
// logger are given out when the body has let go of its locks, and before the text is noted: the
// logger may make calls that fail.
template <class F>
vattn_code Guard(F&& body) noexcept {
  try {
    absl::Status status;
    {
      const LogHold hold;
      status = body();
    }
    if (status.ok()) return VATTN_OK;
    return Fail(static_cast<vattn_code>(CodeOf(status)), std::string(status.message()).c_str());
  } catch (const std::bad_alloc&) {
    return Fail(VATTN_OUT_OF_MEMORY, "the system refused memory");
  } catch (const std::exception& error) {
    return Fail(VATTN_INTERNAL, error.what());
  } catch (...) {
    return Fail(VATTN_INTERNAL, "unknown exception");
  }
}

absl::Status NotNull(const char* name, const void* pointer);
absl::Status UsableHere(const Runtime& runtime);
// Also refused in a child process that was forked from the one that made a CUDA runtime: no call to
// CUDA works there.
absl::Status Usable(const vattn_runtime* runtime);
absl::Status Usable(const vattn_batch* batch);
absl::Status Usable(const vattn_paged* paged);
// Destroys a handle, unless its runtime's CUDA half is another process's: then its memory is left
// to the process's end.
template <class Handle>
void Destroy(Handle* handle) noexcept {
  if (handle == nullptr || !UsableHere(handle->runtime()).ok()) return;
  const LogHold hold;
  delete handle;
}

absl::Status CheckStructSize(size_t size);
absl::Status CheckStream(const Runtime& runtime, const CUstream_st* stream);
absl::Status ToAttend(const vattn_attend_params* params, bool needs_out, AttendRequest& out);

// A sequence for the length of a call, during which it is not spilled.
class Use {
 public:
  explicit Use(const vattn_sequence* sequence);
  const absl::Status& status() const { return status_; }
  // OK if the sequence may be used and is awake now.
  absl::Status Awake() const { return status_.ok() ? impl_->Wake() : status_; }

 private:
  absl::Status status_;
  Sequence* impl_ = nullptr;
  std::unique_lock<std::mutex> lock_;
};

// As much of a text as the buffer takes, and how much there is.
absl::Status GiveText(const std::string& text, char* buffer, size_t size, size_t* needed);

template <class T>
void InitStruct(T* value, size_t size, const T& defaults) {
  if (value != nullptr) Export(defaults, value, size);
}

}  // namespace vattn::api

#endif  // VATTN_API_CALLS_H_
