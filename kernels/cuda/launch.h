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
// in *params.slice.again what is open. first: the looks begin.
int Forecast(const StepParams& params, int multiprocessors, Stream stream);
int LookOn(const StepParams& params, const AnswerShape& shape, bool first, Stream stream);
// As cpu::Merge; arrays and Promise::quantile in device memory.
int Merge(const MergeParams& params, Stream stream);

// PrefillChunk::splits that fill a device with so many query tokens.
int PrefillSplits(int64_t count, int32_t group_heads, int32_t kv_heads, int multiprocessors);
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
// Parts of `bytes` each, an even number, at offsets [count] from base, one behind the other to `to`.
int Gather(const std::byte* base, const int64_t* offsets, int64_t count, int64_t bytes,
           std::byte* to, Stream stream);
// cpu::Write with k and v in device memory: block ids [kv_heads] in device memory.
int Write(const WriteParams& params, Stream stream);

// An engine's pool (kernels/cuda/paged.cu). Rows to slots, which leave the hot set and count a write
// in `writes` [slots]; then their codes. Keys of hot rows are hot_key + KV head * slots + slot.
int WriteSlots(const DeviceStorage& storage, const WriteSlotsParams& params, const HotSetRef& hot,
               int64_t hot_key, uint32_t* writes, Stream stream);
int EncodeSlots(const DeviceStorage& storage, const WriteSlotsParams& params, Stream stream);
// Rows of tokens [begin, begin + tokens) of one request to `to`, [kv_heads][tokens] as they lie on the
// device, with to_stride bytes between KV heads; block ids in device memory.
int FetchRows(const DeviceStorage& storage, const int32_t* blocks, int32_t kv_heads, int64_t begin,
              int64_t tokens, std::byte* to, int64_t to_stride, Stream stream);
// Checks the requests of a step and makes its groups, for every layer.
int BeginPagedStep(const PagedStepParams& params, Stream stream);

// Bytes of working memory of a group, and its parts carved from `memory` (null: nothing is carved).
size_t CarveScratch(const Storage& storage, const Promise& promise, int64_t tokens, int group_heads,
                    int team, std::byte* memory, GroupScratch& out);

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_LAUNCH_H_
