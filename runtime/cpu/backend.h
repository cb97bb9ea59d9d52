// The CPU backend: rows, codes and answers are where the host pool is, and every call has done its
// work when it returns.
#ifndef VATTN_RUNTIME_CPU_BACKEND_H_
#define VATTN_RUNTIME_CPU_BACKEND_H_

#include <memory>
#include <vector>

#include "runtime/backend.h"

namespace vattn {

class CpuBackend final : public Backend {
 public:
  int max_group_heads() const override { return kMaxGroup; }
  std::unique_ptr<SequenceHalf> MakeSequence(const Runtime& runtime) override;
  absl::StatusOr<std::unique_ptr<BatchHalf>> MakeBatch(Runtime& runtime, int slots) override;

  absl::StatusOr<std::unique_ptr<PagedHalf>> MakePaged(Runtime& runtime,
                                                       const PagedPool& pool) override;

  absl::Status CheckPrefill() const override { return absl::OkStatus(); }
  absl::Status Prefill(const PrefillParams& params, cpu::Workers* workers) override;
  bool IsOnDevice(const void*) const override { return false; }
  absl::Status Write(const WriteParams& params, cpu::Workers* workers) override;
  absl::Status OnHost(const void* base, const std::vector<int64_t>& offsets, int64_t,
                      std::vector<const std::byte*>& parts, std::vector<std::byte>&) override;

  absl::Status Merge(const MergeParams& params, DeviceStream stream) override;

  bool copies_codes() const override { return false; }
  absl::Status HoldCodes(const BlockId*, int64_t) override { return absl::OkStatus(); }
  void CountReleased(int64_t) override {}
  void BumpGeneration(int32_t) override {}
  void AddTo(StatsSnapshot&) override {}
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_CPU_BACKEND_H_
