// A decode step as its stages one after the other, and the working memory that they share.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/scratch.cuh"
#include "kernels/cuda/stages.h"
#include "kernels/cuda/team.cuh"
#include "kernels/cuda/values.h"

namespace vattn::cuda {

size_t CarveScratch(const Storage& s, const Promise& promise, int64_t tokens, int group_heads,
                    int team, std::byte* memory, GroupScratch& w) {
  return CarveGroup(s, promise, tokens, group_heads, team, memory, w);
}

int TilesInFlight(const Storage& storage) {
  int device = 0, most = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    cudaGetLastError();
    return kLeastTiles;
  }
  // Shared memory beside the tiles: queries or outputs, and what kernels declare.
  constexpr int kRestBytes = 68 * 1024;
  const int tiles = (most - kRestBytes) / TileBytes(MakeTileShape(storage.row.row_bytes));
  return tiles < kLeastTiles ? kLeastTiles : tiles > kMostTiles ? kMostTiles : tiles;
}

AnswerShape ShapeAnswer(const DeviceStorage& storage, int group_heads, int groups) {
  return DispatchDType(storage.host.row.dtype, [&]<DType kType>() {
    return AnswerOf<kType>::Shape(storage, group_heads, groups);
  });
}

int Answer(const StepParams& p, const AnswerShape& shape, Stream stream) {
  return DispatchDType(p.storage.host.row.dtype,
                       [&]<DType kType>() { return AnswerOf<kType>::Launch(p, shape, stream); });
}

namespace {

// Predicted scores or, where rows are sampled, estimates.
int ScoreMiddle(const StepParams& p, int multiprocessors, Stream stream) {
  const bool sampled = p.promise.policy == Policy::kVerified,
             scored = ScoredBeforeScan(p.promise.index);
  int error = cudaSuccess;
  if (scored) {
    error = p.promise.index == IndexKind::kExact ? ScoreRows(p, multiprocessors, stream)
                                                 : TakeScores(p, multiprocessors, stream);
  }
  if (error == cudaSuccess && (sampled || !scored)) error = Scan(p, multiprocessors, stream);
  return error;
}

}  // namespace

int Decode(const StepParams& p, const AnswerShape& shape, int multiprocessors, Stream stream) {
  int error = Prepare(p, stream);
  const bool chosen = p.promise.policy != Policy::kDense && p.task != Task::kAttendSelected;
  const bool sampled = chosen && p.promise.policy == Policy::kVerified;
  if (error == cudaSuccess && chosen) error = ScoreMiddle(p, multiprocessors, stream);
  const bool coded = sampled && p.storage.host.value_bits > 0 && p.task == Task::kDecode;
  if (error == cudaSuccess && coded) error = SumValues(p, stream);
  if (error == cudaSuccess && sampled) error = PlanDraw(p, shape.team, stream);
  if (error == cudaSuccess && sampled) error = Predict(p, stream);
  if (error == cudaSuccess) error = Answer(p, shape, stream);
  return error;
}

int Forecast(const StepParams& p, int multiprocessors, Stream stream) {
  int error = Prepare(p, stream);
  if (error == cudaSuccess && p.promise.policy == Policy::kVerified)
    error = ScoreMiddle(p, multiprocessors, stream);
  if (error == cudaSuccess) error = WriteForecasts(p, stream);
  return error;
}

int LookOn(const StepParams& p, const AnswerShape& shape, bool first, Stream stream) {
  int error = DecideLooks(p, first, stream);
  const bool plans = first && p.promise.policy == Policy::kVerified;
  if (error == cudaSuccess && plans) error = PlanDraw(p, shape.team, stream);
  if (error == cudaSuccess && plans) error = Predict(p, stream);
  if (error != cudaSuccess) return error;
  return DispatchDType(p.storage.host.row.dtype,
                       [&]<DType kType>() { return LookOf<kType>::Launch(p, shape, stream); });
}

}  // namespace vattn::cuda
