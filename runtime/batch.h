// Decode steps over the sequences of a batch: checks of arguments, slots, and the state of a step.
// What a step does is up to the half of the backend (runtime/backend.h).
#ifndef VATTN_RUNTIME_BATCH_H_
#define VATTN_RUNTIME_BATCH_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/attend_request.h"
#include "runtime/backend.h"
#include "runtime/runtime.h"
#include "runtime/seat.h"

namespace vattn {

// Used by one thread at a time.
class Batch final : public Seat {
 public:
  Batch(std::shared_ptr<Runtime> runtime, int slots);
  ~Batch();
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  int slots() const { return static_cast<int>(slots_.size()); }
  Runtime& runtime() const { return *runtime_; }

  absl::Status Set(int slot, Sequence* sequence);
  absl::Status Clear(int slot);

  // stream: what the step's tables are enqueued on, null on the CPU.
  absl::Status BeginStep(int new_tokens, DeviceStream stream = nullptr);
  // Gives the open step up: its sequences are as they were before BeginStep. OK without an open
  // step.
  absl::Status Abandon();
  absl::Status Attend(const AttendRequest& request, DeviceStream stream = nullptr);
  // Goes on with the layer that Attend was last called for, with AttendRequest::partial.
  absl::Status AttendMore(const AttendRequest& request, DeviceStream stream = nullptr);
  absl::Status AttendSelected(const AttendRequest& request, const Selection& selection,
                              DeviceStream stream = nullptr);
  absl::Status Select(const AttendRequest& request, const Selection& selection,
                      DeviceStream stream = nullptr);

  bool open() const override { return open_; }
  absl::Status CheckWhole() const override;
  absl::Status EndStep() override;
  void Forget(Sequence* sequence) override;

 private:
  // As many query tokens as the backend can answer together.
  absl::Status CheckNewTokens(int new_tokens) const;
  // Every sequence has as many tokens in each layer, and room for `new_tokens` more by number.
  absl::Status CheckLengths(int new_tokens) const;
  absl::Status CheckRequest(const AttendRequest& request) const;
  // Checks scores, scores_stride and score_heads, for Attend and Select.
  absl::Status CheckScores(const AttendRequest& request) const;
  // Checks what a slice of a context takes.
  absl::Status CheckPartial(const AttendRequest& request) const;
  // INVALID_ARGUMENT if the records of all ranks, which the host can read, are not of this round.
  absl::Status CheckGathered(const AttendRequest& request) const;
  absl::Status CheckSelection(const AttendRequest& request, const Selection& selection) const;
  // The first layer that the open step with a new token has yet to attend; -1: none.
  int LayerToAttend() const;
  // Takes a sequence out of its slot. calls_follow: the open step goes on without it.
  void TakeOut(Sequence* sequence, bool calls_follow);
  // The half's call, after which the layer is done where the half sees every call.
  absl::Status Call(Task task, const AttendRequest& request, const Selection& selection,
                    DeviceStream stream);
  // The step's new tokens count in a layer from now on.
  void CountNewTokens(int layer);

  const std::shared_ptr<Runtime> runtime_;
  std::vector<Sequence*> slots_;
  std::unique_ptr<BatchHalf> half_;  // from the first step on
  int new_tokens_ = 0;               // of the last step
  bool open_ = false;                // a step is open
  std::vector<char> attended_;       // [layers] in this step
  int partial_layer_ = -1;           // that AttendMore may go on with
  int partial_ranks_ = 0;            // among so many, of which it is
  int partial_rank_ = 0;             // ... this one
  int partial_round_ = 0;            // calls of AttendMore since
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_BATCH_H_
