// Sequences of any length for `vattn step`: a recorded trace lengthened, or made up.
#ifndef VATTN_BENCH_TRACE_DECODE_DATA_H_
#define VATTN_BENCH_TRACE_DECODE_DATA_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "bench/trace/trace.h"

namespace vattn::bench {

struct DecodeShape {
  int64_t tokens = 0;  // before the first step
  int32_t layers = 1, q_heads = 32, kv_heads = 8, head_dim = 128, batch = 1;
  int32_t dtype = 0;  // vattn_dtype
};

// Where a head is.
struct HeadPlace {
  int64_t sequence, layer, head;  // head: query head or KV head by context
};

// Every value follows from the seed and its place alone. Safe to use from many threads.
class DecodeData {
 public:
  virtual ~DecodeData() = default;

  // K and V [count, head_dim] of tokens first, first + 1, ... of a KV head. Tokens from
  // shape.tokens on are those that the steps add.
  virtual void Rows(const HeadPlace& kv_head, int64_t first, int64_t count, float* k,
                    float* v) const = 0;
  // Query [head_dim] of a query head in a step.
  virtual void Query(const HeadPlace& q_head, int64_t step, float* q) const = 0;
  // Queries of the last prompt tokens; index in [0, prompt_queries()).
  virtual int64_t prompt_queries() const = 0;
  virtual void PromptQuery(const HeadPlace& q_head, int64_t index, float* q) const = 0;
};

// Keeps the trace's first 16 and last 128 prompt tokens and tiles what lies between to
// shape.tokens, each row moved by Gaussian noise of 5 % of its dimensions' standard deviations so
// that no two are alike. Heads, layers, sequences and steps beyond those recorded go round through
// them. Keeps a reference to the trace. Throws UsageError if the shape does not fit.
std::unique_ptr<DecodeData> StretchTrace(const Trace& trace, const DecodeShape& shape,
                                         uint64_t seed);

// Gaussian keys and queries that share a decaying spectrum, so that few dimensions carry most of a
// score, as in trained models; queries of neighbouring steps are alike.
std::unique_ptr<DecodeData> MakeSynthetic(const DecodeShape& shape, uint64_t seed);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_TRACE_DECODE_DATA_H_
