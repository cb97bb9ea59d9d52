// The answer kernels for rows of this dtype, apart because they take long to compile.
#include "kernels/cuda/answer.cuh"

namespace vattn::cuda {

template struct AnswerOf<DType::kF16>;

}  // namespace vattn::cuda
