#include "runtime/cuda/sequence_half.h"

#include <utility>

#include "memory/status.h"
#include "runtime/sequence.h"

namespace vattn {

CudaSequenceHalf& CudaSequenceHalf::Of(Sequence& sequence) {
  return static_cast<CudaSequenceHalf&>(sequence.half());
}

absl::Status CudaSequenceHalf::Make(Sequence& sequence) {
  if (on_device_) return absl::OkStatus();
  absl::StatusOr<std::unique_ptr<CudaSequence>> made = CudaSequence::Create(backend_, sequence);
  if (!made.ok()) return made.status();
  on_device_ = *std::move(made);
  for (int l = 0; l < sequence.runtime().options().num_layers; ++l) {
    for (KvHead& kv_head : sequence.layer(l).kv_heads) kv_head.blocks.MarkUnsent();
  }
  return absl::OkStatus();
}

absl::Status CudaSequenceHalf::Settle(Sequence& sequence) {
  VATTN_RETURN_IF_ERROR(Make(sequence));
  Device& device = backend_.device();
  VATTN_RETURN_IF_ERROR(on_device_->SendChanges(sequence, device.stream()));
  return device.Synchronize(device.stream());
}

void CudaSequenceHalf::RowsChanged() {
  if (on_device_) on_device_->ForgetFixed();
}

absl::Status CudaSequenceHalf::ReadBackState(Sequence& sequence, bool in_step) {
  return on_device_ ? on_device_->ReadBackState(sequence, in_step) : absl::OkStatus();
}

absl::Status CudaSequenceHalf::ReadBackQueries(Sequence& sequence) {
  return on_device_ ? on_device_->ReadBackQueries(sequence) : absl::OkStatus();
}

}  // namespace vattn
