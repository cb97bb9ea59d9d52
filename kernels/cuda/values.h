// Value codes on the device (METHOD.md, "Value codes"): coding them, and their answer for the whole
// middle.
#ifndef VATTN_KERNELS_CUDA_VALUES_H_
#define VATTN_KERNELS_CUDA_VALUES_H_

#include "kernels/cuda/params.h"

namespace vattn::cuda {

// The sum over the middle of a group is cut into items of 32 bytes of every token's value code for
// 8 heads, and each item into parts of the middle, a thread block each.
constexpr int kItemBytes = 32, kItemHeads = 8;
constexpr int kItemSums = kItemHeads * kItemBytes * 4;  // 2 bits a dim; with 4 half of them
constexpr int kMostParts = 32;
constexpr int kLeastPartBlocks = 8;
VATTN_HD inline int ValueSlices(const Storage& s) {
  return (s.value_code_bytes + kItemBytes - 1) / kItemBytes;
}
VATTN_HD inline int ValueItems(const Storage& s, int group_heads) {
  return ValueSlices(s) * ((group_heads + kItemHeads - 1) / kItemHeads);
}
VATTN_HD inline int ValueParts(int64_t blocks) {
  const int64_t parts = blocks / kLeastPartBlocks;
  return parts < 1 ? 1 : parts > kMostParts ? kMostParts : static_cast<int>(parts);
}

// What one part of an item found: sums in the unit exp(unit) of each head.
struct ValuePart {
  float sum[kItemSums];  // of e^ (1 + level / 2^bits) by dim and head, in the order of the products
  float unit[kItemHeads];
  float mass[kItemHeads];  // of e^
};

// Codes the values of `count` items in device memory, with at most `most` tokens in one item, into the
// device and the host copy. The bits are the same as those of kernels/cpu/values.cc.
int EncodeValues(const DeviceStorage& storage, const EncodeItem* items, int count, int64_t most,
                 Stream stream);

// Sum of e^ v^ over the middle of every group and head, as a softmax state in scratch.coded. After
// Scan.
int SumValues(const StepParams& params, Stream stream);

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_VALUES_H_
