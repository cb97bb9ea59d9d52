// Products of matrices: those of making an index, over a sample of keys and what its codes leave of
// them (METHOD.md, "Index"), and those of attention of many query tokens. Everything is fp32, row-major and without gaps; dim is a multiple of
// 16.
#ifndef VATTN_KERNELS_CPU_PRODUCTS_H_
#define VATTN_KERNELS_CPU_PRODUCTS_H_

#include <cstdint>

#include "kernels/geometry.h"

namespace vattn::cpu {

// sum [dim][dim] += the sum of x x^T over rows x of `rows` [count][dim]. In fp32: a thousand
// rows or so at a time keep it exact enough.
void AddOuterProducts(const float* rows, int64_t count, int dim, float* sum);

// out [count][columns] = rows [count][dim] map [dim][columns]; columns a multiple of 16.
void MapRows(const float* rows, int64_t count, int dim, const float* map, int columns, float* out);

// sums [queries][dim] += weights^T rows, with weights [count][queries] and rows [count][dim].
void AddWeightedRows(const float* weights, int queries, const float* rows, int64_t count, int dim,
                     float* sums);

// x [count][dim]: whitened coordinates, the first code.dims() of them coded in levels step [dims]
// wide. In place of each, its squared error if coded, else its square.
void SquareResiduals(const CodeLayout& code, const float* step, int64_t count, int dim, float* x);

// out[i] = sum over j of weight[j] * rows[i][j]; rows [count][dim].
void WeighRows(const float* rows, int64_t count, int dim, const float* weight, float* out);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_PRODUCTS_H_
