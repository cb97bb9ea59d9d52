// Stored and kept prefixes of the C API.
#include <string>
#include <utility>

#include "api/calls.h"
#include "api/sequence_params.h"
#include "runtime/prefix/tiers.h"

static_assert(static_cast<int>(vattn::PrefixTier::kDisk) == VATTN_TIER_DISK);

namespace {

using vattn::InvalidArgumentError;
using vattn::OutOfRangeError;
using vattn::api::CheckReserve;
using vattn::api::Give;
using vattn::api::Guard;
using vattn::api::InitStruct;
using vattn::api::NotNull;
using vattn::api::Usable;
using vattn::api::Use;

// What is found, where, and for whom.
struct PrefixRequest {
  vattn::Prefix prefix;
  vattn::PrefixTier tier;
  vattn::SequenceOptions sequence;
};

absl::Status ToPrefix(const vattn::Runtime& runtime, const vattn_prefix* prefix,
                      PrefixRequest& out) {
  vattn_prefix p{};
  VATTN_RETURN_IF_ERROR(vattn::api::Import("prefix", prefix, p));
  VATTN_RETURN_IF_ERROR(NotNull("salt", p.salt));
  if (p.salt_bytes < 1 || p.salt_bytes > 4096)
    return OutOfRangeError("salt_bytes", p.salt_bytes, 1, 4096);
  VATTN_RETURN_IF_ERROR(NotNull("tokens", p.tokens));
  if (p.num_tokens < 1 || p.num_tokens > int64_t{1} << 31) {
    return OutOfRangeError("num_tokens", p.num_tokens, 1, int64_t{1} << 31);
  }
  VATTN_RETURN_IF_ERROR(CheckReserve(p.reserve_tokens));
  if (p.tier < 0 || p.tier > VATTN_TIER_DISK)
    return OutOfRangeError("tier", p.tier, 0, int{VATTN_TIER_DISK});
  if (p.reserved0 != 0) return OutOfRangeError("reserved0", p.reserved0, 0, 0);
  out.tier = static_cast<vattn::PrefixTier>(p.tier);
  out.sequence = {.id = 0, .reserve_tokens = p.reserve_tokens, .tenant = p.tenant};
  out.prefix.salt.assign(static_cast<const char*>(p.salt), p.salt_bytes);
  out.prefix.tokens.assign(p.tokens, p.tokens + p.num_tokens);
  return vattn::CheckTier(runtime, out.tier);
}

}  // namespace

extern "C" {

void vattn_prefix_init(vattn_prefix* prefix, size_t struct_size) {
  InitStruct(prefix, struct_size, vattn_prefix{});
}

vattn_code vattn_prefix_save(const vattn_sequence* sequence, const vattn_prefix* prefix) {
  return Guard([&]() -> absl::Status {
    const Use use(sequence);
    VATTN_RETURN_IF_ERROR(use.status());
    const vattn::Runtime& runtime = sequence->impl->runtime();
    PrefixRequest request;
    VATTN_RETURN_IF_ERROR(ToPrefix(runtime, prefix, request));
    const int64_t tokens = static_cast<int64_t>(request.prefix.tokens.size());
    for (int32_t l = 0; l < runtime.options().num_layers; ++l) {
      const int64_t most = sequence->impl->length(l);
      if (runtime.kv_heads(l) == 0 || tokens <= most) continue;
      return InvalidArgumentError("num_tokens is ", tokens, ", must be at most ", most,
                                  ", those of layer ", l);
    }
    VATTN_RETURN_IF_ERROR(use.Awake());
    return vattn::SavePrefix(*sequence->impl, std::move(request.prefix), request.tier);
  });
}

vattn_code vattn_prefix_restore(vattn_runtime* runtime, const vattn_prefix* prefix, uint64_t id,
                                int64_t* tokens, vattn_sequence** out) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(NotNull("out", out));
    *out = nullptr;
    VATTN_RETURN_IF_ERROR(NotNull("tokens", tokens));
    *tokens = 0;
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    PrefixRequest request;
    VATTN_RETURN_IF_ERROR(ToPrefix(*runtime->impl, prefix, request));
    request.sequence.id = id;
    return Give(vattn::BeginFromPrefix(runtime->impl, request.prefix, request.tier,
                                       request.sequence, tokens),
                out);
  });
}

vattn_code vattn_prefix_forget(vattn_runtime* runtime, const void* salt, uint64_t salt_bytes,
                               int64_t* prefixes) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    VATTN_RETURN_IF_ERROR(NotNull("salt", salt));
    if (salt_bytes < 1 || salt_bytes > 4096)
      return OutOfRangeError("salt_bytes", salt_bytes, 1, 4096);
    int64_t removed = 0;
    const absl::Status status = vattn::ForgetPrefixes(
        *runtime->impl, std::string(static_cast<const char*>(salt), salt_bytes), &removed);
    if (prefixes != nullptr) *prefixes = removed;
    return status;
  });
}

}  // extern "C"
