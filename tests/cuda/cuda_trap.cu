#include "tests/cuda/cuda_trap.h"

namespace vattn::test {
namespace {

__global__ void TrapKernel() { asm("trap;"); }

}  // namespace

cudaError_t TrapDevice(cudaStream_t stream) {
  TrapKernel<<<1, 1, 0, stream>>>();
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess ? error : cudaStreamSynchronize(stream);
}

}  // namespace vattn::test
