// The tables of kBalanced (METHOD.md, "Index"): a basis in which a key's first coordinates carry
// what queries see of it, the levels that they are coded in, and what the codes leave out.
#ifndef VATTN_RUNTIME_INDEX_INDEX_BASIS_H_
#define VATTN_RUNTIME_INDEX_INDEX_BASIS_H_

#include <Eigen/Core>

#include "runtime/index/index_kinds.h"

namespace vattn {

// Uniform quantisers with least squared error for a Gaussian, in standard deviations, of 7, 4 and 2
// bits.
constexpr double kStep7 = .0625, kStep4 = .3352, kStep2 = .9957;

// What IndexTables has under these names.
struct BasisTables {
  float* encode;
  float* project;
  float* step;
  float* rest;
  float* weight;
  float* level_noise2;
  float* noise;
  float* residual_limit;
  float* noise_limit;
};

// From second moments of keys, less their mean, and of queries.
void FillBasis(const CodeLayout& code, const KeySample& sample, Eigen::MatrixXd keys,
               Eigen::MatrixXd queries, const BasisTables& out);

}  // namespace vattn

#endif  // VATTN_RUNTIME_INDEX_INDEX_BASIS_H_
