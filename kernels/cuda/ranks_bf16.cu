// The kernels of a look for rows of this dtype, apart because they take long to compile.
#include "kernels/cuda/ranks.cuh"

namespace vattn::cuda {

template struct LookOf<DType::kBF16>;

}  // namespace vattn::cuda
