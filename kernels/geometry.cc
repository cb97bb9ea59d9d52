#include "kernels/geometry.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

namespace vattn {

CodeLayout MakeCodeLayout(int bytes, int dim) {
  constexpr double kNoise8 = 4e-4, kNoise4 = .0115, kNoise2 = .119;  // share of variance lost
  dim = std::min(dim, kMaxCodeDims);
  std::vector<double> mass(dim + 1, 0.0);  // mass[j]: variance of the first j dimensions
  for (int j = 0; j < dim; ++j) mass[j + 1] = mass[j] + std::exp(-j / (.18 * dim));
  CodeLayout best;
  double least = 1e300;
  for (int d8 = 0; d8 <= dim && d8 <= bytes; d8 += 4) {
    for (int d4 = 0; d8 + d4 <= dim && d8 + d4 / 2 <= bytes; d4 += 8) {
      const int left = bytes - d8 - d4 / 2;
      const int d2 = std::min(left * 4, dim - d8 - d4) / 16 * 16;
      const int end8 = d8, end4 = d8 + d4, end2 = d8 + d4 + d2;
      const double noise = kNoise8 * mass[end8] + kNoise4 * (mass[end4] - mass[end8]) +
                           kNoise2 * (mass[end2] - mass[end4]) + (mass[dim] - mass[end2]);
      if (noise < least) least = noise, best = {.dims8 = d8, .dims4 = d4, .dims2 = d2};
    }
  }
  return best;
}

CodeLayout MakeIndexLayout(IndexKind kind, int bytes, int dim) {
  constexpr int kShareTokens = 16384;
  CodeLayout code;
  switch (kind) {
    case IndexKind::kBalanced:
      return MakeCodeLayout(bytes, dim);
    case IndexKind::kSign:
      code.dims1 = 8 * bytes;
      break;
    case IndexKind::kHadamard2:
      code.dims2 = static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(dim)));
      break;
    case IndexKind::kPage:
      code.other_bytes = 2 * 2 * dim / kTileTokens;
      break;
    case IndexKind::kPooled:
      code.other_bytes = 2 * dim / kTileTokens;
      break;
    case IndexKind::kClusters:
      code.other_bytes = 2;
      code.centroids = std::min(65536, bytes * kShareTokens / (4 * dim));
      break;
    case IndexKind::kExact:
    case IndexKind::kExternal:
      break;
  }
  code.kind = kind;
  return code;
}

}  // namespace vattn
