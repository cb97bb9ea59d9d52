// What is on the device of a sequence: block tables, index tables, controller state, sinks and
// window.
#ifndef VATTN_RUNTIME_CUDA_SEQUENCE_H_
#define VATTN_RUNTIME_CUDA_SEQUENCE_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/launch.h"
#include "runtime/cuda/backend.h"

namespace vattn {

class Sequence;

// Used as the sequence: by one thread at a time.
class CudaSequence {
 public:
  static absl::StatusOr<std::unique_ptr<CudaSequence>> Create(CudaBackend& backend,
                                                              const Sequence& sequence);

  // Enqueues what changed on the host since the last call: block tables, copies of codes, codes of
  // tokens [layer.codes_made, layer.coded), and after host-side writes sinks and window. Waits
  // for the device first if steps were enqueued on another stream.
  absl::Status SendChanges(Sequence& sequence, DeviceStream stream);

  // Rows of the window were written by the host: the device's are to be loaded anew.
  void ForgetFixed() { fixed_loaded_ = false; }

  // Waits for the device if it may still work on the sequence, and brings the controller state to
  // the host. Before the host reads or changes anything. in_step: calls of an open step, which may
  // come from a replayed graph, can still follow.
  absl::Status ReadBackState(Sequence& sequence, bool in_step);

  // Brings the queries that steps up to the last ReadBackState have kept to KvHead::recent.
  absl::Status ReadBackQueries(Sequence& sequence);

  const int32_t* blocks(int layer, int head) const;
  HeadState* state(int layer, int head) const;
  std::byte* fixed(int layer, int head) const;
  const IndexSegment* segments(int layer, int head) const;
  // Where the queries [G][dim_k] of a step are kept, in the row dtype; null: they are not.
  std::byte* recent(int layer, int head, uint64_t step) const;

 private:
  explicit CudaSequence(CudaBackend& backend) : backend_(backend) {}
  absl::Status SendTables(Sequence& sequence, DeviceStream stream);
  // Codes that the host wrote, of blocks that the sequence still has.
  absl::Status LoadCodes(Sequence& sequence, DeviceStream stream);
  absl::Status SendIndices(Sequence& sequence, DeviceStream stream);
  int64_t query_bytes() const;  // of one head
  // Copies items to the device, for kernels on the same stream.
  template <class T>
  absl::StatusOr<const T*> Send(const std::vector<T>& items, DeviceStream stream);

  CudaBackend& backend_;
  std::vector<int> first_;              // [layers] groups of the layers before
  std::vector<int64_t> states_before_;  // [layers] controller states of the layers before
  std::vector<int> group_heads_;        // [layers]
  int groups_ = 0;
  int64_t table_blocks_ = 0;         // room of each group's block table
  DeviceMemory tables_;              // int32_t [groups][table_blocks]
  DeviceMemory states_;              // HeadState
  DeviceMemory fixed_;               // [groups][sinks + ring][row_bytes]
  DeviceMemory segments_;            // IndexSegment [groups][kMaxSegments]
  std::vector<bool> segments_sent_;  // [groups] at least once
  // By query head of all layers: [KV heads][kRecentQueries][G][dim_k]; kBalanced only
  DeviceMemory recent_;
  // Last steps that ReadBackState waited for, and whose queries the host has
  uint64_t passed_step_ = 0, read_step_ = 0;
  DeviceMemory items_;  // of the last Send
  bool fixed_loaded_ = false;
  bool busy_ = false;
  DeviceStream stream_ = nullptr;  // of the last SendChanges
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_CUDA_SEQUENCE_H_
