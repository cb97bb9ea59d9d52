#include "bench/cli/handles.h"

#include <string>

#include "bench/cli/dtype.h"
#include "bench/cli/failure.h"

namespace vattn::bench {

void Check(vattn_code code, const char* call) {
  if (code == VATTN_OK) return;
  throw Failure(std::string(call) + ": " + vattn_code_name(code) + ": " + vattn_last_error());
}

Runtime CreateRuntime(const vattn_options& options) {
  vattn_runtime* runtime = nullptr;
  const vattn_code code = vattn_runtime_create(&options, &runtime);
  if (code == VATTN_INVALID_ARGUMENT) throw UsageError(vattn_last_error());
  Check(code, "vattn_runtime_create");
  return Runtime(runtime);
}

Sequence CreateSequence(vattn_runtime* runtime, uint64_t id) {
  vattn_sequence_options options;
  vattn_sequence_options_init(&options, sizeof(options));
  options.id = id;
  vattn_sequence* sequence = nullptr;
  Check(vattn_sequence_create(runtime, &options, &sequence), "vattn_sequence_create");
  return Sequence(sequence);
}

Batch CreateBatch(vattn_runtime* runtime, int32_t slots) {
  vattn_batch* batch = nullptr;
  Check(vattn_batch_create(runtime, slots, &batch), "vattn_batch_create");
  return Batch(batch);
}

int64_t RowBytes(const vattn_options& options) {
  const int64_t elements =
      options.head_dim_k + (options.shared_kv ? 0 : static_cast<int64_t>(options.head_dim_v));
  return (elements * static_cast<int64_t>(ElementBytes(options.dtype)) + 127) / 128 * 128;
}

uint64_t HostBytes(const vattn_options& options, int64_t tokens, int64_t sequences) {
  constexpr int64_t kBlockTokens = 256, kSpareBlocks = 2, kSlack = int64_t{64} << 20;
  const int64_t codes = options.index_bytes + options.value_bits * options.head_dim_v / 8 + 64;
  const int64_t blocks = (tokens + kBlockTokens - 1) / kBlockTokens + kSpareBlocks;
  const int64_t per_layer =
      blocks * kBlockTokens * options.num_kv_heads * (RowBytes(options) + codes);
  return static_cast<uint64_t>(sequences * options.num_layers * per_layer + kSlack);
}

}  // namespace vattn::bench
