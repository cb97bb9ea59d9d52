// Prompts whose keys, values and queries lie in device memory: the same answers as from host
// memory.
#include <gtest/gtest.h>

#include <cstring>

#include "tests/cuda/cuda_calls.h"

namespace vattn::test {
namespace {

// Device memory with a copy of the elements.
class OnDevice {
 public:
  explicit OnDevice(const std::vector<std::byte>& bytes) {
    CheckCuda(cudaMalloc(&memory_, bytes.size()), "allocating");
    CheckCuda(cudaMemcpy(memory_, bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "copying");
    CheckCuda(cudaStreamSynchronize(nullptr), "waiting for the copy");
  }
  ~OnDevice() { cudaFree(memory_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  const void* data() const { return memory_; }

 private:
  void* memory_ = nullptr;
};

std::vector<std::byte> Elements(size_t count, uint32_t seed) {
  std::vector<std::byte> bytes(count * 2);
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    // bf16 numbers from -2 to 2, spread over sign and mantissa.
    const uint16_t bits = static_cast<uint16_t>((seed >> 16 & 0x80ff) | 0x3f00);
    std::memcpy(bytes.data() + 2 * i, &bits, 2);
  }
  return bytes;
}

// A step's answer after a prompt of two chunks, given as pointers by `place`.
template <class Place>
Call Answer(const Shape& shape, int64_t strided, Place&& place) {
  constexpr int64_t kChunk = 900, kQueries = 64;
  vattn_options options = OptionsFor(shape);
  options.backend = VATTN_BACKEND_CUDA;
  const Runtime runtime(options);
  Sequence sequence(runtime);
  for (uint32_t chunk = 0; chunk < 2; ++chunk) {
    vattn_append_params params;
    vattn_append_params_init(&params, sizeof(params));
    const int64_t row = int64_t{shape.kv_heads} * shape.dim_k + strided;
    const auto k = place(Elements(static_cast<size_t>(kChunk * row), 1 + chunk));
    const auto v = place(Elements(static_cast<size_t>(kChunk * row), 11 + chunk));
    const auto q =
        place(Elements(static_cast<size_t>(kQueries * shape.q_heads * shape.dim_k), 21 + chunk));
    params.num_tokens = kChunk;
    params.num_queries = kQueries;
    params.k = k->data(), params.v = v->data(), params.q = q->data();
    params.k_token_stride = params.v_token_stride = row;
    params.k_head_stride = params.v_head_stride = shape.dim_k;
    EXPECT_EQ(vattn_append(sequence.get(), &params), VATTN_OK) << vattn_last_error();
  }
  Batch batch(runtime, 1);
  batch.Set(0, sequence);
  Call call(shape, 1, 0);
  std::mt19937_64 engine(7);
  call.Fill(engine, 1, 1);
  batch.BeginStep(1);
  batch.Attend(call.Params());
  return call;
}

TEST(CudaAppendTest, DeviceMemoryIsAsHostMemory) {
  SKIP_WITHOUT_DEVICE();
  const Shape shape = {8, 2, 64, 64, false, VATTN_BF16};
  for (const int64_t strided : {0, 16, 1}) {  // 1: rows that are not aligned to 16 bytes
    const Call host = Answer(shape, strided, [](std::vector<std::byte> bytes) {
      return std::make_unique<std::vector<std::byte>>(std::move(bytes));
    });
    const Call device = Answer(shape, strided, [](const std::vector<std::byte>& bytes) {
      return std::make_unique<OnDevice>(bytes);
    });
    EXPECT_EQ(host.out, device.out) << "stride " << strided;
    EXPECT_EQ(host.selected, device.selected);
    EXPECT_GT(host.selected[0], 0);
    EXPECT_LT(host.selected[0], host.middle[0]);
  }
}

}  // namespace
}  // namespace vattn::test
