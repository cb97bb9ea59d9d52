// Stored prefixes, wherever they are: blocks of the host pool, or files of the runtime's directory.
#ifndef VATTN_RUNTIME_PREFIX_TIERS_H_
#define VATTN_RUNTIME_PREFIX_TIERS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "runtime/prefix/prefix.h"
#include "runtime/sequence.h"

namespace vattn {

// vattn_tier.
enum class PrefixTier : int32_t { kAuto = 0, kMemory = 1, kDisk = 2 };

// INVALID_ARGUMENT if the tier asks for a directory that the runtime does not have.
absl::Status CheckTier(const Runtime& runtime, PrefixTier tier);

// Each as its call in vattn.h; tiers have been checked. prefix has no more tokens than each layer.
absl::Status SavePrefix(Sequence& sequence, Prefix prefix, PrefixTier tier);
absl::StatusOr<std::unique_ptr<Sequence>> BeginFromPrefix(const std::shared_ptr<Runtime>& runtime,
                                                          const Prefix& prefix, PrefixTier tier,
                                                          const SequenceOptions& options,
                                                          int64_t* tokens);
absl::Status ForgetPrefixes(Runtime& runtime, const std::string& salt, int64_t* prefixes);

}  // namespace vattn

#endif  // VATTN_RUNTIME_PREFIX_TIERS_H_
