// One request: its blocks, index and controller state, by layer.
#ifndef VATTN_RUNTIME_SEQUENCE_H_
#define VATTN_RUNTIME_SEQUENCE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/save_target.h"
#include "memory/snapshot_format.h"
#include "runtime/backend.h"
#include "runtime/block_tables.h"
#include "runtime/files/disk.h"
#include "runtime/files/save.h"
#include "runtime/layer.h"
#include "runtime/runtime.h"
#include "runtime/seat.h"

namespace vattn {

class SnapshotReader;
struct StoredPrefix;

// Prompt tokens for one layer, as vattn_append_params.
struct AppendRequest {
  int layer = 0;
  int64_t num_tokens = 0;
  int num_queries = 0;
  const void* k = nullptr;
  const void* v = nullptr;
  const void* q = nullptr;
  int64_t k_token_stride = 0, k_head_stride = 0;
  int64_t v_token_stride = 0, v_head_stride = 0;
  int64_t q_token_stride = 0, q_head_stride = 0;
};

// The same with attention, as vattn_prefill_params; num_queries is num_tokens.
struct PrefillRequest {
  AppendRequest rows;
  int out_dtype = 0;
  void* out = nullptr;
  float* lse = nullptr;
};

// As vattn_sequence_options.
struct SequenceOptions {
  uint64_t id = 0;  // 0: the runtime chooses
  int64_t reserve_tokens = 0;
  uint64_t tenant = 0;
};

// Used by one thread at a time, which holds use() unless the sequence sits in a batch: other
// threads take what nobody uses to spill it.
class Sequence {
 public:
  // FULL if reserve_tokens cannot be set aside.
  static absl::StatusOr<std::unique_ptr<Sequence>> Create(std::shared_ptr<Runtime> runtime,
                                                          const SequenceOptions& options);
  // A sequence of the layers of a prefix in memory. FULL: see Create.
  static absl::StatusOr<std::unique_ptr<Sequence>> FromLayers(std::shared_ptr<Runtime> runtime,
                                                              const SequenceOptions& options,
                                                              SharedLayers layers);
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  // FULL if the sequence has a reservation and no room for the copies that sharing may ask of it.
  absl::StatusOr<std::unique_ptr<Sequence>> Fork(uint64_t id);
  absl::StatusOr<SharedLayers> Share(int64_t tokens);
  absl::Status Append(const AppendRequest& request);
  // Appends, and answers every token. Errors as Append, and NOT_SUPPORTED; nothing has changed then.
  absl::Status Prefill(const PrefillRequest& request);
  // FULL if the sequence has a reservation, and blocks that others hold too would leave it one
  // short.
  absl::Status Truncate(int64_t tokens);
  // Sets aside what the sequence needs beside its blocks to have `tokens` tokens in every layer, in
  // place of what it had set aside before. FULL changes nothing.
  absl::Status Reserve(int64_t tokens);
  int64_t reserve_tokens() const { return blocks_.reserve_tokens(); }
  absl::Status BuildIndex();
  // Tables [layers][KV heads] learnt from all tokens that have left the window. INVALID_ARGUMENT if
  // these are too few.
  absl::StatusOr<std::vector<std::vector<std::shared_ptr<const Index>>>> LearnTables();

  // Files: sequence_sleep.cc.
  absl::Status Save(const std::string& path);
  // options.id 0: that of the file.
  static absl::StatusOr<std::unique_ptr<Sequence>> Restore(std::shared_ptr<Runtime> runtime,
                                                           const std::string& path,
                                                           const SequenceOptions& options = {});
  absl::Status Hibernate(const std::string& path);
  // Hibernates into a file of the runtime's disk, which goes with the sequence or its wakening.
  absl::Status Spill();
  absl::Status Wake();
  bool hibernated() const { return !hibernate_path_.empty(); }
  bool HoldsBlocks() const { return blocks_.HoldsBlocks(); }
  // About the bytes that Save writes, and hardly ever fewer.
  uint64_t SavedBytes() const { return vattn::SavedBytes(*runtime_, layers_); }
  // For the disk: a file with as many tokens as the prefix has, and a sequence of the first
  // `tokens` of such a file, which is open.
  absl::StatusOr<SavedFile> SaveAs(const SaveTarget& target, const StoredPrefix* prefix,
                                   bool durable);
  static absl::StatusOr<std::unique_ptr<Sequence>> FromPrefix(std::shared_ptr<Runtime> runtime,
                                                              const SequenceOptions& options,
                                                              SnapshotReader& reader,
                                                              const std::string& path,
                                                              int64_t tokens);

  // Held over every use outside of a batch.
  std::mutex& use() { return use_; }
  // Now is the last time that it was used, for the choice of what to spill.
  void Touch() { last_use_ = runtime_->NextUse(); }
  uint64_t last_use() const { return last_use_; }

  // One decode step, by the batch. Makes room for `new_tokens` more in every layer and codes what
  // the window then no longer holds; FULL changes nothing.
  absl::Status OpenStep(int new_tokens);
  // The tokens of every layer once the step that was opened last has attended it. What layers have
  // counted of them by now is layer(l).tokens: with each layer's attention on the CPU, from the
  // step's begin on CUDA.
  int64_t tokens_in_step() const { return tokens_before_step_ + new_tokens_; }
  // The query tokens of that step are its new ones, or without any the last one that is there.
  int num_query_tokens() const { return std::max(new_tokens_, 1); }
  // Where the middle of every query token of the step begins and ends: those of the first one.
  Middle middle_in_step() const;
  int64_t middle_begin_in_step() const { return middle_in_step().begin; }
  int64_t middle_end_in_step() const { return middle_in_step().end; }
  // Back to before OpenStep, but for what was coded and copied for it: tokens, step number, and on
  // the CPU the controller states. Cannot fail: a reservation gets back what the step drew from it,
  // or is ready already for the copy of a block that was shared since. On CUDA after ReadBackState.
  void GiveUpStep();
  // Gives back blocks that no token lies in: room of a step that was not opened after all.
  void ReleaseSpare() { blocks_.ReleaseSpare(); }
  // The middle of a layer with `tokens` tokens is [sinks, MiddleEnd(tokens)); MiddleEnd = sinks:
  // none.
  int64_t MiddleEnd(int64_t tokens) const;

