// The index of one (sequence, layer, KV head): calibration and frozen tables (METHOD.md, "Index").
#ifndef VATTN_RUNTIME_INDEX_INDEX_H_
#define VATTN_RUNTIME_INDEX_INDEX_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/params.h"

namespace vattn {

// Second moment of the queries that read one KV head: what C_q is made of. Every token's queries
// count alike, until there are so many tokens that older ones fade with a half-life of 8,192.
class QueryMoment {
 public:
  // Of the queries of many tokens, [tokens][group_heads], this many evenly spread ones are enough.
  static int64_t NumPicks(int64_t tokens, int group_heads);
  struct Pick {
    int64_t token;
    int head;
  };
  // REQUIRES 0 <= i < NumPicks(tokens, group_heads). All heads in turn.
  static Pick PickAt(int64_t i, int64_t tokens, int group_heads);

  explicit QueryMoment(int dim) : dim_(dim) {}

  // queries [count][dim], scaled, that speak for so many tokens. Left out if they are not finite.
  void Add(const float* queries, int64_t count, int64_t tokens);
  // As from one query, whose q q^T is mean [dim][dim].
  static QueryMoment FromMean(int dim, std::vector<double> mean);
  bool empty() const { return weight_ == 0; }
  int dim() const { return dim_; }
  // [dim][dim], mean of q q^T.
  std::vector<double> Mean() const;

  // For saving: the sum and, behind it, its weight.
  std::vector<double> Save() const;
  static QueryMoment Load(int dim, const std::vector<double>& saved);

 private:
  int dim_;
  double weight_ = 0;        // tokens
  std::vector<double> sum_;  // [dim][dim], empty until the first Add
};

// Linear maps of keys and queries of one KV head whose signs kSign compares, each [dims][dim_k].
// Null: random hyperplanes for both.
struct SignMap {
  const float* key = nullptr;
  const float* query = nullptr;
};

// Frozen tables; shared by the forks of a sequence, never changed.
class Index {
 public:
  // From sampled rows keys [count][dim_k] and values [count][dim_v], count >= 1. moment may be
  // empty: then C_q is the identity. For kPage every 16 rows, from the first on, are a tile.
  static std::shared_ptr<const Index> Make(const Storage& storage, const float* keys,
                                           const float* values, int64_t count,
                                           const QueryMoment& moment, SignMap map = {});
  // The tables of `base` about the mean of other keys [count][dim_k], with limits that make as few
  // outliers of them and of the values [count][dim_v] as of those that base was made from.
  // kBalanced. *flooded: the share of these keys that the limits of base would make outliers.
  static std::shared_ptr<const Index> Recentre(const Storage& storage, const Index& base,
                                               const float* keys, const float* values,
                                               int64_t count, double* flooded);
  // The same with limits that make as few outliers of these keys and values as of those that it was
  // made from: tables fit the keys that they were learnt from better than any others. kBalanced.
  std::shared_ptr<const Index> WithLimitsOf(const Storage& storage, const float* keys,
                                            const float* values, int64_t count) const;
  // The same with the tables of `first` for the codes of values.
  std::shared_ptr<const Index> WithValuesOf(const Storage& storage, const Index& first) const;
  // The same tables again, from `floats()` of an index of the same shape.
  static std::shared_ptr<const Index> FromFloats(const Storage& storage, std::vector<float> floats);
  static int64_t NumFloats(const Storage& storage);

  IndexTables tables() const { return TablesAt(floats_.data()); }
  // The same over a copy of floats() that begins at `base`.
  IndexTables TablesAt(const float* base) const;
  const std::vector<float>& floats() const { return floats_; }
  int64_t bytes() const { return static_cast<int64_t>(floats_.size() * sizeof(float)); }

 private:
  Index(const Storage& storage, std::vector<float> floats);
  // Raises the limits in `floats`, of tables like these, to what few of these keys and values are
  // over; returns the share of the keys that are over the limits of this index.
  double RaiseLimits(const Storage& storage, const float* keys, const float* values, int64_t count,
                     std::vector<float>& floats) const;

  int dim_k_, dim_v_;
  CodeLayout code_;
  // center, encode, project, centroids, with kBalanced step, rest, weight and both noises, value
  // mean, value step, then residual, spread, norm2 of values and, of kinds that are fitted, slope
  // and intercept, of kBalanced the limits.
  std::vector<float> floats_;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_INDEX_INDEX_H_
