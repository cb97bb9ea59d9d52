#include <algorithm>
#include <numeric>

#include "bench/baselines/baseline_data.h"
#include "bench/baselines/baseline_plan.h"
#include "bench/baselines/cuda_baselines.h"
#include "bench/cli/statistics.h"
#include "bench/cuda/cuda_timing.h"

namespace vattn::bench {
namespace {

// Rows lie as [sequence][kv_head][token].
struct UnitSpan {
  int64_t first = 0;  // row
  int64_t tokens = 0;
};

std::vector<UnitSpan> Units(const BaselineShape& shape) {
  std::vector<UnitSpan> units;
  int64_t row = 0;
  for (const int64_t tokens : shape.lengths) {
    for (int head = 0; head < shape.kv_heads; ++head, row += tokens) units.push_back({row, tokens});
  }
  return units;
}

AttendPlan::UnitRows HostRows(const BaselineShape& shape, const std::byte* rows) {
  return [&shape, rows](int32_t unit) {
    const UnitSpan span = Units(shape)[unit];
    std::vector<const uint16_t*> list;
    for (int64_t i = 0; i < span.tokens; ++i) {
      list.push_back(
          reinterpret_cast<const uint16_t*>(rows + (span.first + i) * shape.row_bytes()));
    }
    return list;
  };
}

}  // namespace

int64_t BaselineShape::rows() const {
  return kv_heads * std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

struct DenseOnDevice::Impl {
  explicit Impl(const BaselineShape& s)
      : shape(s),
        rows(shape.bytes() / 8),
        plan(MakeItems(), static_cast<int32_t>(Units(shape).size()), shape.group, shape.head_dim,
             shape.seed + 1),
        stream(MakeStream()) {
    CheckCuda(FillData(rows.data(), rows.size(), shape.seed, stream.get()), "FillData");
  }

  std::vector<AttendItem> MakeItems() const {
    const int32_t step = shape.item_tokens > 0 ? shape.item_tokens : ItemTokens(shape.rows());
    const auto* base = reinterpret_cast<const std::byte*>(rows.data());
    std::vector<AttendItem> items;
    int32_t unit = 0;
    for (const UnitSpan& span : Units(shape)) {
      for (int64_t i = 0; i < span.tokens; i += step) {
        items.push_back({.rows = base + (span.first + i) * shape.row_bytes(),
                         .tokens = static_cast<int32_t>(std::min<int64_t>(step, span.tokens - i)),
                         .unit = unit});
      }
      ++unit;
    }
    return items;
  }

  void Enqueue() const {
    plan.Attend(0, plan.num_items(), stream.get());
    plan.Merge(stream.get());
  }

  const BaselineShape shape;
  DeviceArray<uint64_t> rows;
  AttendPlan plan;
  CudaStream stream;
};

DenseOnDevice::DenseOnDevice(const BaselineShape& shape) : impl_(std::make_unique<Impl>(shape)) {}
DenseOnDevice::~DenseOnDevice() = default;

double DenseOnDevice::RunMicroseconds(int repetitions) {
  return MedianMicroseconds(repetitions, impl_->stream.get(), [&] { impl_->Enqueue(); });
}

double DenseOnDevice::Check() {
  impl_->Enqueue();
  CheckCuda(cudaStreamSynchronize(impl_->stream.get()), "attention");
  std::vector<uint64_t> host(impl_->rows.size());
  for (size_t i = 0; i < host.size(); ++i) host[i] = DataWord(impl_->shape.seed, i);
  return impl_->plan.RelativeError(
      HostRows(impl_->shape, reinterpret_cast<const std::byte*>(host.data())));
}

struct DenseStreamed::Impl {
  struct Chunk {
    int64_t first = 0, bytes = 0;  // of the host rows
    int32_t first_item = 0, end_item = 0;
  };

  Impl(const BaselineShape& s, int64_t chunk_bytes)
      : shape(s),
        chunk_rows(std::max<int64_t>(1, chunk_bytes / shape.row_bytes())),
        host(shape.bytes(), shape.threads,
             [&](uint64_t* words, size_t first, size_t count) {
               for (size_t i = 0; i < count; ++i) words[i] = DataWord(shape.seed, first + i);
             }),
        buffers(2 * chunk_rows * shape.row_bytes()),
        plan(MakeItems(), static_cast<int32_t>(Units(shape).size()), shape.group, shape.head_dim,
             shape.seed + 1),
        copy_stream(MakeStream()),
        stream(MakeStream()),
        begin(MakeEvent()) {
    for (int i = 0; i < 2; ++i) {
      filled[i] = MakeEvent();
      drained[i] = MakeEvent();
    }
  }

  std::byte* Buffer(size_t chunk) const {
    return buffers.data() + chunk % 2 * chunk_rows * shape.row_bytes();
  }

  // Fills `chunks` as well.
  std::vector<AttendItem> MakeItems() {
    constexpr int32_t kItemTokens = 1024;
    std::vector<AttendItem> items;
    const std::vector<UnitSpan> units = Units(shape);
    int32_t unit = 0;
    for (int64_t first = 0; first < shape.rows(); first += chunk_rows) {
      const int64_t end = std::min(first + chunk_rows, shape.rows());
      Chunk chunk = {.first = first * shape.row_bytes(),
                     .bytes = (end - first) * shape.row_bytes()};
      chunk.first_item = static_cast<int32_t>(items.size());
      for (int64_t row = first; row < end;) {
        const int64_t unit_end = units[unit].first + units[unit].tokens;
        const int64_t stop = std::min({end, unit_end, row + kItemTokens});
        items.push_back({.rows = Buffer(chunks.size()) + (row - first) * shape.row_bytes(),
                         .tokens = static_cast<int32_t>(stop - row),
                         .unit = unit});
        row = stop;
        if (row == unit_end) ++unit;
      }
      chunk.end_item = static_cast<int32_t>(items.size());
      chunks.push_back(chunk);
    }
    return items;
  }

  void Enqueue() const {
    CheckCuda(cudaEventRecord(begin.get(), stream.get()), "cudaEventRecord");
    CheckCuda(cudaStreamWaitEvent(copy_stream.get(), begin.get()), "cudaStreamWaitEvent");
    for (size_t i = 0; i < chunks.size(); ++i) {
      const Chunk& chunk = chunks[i];
      if (i >= 2) {
        CheckCuda(cudaStreamWaitEvent(copy_stream.get(), drained[i % 2].get()),
                  "cudaStreamWaitEvent");
      }
      CheckCuda(cudaMemcpyAsync(Buffer(i), host.data() + chunk.first, chunk.bytes,
                                cudaMemcpyHostToDevice, copy_stream.get()),
                "cudaMemcpyAsync");
      CheckCuda(cudaEventRecord(filled[i % 2].get(), copy_stream.get()), "cudaEventRecord");
      CheckCuda(cudaStreamWaitEvent(stream.get(), filled[i % 2].get()), "cudaStreamWaitEvent");
      plan.Attend(chunk.first_item, chunk.end_item, stream.get());
      CheckCuda(cudaEventRecord(drained[i % 2].get(), stream.get()), "cudaEventRecord");
    }
    plan.Merge(stream.get());
  }

  const BaselineShape shape;
  const int64_t chunk_rows;
  HostRegion host;
  DeviceArray<std::byte> buffers;
  std::vector<Chunk> chunks;
  AttendPlan plan;
  CudaStream copy_stream, stream;
  CudaEvent begin, filled[2], drained[2];
};

DenseStreamed::DenseStreamed(const BaselineShape& shape, int64_t chunk_bytes)
    : impl_(std::make_unique<Impl>(shape, chunk_bytes)) {}
DenseStreamed::~DenseStreamed() = default;

double DenseStreamed::RunMicroseconds(int repetitions) {
  return MedianMicroseconds(repetitions, impl_->stream.get(), [&] { impl_->Enqueue(); });
}

double DenseStreamed::Check() {
  impl_->Enqueue();
  CheckCuda(cudaStreamSynchronize(impl_->stream.get()), "attention");
  return impl_->plan.RelativeError(HostRows(impl_->shape, impl_->host.data()));
}

double DeviceCopyGbps() {
  constexpr size_t kBytes = size_t{2} << 30;
  const DeviceArray<std::byte> from(kBytes), to(kBytes);
  const CudaStream stream = MakeStream();
  CheckCuda(cudaMemsetAsync(from.data(), 1, kBytes, stream.get()), "cudaMemsetAsync");
  const double us = MedianMicroseconds(/*repetitions=*/7, stream.get(), [&] {
    CheckCuda(
        cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, stream.get()),
        "cudaMemcpyAsync");
  });
  return 2. * kBytes / us / 1e3;
}

}  // namespace vattn::bench
