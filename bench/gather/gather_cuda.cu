#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <random>

#include "bench/cli/statistics.h"
#include "bench/cuda/cuda_memory.h"
#include "bench/cuda/cuda_timing.h"
#include "bench/gather/gather.h"
#include "bench/gather/gather_walks.h"
#include "bench/gather/rows.h"

namespace vattn::bench {
namespace {

constexpr uint64_t kLargeCopy = uint64_t{1} << 30;
constexpr int kPoison = 0xee;

std::string DeviceName() {
  int device = 0;
  cudaDeviceProp properties;
  CheckCuda(cudaGetDevice(&device), "cudaGetDevice");
  CheckCuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return properties.name;
}

int Multiprocessors() {
  int device = 0, count = 0;
  CheckCuda(cudaGetDevice(&device), "cudaGetDevice");
  CheckCuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
            "cudaDeviceGetAttribute");
  return count;
}

// k different tokens below n in rising order.
std::vector<int64_t> DrawTokens(int64_t n, int64_t k, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int64_t> token(0, n - 1);
  std::vector<int64_t> tokens;
  while (static_cast<int64_t>(tokens.size()) < k) {
    while (static_cast<int64_t>(tokens.size()) < k) tokens.push_back(token(random));
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  }
  return tokens;
}

class GatherRig {
 public:
  explicit GatherRig(const GatherShape& shape)
      : shape_(shape),
        region_(shape.region_bytes(), shape.threads,
                [](uint64_t* words, size_t first, size_t count) {
                  for (size_t i = 0; i < count; ++i) words[i] = (first + i + 1) * kPattern;
                }),
        wrong_(1),
        stream_(MakeStream()),
        timer_(stream_.get()) {
    uint64_t most = LargeCopyBytes();
    for (const double share : shape.shares) {
      most = std::max<uint64_t>(most, shape.kv_heads * shape.RowsPerHead(share) * shape.row_bytes);
    }
    destination_ = DeviceArray<std::byte>(most);
  }

  uint64_t LargeCopyBytes() const { return std::min(kLargeCopy, shape_.region_bytes()); }

  double LargeCopyGbps() {
    std::vector<double> us;
    for (int i = 0; i <= shape_.repetitions; ++i) {
      const uint64_t room = shape_.region_bytes() - LargeCopyBytes();
      us.push_back(Time(Contiguous(LargeCopyBytes() / shape_.row_bytes, room, i),
                        [&](const RowList& list) { return Copy(list); }));
    }
    us.erase(us.begin());
    CheckWords("memcpy");
    return static_cast<double>(LargeCopyBytes()) / Quantile(us, .5) / 1e3;
  }

  // New rows for a share. The first set warms up and does not count.
  void Draw(double share) {
    share_ = share;
    const int64_t per_head = shape_.RowsPerHead(share);
    rows_ = per_head * shape_.kv_heads;
    const int64_t sets = shape_.repetitions + 1;
    std::vector<uint64_t> sorted(sets * rows_), random(sets * rows_);
    ParallelFor(shape_.threads, sets, [&](int64_t set) {
      uint64_t* row = sorted.data() + set * rows_;
      for (int head = 0; head < shape_.kv_heads; ++head) {
        const int64_t arena = ((set % shape_.layers) * shape_.kv_heads + head) * shape_.tokens;
        const uint64_t seed = (shape_.seed * 1000003 + set) * 1000003 + head;
        for (const int64_t token : DrawTokens(shape_.tokens, per_head, seed)) {
          *row++ = region_.device_address() + (arena + token) * shape_.row_bytes;
        }
      }
      uint64_t* copy = random.data() + set * rows_;
      std::copy_n(sorted.data() + set * rows_, rows_, copy);
      std::shuffle(copy, copy + rows_, std::mt19937_64(shape_.seed * 7919 + set));
    });
    sorted_ = DeviceArray<uint64_t>(sorted);
    random_ = DeviceArray<uint64_t>(random);
    count_ = DeviceArray<int32_t>(std::vector<int32_t>{static_cast<int32_t>(rows_)});
  }

  GatherLine RunCopy() {
    const uint64_t bytes = rows_ * shape_.row_bytes;
    return Run(
        "memcpy", "contiguous", 0,
        [&](int set) { return Contiguous(rows_, shape_.region_bytes() - bytes, set); },
        [&](const RowList& list) { return Copy(list); });
  }

  GatherLine RunBulk(bool in_order, int blocks) {
    return Run("bulk", in_order ? "token" : "random", blocks, Listed(in_order),
               [&](const RowList& list) {
                 return cuda::Gather({.source = list.source,
                                      .count = count_.data(),
                                      .destination = list.destination,
                                      .capacity = static_cast<int32_t>(list.rows),
                                      .row_bytes = list.row_bytes,
                                      .num_blocks = blocks},
                                     stream_.get());
               });
  }

  GatherLine RunWarps(int blocks) {
    return Run("warp per row", "random", blocks, Listed(/*in_order=*/false),
               [&](const RowList& list) { return WalkByWarps(list, blocks, stream_.get()); });
  }

  GatherLine RunTeams(int team) {
    return Run("team", "token", team * shape_.kv_heads, Listed(/*in_order=*/true),
               [&](const RowList& list) {
                 return WalkByTeams(list, shape_.kv_heads, team, stream_.get());
               });
  }

