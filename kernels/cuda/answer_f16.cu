#include "kernels/cuda/answer.cuh"

namespace vattn::cuda {

template <>
int AnswerOf<DType::kF16>::Launch(const DecodeParams& p, int blocks, Stream stream) {
  return p.q_heads <= 4 ? LaunchAnswer<DType::kF16, 4>(p, blocks, stream)
                        : LaunchAnswer<DType::kF16, 8>(p, blocks, stream);
}

template <>
int AnswerOf<DType::kF16>::MostBlocks(const RowLayout& row, int q_heads) {
  return q_heads <= 4 ? cuda::MostBlocks<DType::kF16, 4>(row) : cuda::MostBlocks<DType::kF16, 8>(row);
}

}  // namespace vattn::cuda
