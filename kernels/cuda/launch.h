// Operations of the CUDA backend. Each enqueues on `stream` (a cudaStream_t) and returns a
// cudaError_t as a number, 0 for success. Nothing here allocates or waits.
#ifndef VATTN_KERNELS_CUDA_LAUNCH_H_
#define VATTN_KERNELS_CUDA_LAUNCH_H_

#include "kernels/cuda/params.h"

namespace vattn::cuda {

// DeviceStorage::tiles_in_flight for the current device.
int TilesInFlight(const Storage& storage);

// How `groups` groups are answered on the current device; team 0: the rows do not fit it.
AnswerShape ShapeAnswer(const DeviceStorage& storage, int group_heads, int groups);

// One decode step of one layer for every group: new rows, scan, plan, draws, certificate, outputs.
int Decode(const StepParams& params, const AnswerShape& shape, int multiprocessors, Stream stream);

// The same of a slice of a context, cut where ranks exchange records (kernels/cpu/ranks.h). LookOn counts
// in *params.ranks.again what is open. first: the looks begin.
int Forecast(const StepParams& params, int multiprocessors, Stream stream);
int LookOn(const StepParams& params, const AnswerShape& shape, bool first, Stream stream);
// As cpu::Merge; arrays and Promise::quantile in device memory.
int Merge(const MergeParams& params, Stream stream);

// Rows of tokens [begin, begin + tokens) from the host pool to `to`, [kv_heads][tokens][row_bytes] with
// to_stride bytes between KV heads; block ids [kv_heads][blocks_stride] in device memory.
int FetchRows(const Storage& host, const int32_t* blocks, int64_t blocks_stride, int32_t kv_heads,
              int64_t begin, int64_t tokens, std::byte* to, int64_t to_stride, Stream stream);
// Rows in fp16 or bf16 with at most kMaxPrefillDim elements of K and of V.
int Prefill(const PrefillChunk& chunk, Stream stream);

// Codes of `count` items in device memory, `most` tokens at most in one of them.
int Encode(const DeviceStorage& storage, const EncodeItem* items, int count, int64_t most,
           Stream stream);
// Sinks and ring of `count` items in device memory.
int LoadFixed(const DeviceStorage& storage, const FixedItem* items, int count, Stream stream);
// Codes of the listed blocks from the host copy to the device copy.
int LoadCodes(const DeviceStorage& storage, const int32_t* blocks, int64_t count, Stream stream);
// Rows of the listed blocks leave the hot set.
int ForgetBlocks(const HotSetRef& hot, const int32_t* blocks, int64_t count, Stream stream);
// *address[i] = value[i] for 32-bit words.
struct Patch {
  int32_t* address = nullptr;
  int64_t value = 0;
};
int ApplyPatches(const Patch* patches, int64_t count, Stream stream);
// cpu::Write with k and v in device memory: block ids [kv_heads] in device memory.
int Write(const WriteParams& params, Stream stream);

// Bytes of working memory of a group, and its parts carved from `memory` (null: nothing is carved).
size_t CarveScratch(const Storage& storage, const Promise& promise, int64_t tokens, int group_heads,
                    int team, std::byte* memory, GroupScratch& out);

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_LAUNCH_H_
