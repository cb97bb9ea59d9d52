#include "kernels/cuda/answer.cuh"

namespace vattn::cuda {

template <>
int AnswerOf<DType::kBF16>::Launch(const StepParams& p, const AnswerShape& shape, Stream stream) {
  return p.group_heads <= 4 ? LaunchAnswer<DType::kBF16, 4>(p, shape, stream)
                            : LaunchAnswer<DType::kBF16, 8>(p, shape, stream);
}

template <>
AnswerShape AnswerOf<DType::kBF16>::Shape(const DeviceStorage& storage, int group_heads,
                                          int groups) {
  return group_heads <= 4 ? ShapeOf<DType::kBF16, 4>(storage, groups)
                          : ShapeOf<DType::kBF16, 8>(storage, groups);
}

}  // namespace vattn::cuda
