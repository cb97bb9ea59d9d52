#include "runtime/cpu/backend.h"

#include "kernels/cpu/merge.h"
#include "kernels/cpu/prefill.h"
#include "kernels/cpu/write.h"
#include "runtime/cpu/batch.h"
#include "runtime/cpu/paged.h"
#include "runtime/cpu/sequence.h"

namespace vattn {

std::unique_ptr<SequenceHalf> CpuBackend::MakeSequence(const Runtime&) {
  return std::make_unique<CpuSequence>();
}

absl::StatusOr<std::unique_ptr<BatchHalf>> CpuBackend::MakeBatch(Runtime& runtime, int slots) {
  return std::make_unique<CpuBatch>(runtime, slots);
}

absl::StatusOr<std::unique_ptr<PagedHalf>> CpuBackend::MakePaged(Runtime& runtime,
                                                                 const PagedPool& pool) {
  return CpuPaged::Create(runtime, pool);
}

absl::Status CpuBackend::Prefill(const PrefillParams& params, cpu::Workers* workers) {
  cpu::Prefill(params, workers);
  return absl::OkStatus();
}

absl::Status CpuBackend::OnHost(const void* base, const std::vector<int64_t>& offsets, int64_t,
                                std::vector<const std::byte*>& parts, std::vector<std::byte>&) {
  parts.clear();
  for (const int64_t offset : offsets)
    parts.push_back(static_cast<const std::byte*>(base) + offset);
  return absl::OkStatus();
}

absl::Status CpuBackend::Write(const WriteParams& params, cpu::Workers* workers) {
  cpu::Write(params, workers);
  return absl::OkStatus();
}

absl::Status CpuBackend::Merge(const MergeParams& params, DeviceStream) {
  cpu::Merge(params);
  return absl::OkStatus();
}

}  // namespace vattn