  Runtime& runtime() const { return *runtime_; }
  const std::shared_ptr<Runtime>& shared_runtime() const { return runtime_; }
  uint64_t id() const { return id_; }
  TenantSlot tenant_slot() const { return tenant_.slot(); }
  uint64_t tenant() const { return tenant_.number(); }
  uint64_t step() const { return step_; }
  void CountStep() { ++step_; }
  Layer& layer(int l) { return layers_[l]; }
  const Layer& layer(int l) const { return layers_[l]; }
  void AddTokens(int l, int64_t count);
  // Brings table_bytes up to date after changes to blocks, indices or hot sets.
  void CountTables();
  BlockTables& blocks() { return blocks_; }
  SequenceHalf& half() { return *half_; }
  // Waits for steps that were enqueued and brings their state to the host. Before the host reads or
  // changes the sequence.
  absl::Status ReadBackState();
  int64_t table_bytes() const { return table_bytes_.load(std::memory_order_relaxed); }
  // Tokens of a layer, also while it hibernates.
  int64_t length(int l) const { return hibernated() ? asleep_tokens_[l] : layers_[l].tokens; }

  std::atomic<Seat*> seat{nullptr};  // the batch it sits in, or null
  int slot = -1;
  uint64_t hot_set = 0;  // CudaBatch::id_ of the batch whose hot set knows its blocks; 0: none

 private:
  Sequence(std::shared_ptr<Runtime> runtime, const SequenceOptions& options);

  // Writes the rows, has `answer` called with the blocks of each KV head, and counts them. Where
  // that fails or throws nothing was added.
  template <class F>
  absl::Status AppendAnd(const AppendRequest& request, F&& answer);
  // The queries of an append beside those that each KV head has had.
  absl::Status AddQueries(
      const AppendRequest& request,
      std::vector<std::unique_ptr<QueryMoment>>& moments /* [kv_heads] */) const;
  // Takes what writes need from the pool. No step may still read blocks that are copied.
  absl::Status TakeBlocksFor(const std::vector<BlockNeed>& needs);
  absl::Status MakeRoomAndCode(int new_tokens, bool in_turn);
  // Brings the queries of the last steps into the moments.
  void TakeRecentQueries();
  // The first block from which on no other sequence holds the coded blocks of the last segment.
  int64_t FirstOwnBlock(const Layer& layer) const;
  // What codes a layer up to `end`. in_turn: tokens come one by one, and a segment may wait for the
  // turn of its layer.
  CodingPlan PlanLayer(int l, int64_t end, bool in_turn) const;
  void CodeLayer(int l, const CodingPlan& plan, int64_t end);
  // The plan's segment of every KV head, from tokens up to `end`.
  void MakeSegment(int l, const CodingPlan& plan, int64_t end);
  // Tables [kv_heads] for tokens [begin, end): those of the last learnt segment about another
  // centre ... flooded: share of the tokens that they would make outliers, of the worst KV head.
  std::vector<std::shared_ptr<const Index>> Recentre(const Layer& layer, int64_t begin, int64_t end,
                                                     double* flooded) const;
  // ... and those learnt from the tokens and from all queries so far.
  std::vector<std::shared_ptr<const Index>> Learn(int l, int64_t begin, int64_t end);

  // Truncates what the host may change, with a reservation that allows it.
  void CutTo(int64_t tokens);
  // Refused in the middle of a decode step.
  absl::Status CheckWhole() const;
  void Adopt(SharedLayers layers);
  void ReleaseBlocks();
  void ResetStates();
  void CountTokens(int l, int64_t count);

  // Known to the runtime from then on.
  void Enlist();

  // The first `most` tokens of a file.
  absl::Status Load(SnapshotReader& reader, const std::string& path, int64_t most);
  // Lets go of everything that the file at `path` has; it had `tokens` of each layer. Cannot fail.
  void Sleep(std::string path, const SnapshotFileId& file, std::vector<int64_t> tokens) noexcept;
  std::vector<int64_t> Lengths() const;
  void ForgetLoaded();

  const std::shared_ptr<Runtime> runtime_;
  const OpenTenant tenant_;
  const uint64_t id_;
  std::vector<Layer> layers_;
  uint64_t step_ = 0;
  BlockTables blocks_;                  // of layers_
  int64_t tokens_before_step_ = 0;      // of every layer, when the last step was opened
  int new_tokens_ = 0;                  // of that step
  std::string hibernate_path_;          // absolute; empty: awake
  SnapshotFileId hibernate_file_{};     // what was written there: a name is no proof
  std::vector<int64_t> asleep_tokens_;  // [layers] while it hibernates
  SpillFile spill_;
  const std::unique_ptr<SequenceHalf> half_;
  std::atomic<int64_t> table_bytes_{0};
  std::mutex use_;
  std::atomic<uint64_t> last_use_{0};
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_SEQUENCE_H_
