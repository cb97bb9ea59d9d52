// The CPU half of a pool of the caller's own.
#ifndef VATTN_RUNTIME_CPU_PAGED_H_
#define VATTN_RUNTIME_CPU_PAGED_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/params.h"
#include "memory/virtual_range.h"
#include "runtime/backend.h"

namespace vattn {

class CpuPaged final : public PagedHalf {
 public:
  static absl::StatusOr<std::unique_ptr<CpuPaged>> Create(Runtime& runtime, const PagedPool& pool);

  absl::Status Write(const PagedRows& rows, DeviceStream stream) override;
  absl::Status BeginStep(const PagedStep& step, DeviceStream stream) override;
  absl::Status Attend(const AttendRequest& request, DeviceStream stream) override;
  absl::Status Prefill(int layer, const PrefillParams& params) override;

 private:
  // A request of the open step.
  struct Request {
    int number;  // in the arrays of the step
    int row;
    int32_t length, first_query, num_queries;
  };
  // What a row knows of the request that it has.
  struct Row {
    uint64_t requests_before = 0, step = 0;
  };

  CpuPaged(Runtime& runtime, const PagedPool& pool) : runtime_(runtime), pool_(pool) {}
  absl::Status Allocate();
  absl::Status CheckStep(const PagedStep& step) const;
  absl::Status CheckRequest(const PagedStep& step, int number) const;
  absl::Status GrowScratch();
  uint64_t GroupBytes(const Request& request, int layer) const;
  std::vector<HeadState>& StatesOf(int layer, int row) {
    return states_[static_cast<size_t>(layer) * pool_.options.max_requests + row];
  }
  Group MakeGroup(const AttendRequest& request, const Request& of, int kv_head, std::byte* memory,
                  HeadState* states);
  // Reports and counters of answered groups.
  void Account(const AttendRequest& request);

  Runtime& runtime_;
  const PagedPool& pool_;
  std::vector<Storage> layers_;                   // with codes
  std::vector<VirtualRange> codes_;               // [layers], those that are ours
  std::vector<std::vector<IndexTables>> tables_;  // [layers][KV heads]
  std::vector<std::vector<HeadState>> states_;    // [layers][rows], [q_heads] each
  std::vector<Row> rows_;
  PagedStep step_;
  std::vector<Request> requests_;
  std::vector<Group> groups_;      // of a call: requests x KV heads
  std::vector<HeadState> work_;    // states of several query tokens
  std::vector<Verdict> verdicts_;  // [query tokens, q_heads] in place of arrays that the caller ...
  std::vector<float> errors_;      // ... does not want
  std::vector<const void*> scores_;
  VirtualRange scratch_;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_CPU_PAGED_H_
