#include "kernels/cuda/answer.cuh"

namespace vattn::cuda {

template <>
int AnswerOf<DType::kF32>::Launch(const StepParams& p, const AnswerShape& shape, Stream stream) {
  return p.group_heads <= 4 ? LaunchAnswer<DType::kF32, 4>(p, shape, stream)
                            : LaunchAnswer<DType::kF32, 8>(p, shape, stream);
}

template <>
AnswerShape AnswerOf<DType::kF32>::Shape(const DeviceStorage& storage, int group_heads,
                                         int groups) {
  return group_heads <= 4 ? ShapeOf<DType::kF32, 4>(storage, groups)
                          : ShapeOf<DType::kF32, 8>(storage, groups);
}

}  // namespace vattn::cuda
