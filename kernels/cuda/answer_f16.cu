#include "kernels/cuda/answer.cuh"

namespace vattn::cuda {

template <>
int AnswerOf<DType::kF16>::Launch(const DecodeParams& p, const AnswerShape& shape, Stream stream) {
  return p.q_heads <= 4 ? LaunchAnswer<DType::kF16, 4>(p, shape, stream)
                        : LaunchAnswer<DType::kF16, 8>(p, shape, stream);
}

template <>
AnswerShape AnswerOf<DType::kF16>::Shape(const DeviceStorage& storage, int q_heads, int groups) {
  return q_heads <= 4 ? ShapeOf<DType::kF16, 4>(storage, groups)
                      : ShapeOf<DType::kF16, 8>(storage, groups);
}

}  // namespace vattn::cuda
