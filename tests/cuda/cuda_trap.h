// A kernel that ends a CUDA context.
#ifndef VATTN_TESTS_CUDA_CUDA_TRAP_H_
#define VATTN_TESTS_CUDA_CUDA_TRAP_H_

#include <cuda_runtime_api.h>

namespace vattn::test {

// Runs it and waits: the device's error. Nothing works in this process afterwards.
cudaError_t TrapDevice(cudaStream_t stream);

}  // namespace vattn::test

#endif  // VATTN_TESTS_CUDA_CUDA_TRAP_H_
