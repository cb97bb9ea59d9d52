// A build without CUDA: the operations that no device ever reaches.
#include "kernels/cuda/launch.h"

namespace vattn::cuda {

constexpr int kNoDevice = 100;  // cudaErrorNoDevice

int TilesInFlight(const Storage&) { return 0; }
AnswerShape ShapeAnswer(const DeviceStorage&, int, int) { return {}; }
int Decode(const StepParams&, const AnswerShape&, int, Stream) { return kNoDevice; }
int Forecast(const StepParams&, int, Stream) { return kNoDevice; }
int LookOn(const StepParams&, const AnswerShape&, bool, Stream) { return kNoDevice; }
int Merge(const MergeParams&, Stream) { return kNoDevice; }
int PrefillSplits(int64_t, int32_t, int32_t, int) { return 1; }
int Prefill(const PrefillChunk&, Stream) { return kNoDevice; }
int Encode(const DeviceStorage&, const EncodeItem*, int, int64_t, Stream) { return kNoDevice; }
int LoadFixed(const DeviceStorage&, const FixedItem*, int, Stream) { return kNoDevice; }
int LoadCodes(const DeviceStorage&, const int32_t*, int64_t, Stream) { return kNoDevice; }
int ForgetBlocks(const HotSetRef&, const int32_t*, int64_t, Stream) { return kNoDevice; }
int ApplyPatches(const Patch*, int64_t, Stream) { return kNoDevice; }
int Gather(const std::byte*, const int64_t*, int64_t, int64_t, std::byte*, Stream) {
  return kNoDevice;
}
int Write(const WriteParams&, Stream) { return kNoDevice; }
int WriteSlots(const DeviceStorage&, const WriteSlotsParams&, const HotSetRef&, int64_t, uint32_t*,
               Stream) {
  return kNoDevice;
}
int EncodeSlots(const DeviceStorage&, const WriteSlotsParams&, Stream) { return kNoDevice; }
int FetchRows(const DeviceStorage&, const int32_t*, int32_t, int64_t, int64_t, std::byte*, int64_t,
              Stream) {
  return kNoDevice;
}
int BeginPagedStep(const PagedStepParams&, Stream) { return kNoDevice; }
size_t CarveScratch(const Storage&, const Promise&, int64_t, int, int, std::byte*, GroupScratch&) {
  return 0;
}

}  // namespace vattn::cuda
