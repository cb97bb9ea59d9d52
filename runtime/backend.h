// The seam between the runtime and its backends. Runtime, Sequence and Batch check arguments and
// keep what all backends share; whatever differs between the CPU and a CUDA device is behind the
// three classes below, each of which has a CPU half (runtime/cpu) and a CUDA half (runtime/cuda).
#ifndef VATTN_RUNTIME_BACKEND_H_
#define VATTN_RUNTIME_BACKEND_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/workers.h"
#include "kernels/cuda/params.h"
#include "kernels/merge.h"
#include "memory/device.h"
#include "memory/host_store.h"
#include "runtime/attend_request.h"
#include "runtime/paged_pool.h"
#include "runtime/stats.h"

namespace vattn {

class Runtime;
class Sequence;
using cuda::Task;

// What a backend keeps of one sequence. Used as the sequence: by one thread at a time.
class SequenceHalf {
 public:
  virtual ~SequenceHalf() = default;

  // A step opens: what it takes to give it up is kept.
  virtual void BeginStep(const Sequence& sequence) = 0;
  // The controller states are again what they were at the last BeginStep, where the host has them.
  // Cannot fail.
  virtual void GiveUpStep(Sequence& sequence) = 0;

  // Tokens [begin, layer.coded) are to get codes by the layer's tables: at once, or before the next
  // step reads them.
  virtual void Code(Sequence& sequence, int layer, int64_t begin) = 0;
  // Everything that the host has decided is where steps find it. Blocks until it is.
  virtual absl::Status Settle(Sequence& sequence) = 0;
  // Rows were written, or cut off, by other means than a step.
  virtual void RowsChanged() = 0;

  // Waits for steps that may still work on the sequence, and brings the controller states to the
  // host. Before the host reads or changes the sequence. in_step: calls of an open step can still
  // follow.
  virtual absl::Status ReadBackState(Sequence& sequence, bool in_step) = 0;
  // Brings the queries that steps have kept, up to the last ReadBackState, to KvHead::recent.
  virtual absl::Status ReadBackQueries(Sequence& sequence) = 0;

  // Lets go of everything: the sequence goes to sleep.
  virtual void Clear() = 0;
  // Host memory that it holds.
  virtual int64_t table_bytes() const = 0;
};

// What a backend does for a batch: the memory of a step, its new rows, and its calls. Used as the
// batch: by one thread at a time.
class BatchHalf {
 public:
  virtual ~BatchHalf() = default;

  // Every call of a step comes by Call, so that layers can be counted as they are attended. False
  // where a replayed graph attends without a call: a step's tokens then count from its begin on.
  virtual bool sees_every_call() const = 0;

  // Takes what the calls of a step need, which then allocate nothing. The sequences [slots], null
  // for an empty slot, have room for Sequence::tokens_in_step() tokens in every layer.
  virtual absl::Status BeginStep(const std::vector<Sequence*>& slots, DeviceStream stream) = 0;
  // One call of the open step, for a layer of every sequence; arguments have been checked.
  virtual absl::Status Call(Task task, const AttendRequest& request, const Selection& selection,
                            DeviceStream stream) = 0;

  // A sequence of the open step goes, and later calls of the step do without it.
  virtual void Leave(const Sequence& sequence) = 0;
  // The open step is given up: no call of it answers anything any more.
  virtual absl::Status LeaveAll() = 0;
};

// What a backend does for a pool of the caller's own. Arguments have been checked, but for what
// only the backend can read. Used as the pool: by one thread at a time.
class PagedHalf {
 public:
  virtual ~PagedHalf() = default;

  virtual absl::Status Write(const PagedRows& rows, DeviceStream stream) = 0;
  virtual absl::Status BeginStep(const PagedStep& step, DeviceStream stream) = 0;
  // A layer of the open step.
  virtual absl::Status Attend(const AttendRequest& request, DeviceStream stream) = 0;
  // Attention of a request's last tokens over rows that are there; params has the pool as the host
  // finds it, the arrays of the caller, and the host's block ids.
  virtual absl::Status Prefill(int layer, const PrefillParams& params) = 0;
};

// What all sequences of a runtime share of a backend. Thread-safe.
class Backend {
 public:
  virtual ~Backend() = default;

  // The most query heads per KV head, of all query tokens of a call.
  virtual int max_group_heads() const = 0;

  virtual std::unique_ptr<SequenceHalf> MakeSequence(const Runtime& runtime) = 0;
  // OUT_OF_MEMORY, NOT_SUPPORTED.
  virtual absl::StatusOr<std::unique_ptr<BatchHalf>> MakeBatch(Runtime& runtime, int slots) = 0;

  // The pool outlives it. OUT_OF_MEMORY, NOT_SUPPORTED.
  virtual absl::StatusOr<std::unique_ptr<PagedHalf>> MakePaged(Runtime& runtime,
                                                               const PagedPool& pool) = 0;

  // True for memory that work on a device fills or reads when its turn comes: the host does not
  // look into it before.
  virtual bool IsOnDevice(const void* pointer) const = 0;
  // Attention of many new tokens at once, whose rows are written. Blocks until it is there. params
  // has the arrays of the caller and the host's block ids. CheckPrefill, which comes first, answers
  // NOT_SUPPORTED; Prefill OUT_OF_MEMORY.
  virtual absl::Status CheckPrefill() const = 0;
  virtual absl::Status Prefill(const PrefillParams& params, cpu::Workers* workers) = 0;
  // Rows k and v of an append, wherever they are, into their blocks. params.blocks are on the host.
  // Blocks until they are written.
  virtual absl::Status Write(const WriteParams& params, cpu::Workers* workers) = 0;
  // Parts of `bytes` each that a caller gave, at `offsets` [count] from `base`, where the host can read
  // them: parts [count] lead to them, or into `copy`.
  virtual absl::Status OnHost(const void* base, const std::vector<int64_t>& offsets, int64_t bytes,
                              std::vector<const std::byte*>& parts,
                              std::vector<std::byte>& copy) = 0;

  // Merges records of several ranks; params are those of the host (Promise::quantile too). Enqueues
  // where the records are on a device and a stream is given, else blocks.
  virtual absl::Status Merge(const MergeParams& params, DeviceStream stream) = 0;

  // True if codes have a second copy on a device: block tables then list those that the host wrote.
  virtual bool copies_codes() const = 0;
  // Memory for the codes of blocks that a sequence has come to hold. OUT_OF_MEMORY, and nothing has
  // changed.
  virtual absl::Status HoldCodes(const BlockId* blocks, int64_t count) = 0;
  // `count` references to blocks were dropped.
  virtual void CountReleased(int64_t count) = 0;
  // A block gets new content that copies of its rows would not know of.
  virtual void BumpGeneration(int32_t block) = 0;

  // Counters that the backend keeps by itself.
  virtual void AddTo(StatsSnapshot& stats) = 0;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_BACKEND_H_