 private:
  using MakeList = std::function<RowList(int set)>;
  using Move = std::function<int(const RowList&)>;

  RowList MakeRowList(const uint64_t* source, uint64_t first, int64_t rows) const {
    return {.source = source,
            .first = first,
            .rows = rows,
            .row_bytes = shape_.row_bytes,
            .destination = destination_.data()};
  }

  MakeList Listed(bool in_order) const {
    const uint64_t* source = in_order ? sorted_.data() : random_.data();
    return [=, this](int set) { return MakeRowList(source + set * rows_, 0, rows_); };
  }

  // Rows without gaps from somewhere in the first `room` bytes of the region on.
  RowList Contiguous(int64_t rows, uint64_t room, int set) const {
    std::mt19937_64 random(shape_.seed * 104729 + set);
    const uint64_t places = room / shape_.row_bytes + 1;
    return MakeRowList(nullptr, region_.device_address() + random() % places * shape_.row_bytes,
                       rows);
  }

  int Copy(const RowList& list) const {
    return cudaMemcpyAsync(list.destination,
                           region_.data() + (list.first - region_.device_address()),
                           list.rows * list.row_bytes, cudaMemcpyHostToDevice, stream_.get());
  }

  double Time(const RowList& list, const Move& move) {
    CheckCuda(cudaMemsetAsync(list.destination, kPoison, list.rows * list.row_bytes, stream_.get()),
              "cudaMemsetAsync");
    timer_.Start();
    CheckCuda(move(list), "moving rows");
    const double us = timer_.Stop();
    if (!counting_) {
      CheckCuda(cudaMemsetAsync(wrong_.data(), 0, wrong_.bytes(), stream_.get()),
                "cudaMemsetAsync");
      counting_ = true;
    }
    CheckCuda(CountWrongWords(list, region_.device_address(), wrong_.data(), stream_.get()),
              "comparing rows");
    return us;
  }

  // Of all repetitions since the last call.
  void CheckWords(const std::string& what) {
    CheckCuda(cudaStreamSynchronize(stream_.get()), what);
    const unsigned long long wrong = wrong_.Download()[0];
    counting_ = false;
    if (wrong > 0) throw Failure(what + ": " + std::to_string(wrong) + " wrong words arrived");
  }

  GatherLine Run(const std::string& mover, const std::string& order, int blocks,
                 const MakeList& make_list, const Move& move) {
    std::vector<double> us;
    for (int set = 0; set <= shape_.repetitions; ++set) us.push_back(Time(make_list(set), move));
    us.erase(us.begin());
    CheckWords(mover + ", " + order + ", " + std::to_string(blocks) + " blocks");
    const double bytes = static_cast<double>(rows_) * shape_.row_bytes;
    GatherLine line = {
        .share = share_, .rows = rows_, .mover = mover, .order = order, .blocks = blocks};
    line.us_p50 = Quantile(us, .5);
    line.us_min = *std::min_element(us.begin(), us.end());
    line.gbps_p50 = bytes / line.us_p50 / 1e3;
    line.gbps_max = bytes / line.us_min / 1e3;
    return line;
  }

  const GatherShape shape_;
  HostRegion region_;
  DeviceArray<unsigned long long> wrong_;
  DeviceArray<std::byte> destination_;
  DeviceArray<uint64_t> sorted_, random_;  // [repetitions + 1][rows_] addresses
  DeviceArray<int32_t> count_;
  CudaStream stream_;
  DeviceTimer timer_;
  double share_ = 0;
  int64_t rows_ = 0;
  bool counting_ = false;
};

}  // namespace

int64_t GatherShape::RowsPerHead(double share) const {
  return std::clamp<int64_t>(std::llround(share * static_cast<double>(tokens)), 1, tokens);
}

void RequireGatherDevice() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return;
  throw UsageError(std::string("gather: no CUDA device here: ") +
                   (error == cudaSuccess ? "none found" : cudaGetErrorString(error)));
}

GatherFigures MeasureGather(const GatherShape& shape, Progress* progress) {
  GatherFigures figures;
  figures.device = DeviceName();
  progress->Begin("filling and registering the region");
  const auto start = std::chrono::steady_clock::now();
  GatherRig rig(shape);
  figures.fill_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  figures.large_copy_bytes = rig.LargeCopyBytes();
  figures.large_copy_gbps = rig.LargeCopyGbps();
  progress->Begin("shares");
  for (size_t i = 0; i < shape.shares.size(); ++i) {
    progress->Count(static_cast<int64_t>(i), static_cast<int64_t>(shape.shares.size()));
    rig.Draw(shape.shares[i]);
    figures.lines.push_back(rig.RunCopy());
    for (const int blocks : {8, 16, 24, 32}) figures.lines.push_back(rig.RunBulk(true, blocks));
    figures.lines.push_back(rig.RunBulk(false, cuda::kDefaultGatherBlocks));
    for (const int blocks : {1, Multiprocessors()}) figures.lines.push_back(rig.RunWarps(blocks));
    for (const int team : {1, 2, 4, 8, 16}) figures.lines.push_back(rig.RunTeams(team));
  }
  progress->Clear();
  return figures;
}

}  // namespace vattn::bench
