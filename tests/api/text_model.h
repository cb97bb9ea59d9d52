// A language model of made-up numbers for tests of engines: rows, queries and the next token are
// functions of a text up to a position, so that texts that begin alike have equal rows there, and
// any two other places have unlike ones. Shares no code with the library.
#ifndef VATTN_TESTS_API_TEXT_MODEL_H_
#define VATTN_TESTS_API_TEXT_MODEL_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "tests/api/attention_model.h"

namespace vattn::test {

// Tokens, and for each a number that stands for the text up to it.
class Text {
 public:
  void Push(int32_t token);
  void Truncate(int64_t tokens);
  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  int32_t token(int64_t position) const { return tokens_[position]; }
  uint64_t hash(int64_t position) const { return hashes_[position]; }

 private:
  std::vector<int32_t> tokens_;
  std::vector<uint64_t> hashes_;
};

class TextModel {
 public:
  // layer_heads: KV heads of each layer, which may be 0; the other numbers are those of shape.
  TextModel(const Shape& shape, const std::vector<int32_t>& layer_heads, uint64_t seed);

  const Shape& shape() const { return shape_; }
  const std::vector<int32_t>& layer_heads() const { return layer_heads_; }
  int32_t num_layers() const { return static_cast<int32_t>(layer_heads_.size()); }
  size_t element() const { return shape_.dtype == VATTN_F32 ? 4 : 2; }
  static constexpr int32_t kVocabulary = 1000;

  // The token that follows position.
  int32_t Next(const Text& text, int64_t position) const;
  // One token's rows, [kv_heads, dim_k] and [kv_heads, dim_v] in the dtype; v is not written with
  // shared_kv.
  void WriteRows(const Text& text, int64_t position, int32_t layer, std::byte* k,
                 std::byte* v) const;
  // One token's queries, [q_heads, dim_k] in the dtype.
  void WriteQueries(const Text& text, int64_t position, int32_t layer, std::byte* q) const;
  // Whether nearly all that the head sees is one token: a stale row of it, or one not found, leaves
  // an answer that is off by as much as a value.
  bool LooksForNeedle(const Text& text, int64_t position, int32_t layer, int q_head) const;
  // Exact attention of the token at position to those up to its own.
  Answer Attend(const Text& text, int64_t position, int32_t layer, int q_head) const;
  // Tables learnt from a text of its own (vattn_tables_save), under name.
  void SaveTables(const Runtime& runtime, const std::string& path, const std::string& name) const;

 private:
  // Where the numbers begin that belong to a text up to a position: a piece of one table.
  size_t Place(uint64_t hash, int32_t layer, int head, int use) const;
  std::vector<float> Query(const Text& text, int64_t position, int32_t layer, int q_head) const;

  const Shape shape_;
  const std::vector<int32_t> layer_heads_;
  std::vector<double> table_;     // Gaussian numbers, as the dtype has them
  std::vector<double> squares_;   // [i]: sum of the squares before table_[i]
  std::vector<std::byte> bytes_;  // table_ in the dtype
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_TEXT_MODEL_H_
