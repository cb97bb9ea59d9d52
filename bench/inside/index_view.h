// The library's own index of a recording's prompt, looked into: what it predicts for a step's
// queries.
#ifndef VATTN_BENCH_INSIDE_INDEX_VIEW_H_
#define VATTN_BENCH_INSIDE_INDEX_VIEW_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "api/vattn.h"
#include "bench/trace/trace.h"
#include "runtime/runtime.h"
#include "runtime/sequence.h"

namespace vattn::bench {

class IndexView {
 public:
  // A runtime of its own, on one thread, with the prompt of the chosen layers appended and the
  // index built. options are shaped for the trace (SetShape). Throws Failure. Keeps a reference to
  // the trace.
  IndexView(const Trace& trace, std::vector<int32_t> layers, const vattn_options& options);

  // The group of KV head h of the layer-th chosen layer with the scaled queries of a step: ready
  // for scans. It lies in memory that the next call takes. Throws Failure if there is no middle.
  Group Prepare(int64_t layer, int64_t h, int64_t step);
  // Scores of the middle of a prepared group, [q_heads][middle]: exact ones or the index's own,
  // with exact ones for marked tokens, which are always read.
  std::vector<float> ExactScores(const Group& group) const;
  std::vector<float> PredictedScores(Group& group, const std::vector<float>& exact) const;

  const Storage& storage() const { return runtime_->storage(); }
  const Promise& promise() const { return runtime_->promise(); }
  // Of the tables of one KV head.
  size_t table_bytes(int64_t layer, int64_t h) const {
    return Of(layer).kv_heads[h].tables[0].index->bytes();
  }

 private:
  struct Freed {
    void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{64}); }
  };
  const Layer& Of(int64_t layer) const { return sequence_->layer(static_cast<int>(layer)); }
  std::vector<float> Scores(const Group& group, IndexKind kind) const;

  const Trace& trace_;
  const std::vector<int32_t> layers_;
  std::shared_ptr<Runtime> runtime_;
  std::unique_ptr<Sequence> sequence_;
  std::unique_ptr<std::byte, Freed> memory_;
  std::vector<std::byte> q_;  // of the prepared group
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_INSIDE_INDEX_VIEW_H_
