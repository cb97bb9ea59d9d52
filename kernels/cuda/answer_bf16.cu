#include "kernels/cuda/answer.cuh"

namespace vattn::cuda {

template <>
int AnswerOf<DType::kBF16>::Launch(const DecodeParams& p, int blocks, Stream stream) {
  return p.q_heads <= 4 ? LaunchAnswer<DType::kBF16, 4>(p, blocks, stream)
                        : LaunchAnswer<DType::kBF16, 8>(p, blocks, stream);
}

template <>
int AnswerOf<DType::kBF16>::MostBlocks(const RowLayout& row, int q_heads) {
  return q_heads <= 4 ? cuda::MostBlocks<DType::kBF16, 4>(row) : cuda::MostBlocks<DType::kBF16, 8>(row);
}

}  // namespace vattn::cuda
