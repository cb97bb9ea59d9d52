// What the sequences of `vattn step` are fed with: prompts, and the arrays of every step.
#ifndef VATTN_BENCH_STEP_STEP_PROMPT_H_
#define VATTN_BENCH_STEP_STEP_PROMPT_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "api/vattn.h"
#include "bench/trace/decode_data.h"

namespace vattn::bench {

// Appends the prompt of one layer, with the queries that calibrate its index, to sequences that are
// to hold the same tokens. `sequence` says which of the data's. Rows are made on `threads` threads.
void AppendPrompt(const DecodeShape& shape, const DecodeData& data, int32_t sequence, int32_t layer,
                  int threads, const std::vector<vattn_sequence*>& to);

// Inputs of one layer in one step, in the shape's type.
struct LayerInputs {
  std::vector<std::byte> q;     // [batch, q_heads, head_dim]
  std::vector<std::byte> k, v;  // [batch, kv_heads, head_dim]
};

// Which of the data's values a step takes.
struct StepInputs {
  int64_t query = 0;    // step whose queries are asked
  int64_t token = 0;    // tokens that the steps before have added
  bool shared = false;  // all sequences hold the tokens of sequence 0; their queries differ still
};

// [layers]
std::vector<LayerInputs> MakeInputs(const DecodeShape& shape, const DecodeData& data,
                                    const StepInputs& step);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_STEP_STEP_PROMPT_H_
