// The CUDA half of a sequence: what is on the device is made at the first use and goes when the
// sequence goes to sleep.
#ifndef VATTN_RUNTIME_CUDA_SEQUENCE_HALF_H_
#define VATTN_RUNTIME_CUDA_SEQUENCE_HALF_H_

#include <memory>

#include "runtime/backend.h"
#include "runtime/cuda/sequence.h"

namespace vattn {

class CudaSequenceHalf final : public SequenceHalf {
 public:
  explicit CudaSequenceHalf(CudaBackend& backend) : backend_(backend) {}

  // Of a sequence of a CUDA runtime.
  static CudaSequenceHalf& Of(Sequence& sequence);
  // Makes what is on the device. OUT_OF_MEMORY.
  absl::Status Make(Sequence& sequence);
  // REQUIRES Make.
  CudaSequence& on_device() const { return *on_device_; }

  // A step's controller states are on the device, which does not keep those from before.
  void BeginStep(const Sequence&) override {}
  void GiveUpStep(Sequence&) override {}
  // SendChanges codes up to layer.coded.
  void Code(Sequence&, int, int64_t) override {}
  absl::Status Settle(Sequence& sequence) override;
  void RowsChanged() override;
  absl::Status ReadBackState(Sequence& sequence, bool in_step) override;
  absl::Status ReadBackQueries(Sequence& sequence) override;
  void Clear() override { on_device_.reset(); }
  int64_t table_bytes() const override { return 0; }

 private:
  CudaBackend& backend_;
  std::unique_ptr<CudaSequence> on_device_;  // null until the first use
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_CUDA_SEQUENCE_HALF_H_
