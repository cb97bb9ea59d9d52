// The CPU half of a sequence: codes are made at once, and a step that is given up gets the
// controller states back that it had.
#ifndef VATTN_RUNTIME_CPU_SEQUENCE_H_
#define VATTN_RUNTIME_CPU_SEQUENCE_H_

#include <vector>

#include "runtime/backend.h"

namespace vattn {

class CpuSequence final : public SequenceHalf {
 public:
  void BeginStep(const Sequence& sequence) override;
  void GiveUpStep(Sequence& sequence) override;
  void Code(Sequence& sequence, int layer, int64_t begin) override;
  absl::Status Settle(Sequence&) override { return absl::OkStatus(); }
  void RowsChanged() override {}
  absl::Status ReadBackState(Sequence&, bool) override { return absl::OkStatus(); }
  absl::Status ReadBackQueries(Sequence&) override { return absl::OkStatus(); }
  void Clear() override {}
  int64_t table_bytes() const override {
    return static_cast<int64_t>(states_before_step_.capacity() * sizeof(HeadState));
  }

 private:
  std::vector<HeadState> states_before_step_;  // of all layers' KV heads
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_CPU_SEQUENCE_H_
