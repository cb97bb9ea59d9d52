// The CPU half of a batch: working memory, new rows, the operations of a layer, and what they
// leave to be reported and counted.
#ifndef VATTN_RUNTIME_CPU_BATCH_H_
#define VATTN_RUNTIME_CPU_BATCH_H_

#include <vector>

#include "kernels/merge.h"
#include "kernels/params.h"
#include "memory/virtual_range.h"
#include "runtime/backend.h"

namespace vattn {

struct KvHead;

class CpuBatch final : public BatchHalf {
 public:
  CpuBatch(Runtime& runtime, int slots);

  bool sees_every_call() const override { return true; }
  absl::Status BeginStep(const std::vector<Sequence*>& slots, DeviceStream stream) override;
  absl::Status Call(Task task, const AttendRequest& request, const Selection& selection,
                    DeviceStream stream) override;
  void Leave(const Sequence& sequence) override;
  absl::Status LeaveAll() override { return absl::OkStatus(); }

 private:
  // Whose each of groups_ is.
  struct Owner {
    Sequence* sequence;
    KvHead* kv_head;
    int64_t place;  // slot * kv_heads + KV head: of its rows in arrays by KV head
  };

  // Working memory of one KV head.
  uint64_t GroupBytes(const Sequence& sequence, int layer) const;
  // How many rows the hot set of a KV head may hold that has `middle` tokens in the middle.
  int64_t HotCapacity(int64_t middle) const;
  // The new tokens' rows into the blocks of a layer.
  void WriteRows(const AttendRequest& request);
  // Fills groups_ and owners_ for a layer: what the operations read, and where they write to.
  void PrepareGroups(const AttendRequest& request);
  Group MakeGroup(const AttendRequest& request, int slot, int kv_head, std::byte* memory);

  // The controller of the last query token goes on to the next step.
  void CarryStates();

  void Decode(const AttendRequest& request);
  // The first part of a step with slices of a context, and what goes on from it.
  void Forecast();
  void LookOn(const AttendRequest& request);
  // Where the answers of a call go.
  void PointTo(const AttendRequest& request, int64_t head, Group& group);
  void AttendSelected(const Selection& selection);
  // FULL, and the states are as before, if `selection` is too small.
  absl::Status Select(const AttendRequest& request, const Selection& selection);
  // Sinks, draw and window of one KV head.
  void WriteSelection(const Group& group, int64_t place, const Selection& selection) const;

  // Hot sets, the arrays by KV head that a caller wants, and counters, after an attention.
  void Account(const AttendRequest& request);
  // The queries of a step from which the index of a KV head may be learnt later.
  void KeepQueries(const Group& group, KvHead& kv_head) const;

  Runtime& runtime_;
  std::vector<Sequence*> slots_;        // of the step
  std::vector<const int32_t*> blocks_;  // [KV heads] of the sequence whose rows are written
  std::vector<Group> groups_;           // of the call: filled slots x KV heads
  std::vector<Owner> owners_;           // beside groups_
  std::vector<RankStep> slices_;        // beside groups_, with slices of a context
  int query_tokens_ = 1;                // of every sequence in the step
  // [slots, query tokens, q_heads] in place of arrays that the caller does not want
  std::vector<Verdict> verdicts_;
  std::vector<float> errors_;
  // [slots, KV heads, query tokens, query heads of one]
  std::vector<HeadState> states_;        // with several query tokens
  std::vector<const void*> score_rows_;  // with IndexKind::kExternal
  VirtualRange scratch_;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_CPU_BATCH_H_
