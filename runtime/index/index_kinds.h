// Tables of the kinds of index beside the balanced one (METHOD.md, "Other kinds of index").
#ifndef VATTN_RUNTIME_INDEX_INDEX_KINDS_H_
#define VATTN_RUNTIME_INDEX_INDEX_KINDS_H_

#include <Eigen/Core>
#include <cstdint>

#include "runtime/index/index.h"

namespace vattn {

// Keys that an index is made from, less their mean.
struct KeySample {
  const float* keys;  // [count][dim]
  int64_t count;
  int dim;
};

// Queries with the given second moment [dim][dim], drawn from a normal distribution: [dim][64]. The
// same every time.
Eigen::MatrixXf DrawQueries(const Eigen::MatrixXd& moment);

// encode [dim][padded] and project [dims][dim] of the map.
void FillSigns(const CodeLayout& code, int dim, SignMap map, float* encode, float* project);
// ... of the Hadamard rotation, padded with zeros to a power of 2, in levels `step` standard
// deviations wide.
void FillHadamard(const CodeLayout& code, const KeySample& sample, double step, float* encode,
                  float* project);
// Least-squares fit[0] (slope) and fit[1] (intercept) of IndexTables.
void FitSigns(const CodeLayout& code, const KeySample& sample, const Eigen::MatrixXf& queries,
              const float* encode, const float* project, float* fit);
void FitBounds(const KeySample& sample, const Eigen::MatrixXf& queries, float* fit);
// k-means (Lloyd) centroids [centroids][dim]; starts from keys evenly spread over the sample.
void FillCentroids(const Storage& storage, const KeySample& sample, float* centroids);

}  // namespace vattn

#endif  // VATTN_RUNTIME_INDEX_INDEX_KINDS_H_
