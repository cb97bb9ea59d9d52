#include "tests/cuda/cuda_calls.h"

#include <iterator>
#include <stdexcept>

namespace vattn::test {
namespace {

template <class T>
void Copy(T* to, const T* from, size_t count, cudaMemcpyKind kind, cudaStream_t stream) {
  if (count == 0) return;
  CheckCuda(cudaMemcpyAsync(to, from, count * sizeof(T), kind, stream), "copying an array");
}

template <class T>
void Fetch(std::vector<T>& to, const T* from, cudaStream_t stream) {
  Copy(to.data(), from, to.size(), cudaMemcpyDeviceToHost, stream);
}

}  // namespace

void CheckCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

std::string NoDevice() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count > 0 ? "" : "none is there";
}

int64_t DeviceBytesUsed() {
  size_t free = 0, total = 0;
  CheckCuda(cudaMemGetInfo(&free, &total), "asking for free memory");
  return static_cast<int64_t>(total - free);
}

OwnedStream MakeStream() {
  cudaStream_t stream = nullptr;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  return OwnedStream(stream);
}

DeviceCall::DeviceCall(const Call& call, int new_tokens) : params_(Init<vattn_attend_params>()) {
  const size_t element = call.shape.dtype == VATTN_F32 ? 4 : 2;
  const size_t heads = call.lse.size(), groups = call.middle.size(),
               new_rows = groups * call.tokens;
  const bool rows = new_tokens > 0;
  const size_t sizes[] = {heads * call.shape.dim_k * element,
                          rows ? new_rows * call.shape.dim_k * element : 0,
                          rows && !call.shape.shared_kv ? new_rows * call.shape.dim_v * element : 0,
                          call.out.size(),
                          heads * sizeof(float),
                          heads * sizeof(int32_t),
                          heads * sizeof(float),
                          groups * sizeof(int32_t),
                          groups * sizeof(int32_t),
                          groups * sizeof(int32_t),
                          groups * sizeof(int64_t)};
  constexpr size_t kAlignment = 256;
  size_t all = 0;
  for (const size_t size : sizes) all += (size + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = nullptr;
  CheckCuda(cudaMalloc(&memory, all), "allocating the arrays of a call");
  memory_.reset(static_cast<std::byte*>(memory));
  CheckCuda(cudaMemset(memory, 0x7b, all), "filling the arrays of a call");
  CheckCuda(cudaDeviceSynchronize(), "waiting for filled arrays");
  CheckCuda(cudaStreamSynchronize(nullptr), "filling the arrays of a call");
  void* at[std::size(sizes)];
  size_t used = 0;
  for (size_t i = 0; i < std::size(sizes); ++i) {
    at[i] = sizes[i] == 0 ? nullptr : memory_.get() + used;
    used += (sizes[i] + kAlignment - 1) / kAlignment * kAlignment;
  }
  params_.layer = call.layer;
  params_.num_tokens = call.tokens;
  params_.out_dtype = call.out_dtype;
  params_.q = at[0];
  params_.k_new = at[1];
  params_.v_new = at[2];
  params_.out = at[3];
  params_.lse = static_cast<float*>(at[4]);
  params_.verdict = static_cast<int32_t*>(at[5]);
  params_.error = static_cast<float*>(at[6]);
  params_.selected = static_cast<int32_t*>(at[7]);
  params_.fetched = static_cast<int32_t*>(at[8]);
  params_.looks = static_cast<int32_t*>(at[9]);
  params_.middle = static_cast<int64_t*>(at[10]);
}

void DeviceCall::Upload(Call& call, cudaStream_t stream) const {
  call.Params();  // fills the byte arrays
  const auto send = [&](const void* to, const std::vector<std::byte>& from) {
    Copy(static_cast<std::byte*>(const_cast<void*>(to)), from.data(), from.size(),
         cudaMemcpyHostToDevice, stream);
  };
  send(params_.q, call.q_bytes);
  send(params_.k_new, call.k_bytes);
  send(params_.v_new, call.v_bytes);
}

void DeviceCall::Download(Call& call, cudaStream_t stream) const {
  Fetch(call.out, static_cast<const std::byte*>(params_.out), stream);
  Fetch<float>(call.lse, params_.lse, stream);
  Fetch<int32_t>(call.verdict, params_.verdict, stream);
  Fetch<float>(call.error, params_.error, stream);
  Fetch<int32_t>(call.selected, params_.selected, stream);
  Fetch<int32_t>(call.fetched, params_.fetched, stream);
  Fetch<int32_t>(call.looks, params_.looks, stream);
  Fetch<int64_t>(call.middle, params_.middle, stream);
  CheckCuda(cudaStreamSynchronize(stream), "waiting for a call");
}

}  // namespace vattn::test
