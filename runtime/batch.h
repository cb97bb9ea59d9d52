// Decode steps over the sequences of a batch.
#ifndef VATTN_RUNTIME_BATCH_H_
#define VATTN_RUNTIME_BATCH_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/virtual_range.h"
#include "runtime/attend_request.h"
#include "runtime/cuda/batch.h"
#include "runtime/runtime.h"

namespace vattn {

class Sequence;

// Used by one thread at a time.
struct KvHead;

class Batch {
 public:
  Batch(std::shared_ptr<Runtime> runtime, int slots);
  ~Batch();
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  int slots() const { return static_cast<int>(slots_.size()); }
  Runtime& runtime() const { return *runtime_; }

  absl::Status Set(int slot, Sequence* sequence);
  absl::Status Clear(int slot);
  // Takes a sequence out that is about to die.
  void Forget(Sequence* sequence);

  // stream: what the step's tables are enqueued on, null on the CPU.
  absl::Status BeginStep(int new_tokens, DeviceStream stream = nullptr);
  // A sequence of the batch is about to change: ends the step. Refused as CheckWhole.
  absl::Status EndStep();
  // Refused while layers of a step with a new token wait for attention: whoever reads or changes a
  // sequence of the batch would find a token that some layers have and others do not.
  absl::Status CheckWhole() const;
  // Gives the open step up: its sequences are as they were before BeginStep. OK without an open
  // step.
  absl::Status Abandon();
  // Calls of a step may come.
  bool open() const { return open_; }
  absl::Status Attend(const AttendRequest& request, DeviceStream stream = nullptr);
  absl::Status AttendSelected(const AttendRequest& request, const Selection& selection,
                              DeviceStream stream = nullptr);
  absl::Status Select(const AttendRequest& request, const Selection& selection,
                      DeviceStream stream = nullptr);

 private:
  // Of calls that predict scores.
  absl::Status CheckScores(const AttendRequest& request) const;
  absl::Status CheckRequest(const AttendRequest& request) const;
  // The first layer that the open step with a new token has yet to attend; -1: none.
  int LayerToAttend() const;
  absl::Status CheckSelection(const AttendRequest& request, const Selection& selection) const;
  // On the CPU: all that the attention of an open step needs, which then allocates nothing.
  absl::Status TakeMemory();
  // Rows of a hot set for a middle of so many tokens.
  int64_t HotCapacity(int64_t middle) const;
  // Writes the new rows and fills groups_ for a layer.
  void PrepareGroups(const AttendRequest& request);
  // Hot sets, reports and counters after an attention.
  void Account(const AttendRequest& request);
  // Queries that the index of a KV head may be learnt from later.
  void KeepQueries(const Group& group, KvHead& kv_head);
  // Counts the new rows in and closes the layer for this step.
  void FinishLayer(int layer);

  const std::shared_ptr<Runtime> runtime_;
  std::vector<Sequence*> slots_;
  std::vector<const int32_t*> blocks_;  // [KV heads] of the sequence whose row is written
  std::vector<Group> groups_;           // filled slots x KV heads of the current layer
  std::vector<int> group_slot_;         // slot of each
  std::vector<int> group_head_;         // KV head of each
  std::vector<Verdict> verdicts_;       // [slots, q_heads]
  std::vector<float> errors_;
  VirtualRange scratch_;
  int new_tokens_ = 0;
  bool open_ = false;                // a step is open
  std::vector<char> attended_;       // [layers] in this step
  std::unique_ptr<CudaBatch> cuda_;  // on CUDA, from the first step on
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_BATCH_H_
