// One sequence's cells in one layer's cache, attended where they lie, and the codes that belong to them.
//
// ggml says neither which cells are new nor that others were written. What a range knows:
//   - Query tokens of one call sit in the last cells of the run that their mask shows, as every token sees
//     itself and no later one. For the first of them that is only sure if the run has grown by
//     exactly these tokens since the call before; otherwise, as after a cut, it may have filled a
//     hole anywhere.
//   - Writes that no attention goes with (a context shift, a state that is loaded) leave no trace but
//     the bytes.
// So each code has a tag, drawn from the bytes of its key. After anything but plain growth all tags
// are compared before codes are used; in plain growth one cell of every sixteen is, another one each time, so
// that a change of sixteen neighbours is seen at once. Cells with other bytes are coded again. Rows
// themselves are always read in the cache: an outdated code can make an answer dearer or its bound
// less sure, but never takes in a row that is no longer there.
#ifndef VATTN_API_LLAMA_CPP_RANGE_H_
#define VATTN_API_LLAMA_CPP_RANGE_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "api/llama_cpp/counters.h"
#include "api/llama_cpp/flash_attention.h"
#include "api/llama_cpp/runtimes.h"

namespace vattn::llama_cpp {

class Range {
 public:
  // From cell `begin` of the stream on.
  Range(const FlashAttention& f, int64_t begin);

  int64_t begin() const { return begin_; }
  // Whether it has seen one call alone.
  bool is_new() const { return calls_ == 1; }

  // Every call on the range, before it is answered: its run ends with these query tokens. Answers whether it has
  // grown by them and nothing else.
  bool See(const FlashAttention& f, int64_t end);
  // A call on the same cache, for another range, that wrote to cells [begin, end) of the stream.
  void SeeOther(int64_t begin, int64_t end);
  // A call on the same cache of which it is not known where it wrote.
  void SeeUnknown() { suspect_ = true; }

  // Whether tables are there or can be learnt.
  bool CanVerify() const;
  // Answers the call that was seen last; false: the answer is not finite, and not to be used. Throws
  // vattn::Error.
  bool Verified(const FlashAttention& f, Runtimes& runtimes, int32_t threads, Counters& counters);
  bool Dense(const FlashAttention& f, Runtimes& runtimes, int32_t threads);
  bool Chunk(const FlashAttention& f, Runtimes& runtimes, int32_t threads);

  // Most query tokens of a step.
  static int32_t MostQueries(const Shape& shape);

 private:
  Paged MakePool(const FlashAttention& f, const Runtime& runtime, const char* tables) const;
  bool Step(const FlashAttention& f, Paged& pool, bool first);
  void TakeQueries(const FlashAttention& f);
  bool RoundQueries(const FlashAttention& f);
  uint64_t Tag(int64_t cell) const;
  void Learn(const FlashAttention& f, const Runtime& runtime, Counters& counters);
  void Check(Counters& counters);
  void Code(std::vector<int64_t>& cells, Counters& counters);
  void KeepUp(const FlashAttention& f, Runtimes& runtimes, int32_t threads, Counters& counters);

  const int64_t begin_;
  uint16_t *const k_, *const v_;  // of cell `begin`
  const int64_t cell_stride_, head_stride_, capacity_;
  const int64_t tag_bytes_;
  int64_t calls_ = 0;
  int64_t length_ = 0;    // cells of the run that was seen last
  bool suspect_ = false;  // cells may have been written since tags were compared
  std::vector<int32_t> blocks_;

  std::optional<Paged> dense_, verified_;
  bool begun_ = false;          // verified_ has answered
  int64_t taught_ = 0;          // length when its tables were learnt
  int64_t coded_ = 0;           // cells before this one have codes
  int64_t phase_ = 0;           // which of every sixteen is compared next
  std::vector<uint64_t> tags_;  // [coded]

  // The latest queries, fp16, a ring of [kQueries, q_heads, head_dim_k].
  std::vector<uint16_t> queries_;
  int64_t queries_seen_ = 0;
  std::vector<uint16_t> q_;  // [num_tokens, q_heads, head_dim_k] of the call
  std::vector<int32_t> verdicts_;
  std::vector<float> errors_;
};

}  // namespace vattn::llama_cpp

#endif  // VATTN_API_LLAMA_CPP_RANGE_H_
