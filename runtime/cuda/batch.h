// The device half of a batch: the tables of a step, working memory, the hot set, and the calls.
#ifndef VATTN_RUNTIME_CUDA_BATCH_H_
#define VATTN_RUNTIME_CUDA_BATCH_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/launch.h"
#include "runtime/backend.h"
#include "runtime/cuda/backend.h"

namespace vattn {

// Used as the batch: by one thread at a time. Addresses of tables do not change once they are made,
// so that captured attention calls can be replayed in every later step.
class CudaBatch final : public BatchHalf {
 public:
  static absl::StatusOr<std::unique_ptr<CudaBatch>> Create(Runtime& runtime, int slots);
  ~CudaBatch() override;

  // A replayed graph attends without a call.
  bool sees_every_call() const override { return false; }
  // Enqueues the tables of a step. stream null: the device's own, also for the calls of the step
  // that come without one.
  absl::Status BeginStep(const std::vector<Sequence*>& slots, DeviceStream stream) override;
  // Enqueues one call. With q in plain host memory all arrays are taken to be there: the call then
  // blocks until they are filled. It also blocks without a stream.
  absl::Status Call(Task task, const AttendRequest& request, const Selection& selection,
                    DeviceStream stream) override;
  // Waits for the device first.
  void Leave(const Sequence& sequence) override;
  // Waits for the device; calls that still come, replayed ones too, find nothing to do.
  absl::Status LeaveAll() override;

 private:
  struct Filled {
    Sequence* sequence;
    int slot;
  };

  CudaBatch(Runtime& runtime, int slots);
  absl::Status Allocate();
  // Gives blocks that are new to the batch a place in slot_of_, and forgets rows of those with new
  // content.
  absl::Status UpdateHotSet(DeviceStream stream);
  // Where most of slot_of_ is about free blocks: empties the hot set, whose slots may still be
  // theirs, and gives that memory back. Waits for the device.
  absl::Status ShrinkHotSet(DeviceStream stream);
  absl::Status EmptySlots(DeviceStream stream);
  absl::Status GrowScratch();
  // Query heads per KV head of a layer, of all query tokens of the step.
  int heads_in_step(int layer) const;
  const cuda::AnswerShape& shape(int layer) const;
  // The tables of a step into pinned_[turn_]. `steps` are to be added to the sequences' step
  // numbers: 1 until the open step counts in them.
  void FillTables(int steps);
  void FillGroups(int layer, int steps, cuda::StepHeader& header, cuda::DeviceGroup* groups) const;
  // Waits for the device and sends the tables of the open step anew, for the sequences that are
  // left.
  absl::Status SendOpenTables();
  // The call with arrays in plain host memory: they travel through staging_.
  absl::Status CallFromHost(Task task, const AttendRequest& request, const Selection& selection,
                            DeviceStream stream);
  // FULL if a selection that the host can read has come out larger than its arrays.
  absl::Status CheckCounts(int layer, const Selection& selection) const;
  absl::Status Launch(Task task, const AttendRequest& request, const Selection& selection,
                      DeviceStream stream);

  Runtime& runtime_;
  CudaBackend& backend_;
  const uint64_t id_;  // of no other batch, before or after
  const int slots_;
  std::vector<Filled> filled_;
  std::vector<int64_t> first_group_;  // [layers] place of a layer's groups in the table
  int64_t most_groups_ = 0;           // of all layers
  // [layers] of one query token, and of so many that a thread block takes its most heads at a time.
  std::vector<cuda::AnswerShape> answer_, answer_wide_;
  int query_tokens_ = 1;    // of the step
  bool looked_on_ = false;  // since the last forecast
  DeviceMemory tables_;     // StepHeader [layers], then DeviceGroup [most_groups]
  DeviceMemory scratch_;
  DeviceMemory forget_;  // block ids
  DeviceMemory staging_;
  DeviceMemory hot_rows_, hot_tables_;
  std::unique_ptr<DeviceRange> slot_of_;
  uint64_t reclaims_ = 0;         // of the backend, when ShrinkHotSet last looked
  DeviceRange::Stretches unset_;  // of slot_of_, which say nothing yet
  cuda::HotSetRef hot_;
  std::vector<uint32_t> seen_;  // [blocks of the pool] generation that the hot set knows
  // Pinned copies of the tables, used in turn, each free again when its event has passed.
  static constexpr int kTurns = 4;
  DeviceMemory pinned_[kTurns];
  DeviceEvent passed_[kTurns];
  int turn_ = 0;
  DeviceStream stream_ = nullptr;  // of the last step; another one waits for the device first
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_CUDA_BATCH_H_
