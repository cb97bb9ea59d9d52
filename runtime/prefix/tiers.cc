#include "runtime/prefix/tiers.h"

#include <utility>

#include "memory/status.h"
#include "runtime/files/disk.h"
#include "runtime/prefix/memory.h"

namespace vattn {

absl::Status CheckTier(const Runtime& runtime, PrefixTier tier) {
  if (tier != PrefixTier::kDisk || runtime.disk() != nullptr) return absl::OkStatus();
  return InvalidArgumentError("disk_path is not given, must be for prefixes of tier disk");
}

absl::Status SavePrefix(Sequence& sequence, Prefix prefix, PrefixTier tier) {
  Runtime& runtime = sequence.runtime();
  if (tier == PrefixTier::kAuto)
    tier = runtime.disk() != nullptr ? PrefixTier::kDisk : PrefixTier::kMemory;
  if (tier == PrefixTier::kDisk) return runtime.disk()->Store(sequence, std::move(prefix));
  if (runtime.memory_prefixes().Covers(prefix)) return absl::OkStatus();
  // Codes made afterwards would be written to copies of what is shared now.
  VATTN_RETURN_IF_ERROR(sequence.BuildIndex());
  OpenTenant tenant(runtime.store(), sequence.tenant());
  absl::StatusOr<SharedLayers> layers = sequence.Share(static_cast<int64_t>(prefix.tokens.size()));
  if (!layers.ok()) return layers.status();
  runtime.memory_prefixes().Save(std::move(prefix), *std::move(layers), std::move(tenant));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Sequence>> BeginFromPrefix(const std::shared_ptr<Runtime>& runtime,
                                                          const Prefix& prefix, PrefixTier tier,
                                                          const SequenceOptions& options,
                                                          int64_t* tokens) {
  Disk* const disk = tier == PrefixTier::kMemory ? nullptr : runtime->disk();
  MemoryPrefixes* const memory = tier == PrefixTier::kDisk ? nullptr : &runtime->memory_prefixes();
  const auto from_disk = [&] { return disk->Begin(runtime, prefix, options, tokens); };
  // What is in memory costs no reading, unless the disk has more of it.
  const int64_t in_memory = memory == nullptr ? 0 : memory->Begin(prefix, nullptr);
  const bool disk_first = disk != nullptr && disk->Pieces(prefix) > in_memory / kPrefixTokens;
  if (disk_first) {
    absl::StatusOr<std::unique_ptr<Sequence>> made = from_disk();
    if (CodeOf(made.status()) != Code::kNotFound) return made;
  }
  SharedLayers layers;
  const int64_t shared = in_memory > 0 ? memory->Begin(prefix, &layers) : 0;  // it may be gone
  if (shared > 0) {
    absl::StatusOr<std::unique_ptr<Sequence>> made =
        Sequence::FromLayers(runtime, options, std::move(layers));
    if (!made.ok()) return made;
    *tokens = shared;
    runtime->counters().prefix_tokens += static_cast<uint64_t>(shared);
    ++runtime->counters().prefix_hits;
    ++runtime->counters().memory_prefix_hits;
    return made;
  }
  if (disk != nullptr && !disk_first) {
    absl::StatusOr<std::unique_ptr<Sequence>> made = from_disk();
    if (CodeOf(made.status()) != Code::kNotFound) return made;
  }
  ++runtime->counters().prefix_misses;
  return NoSuchPrefixError(prefix);
}

absl::Status ForgetPrefixes(Runtime& runtime, const std::string& salt, int64_t* prefixes) {
  *prefixes = runtime.memory_prefixes().Forget(salt);
  if (runtime.disk() == nullptr) return absl::OkStatus();
  int64_t files = 0;
  const absl::Status status = runtime.disk()->Forget(salt, &files);
  *prefixes += files;
  return status;
}

}  // namespace vattn
