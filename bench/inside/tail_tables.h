// What the tail terms put in the place of values: tables made from the middle of a KV head.
#ifndef VATTN_BENCH_INSIDE_TAIL_TABLES_H_
#define VATTN_BENCH_INSIDE_TAIL_TABLES_H_

#include <cstdint>
#include <vector>

namespace vattn::bench {

struct TailTable {
  std::vector<float> rows;     // [entries][dim]
  std::vector<int32_t> entry;  // [n]
};

// Mean values of the tokens of each entry; an entry without tokens is 0. values [n][dim], entry
// [n].
TailTable MeanTable(const float* values, int64_t dim, std::vector<int32_t> entry);
// Entries of pages of `page` tokens; of one page for all with page >= n.
std::vector<int32_t> Pages(int64_t n, int64_t page);

// exp(score) as linear attention has it without training (SLA: softmax over the elements as feature
// map), in proportion to phi(q) . phi(k_i). Its state is sum phi(k) v^T, so what stands in for a
// row is this times the row's own value. The factor is the one that leaves the least variance of
// draws by `weight`, as far as the predicted exp(score) `guess` tells. q [dim], keys [n][dim],
// unscaled; guess, weight [n].
std::vector<double> LinearGuess(const float* q, const float* keys, int64_t dim,
                                const std::vector<double>& guess,
                                const std::vector<double>& weight);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_INSIDE_TAIL_TABLES_H_
