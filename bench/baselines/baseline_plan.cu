#include <algorithm>
#include <cmath>

#include "bench/baselines/baseline_data.h"
#include "bench/baselines/baseline_plan.h"

namespace vattn::bench {
namespace {

std::vector<int32_t> FirstItems(const std::vector<AttendItem>& items, int32_t units) {
  std::vector<int32_t> first(units + 1, static_cast<int32_t>(items.size()));
  for (int32_t i = static_cast<int32_t>(items.size()) - 1; i >= 0; --i) first[items[i].unit] = i;
  return first;
}

// Four bf16 numbers a word.
std::vector<uint64_t> MakeQueries(int64_t elements, uint64_t seed) {
  std::vector<uint64_t> words(elements / 4);
  for (size_t i = 0; i < words.size(); ++i) words[i] = DataWord(seed, i);
  return words;
}

__global__ void FillKernel(uint64_t* words, int64_t count, uint64_t seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    words[i] = DataWord(seed, i);
  }
}

}  // namespace

int FillData(uint64_t* words, int64_t count, uint64_t seed, cudaStream_t stream) {
  FillKernel<<<1024, 256, 0, stream>>>(words, count, seed);
  return cudaGetLastError();
}

AttendPlan::AttendPlan(const std::vector<AttendItem>& items, int32_t units, int32_t group,
                       int32_t head_dim, uint64_t seed)
    : units_(units),
      group_(group),
      head_dim_(head_dim),
      seed_(seed),
      indirect_(items.front().slot != nullptr),
      items_(items),
      first_(FirstItems(items, units)),
      q_(MakeQueries(int64_t{units} * group * head_dim, seed)),
      state_(items.size() * group * (head_dim + 2)),
      out_(static_cast<size_t>(units) * group * head_dim) {}

void AttendPlan::Attend(int32_t begin, int32_t end, cudaStream_t stream) const {
  const AttendParams params = {.items = items_.data() + begin,
                               .num_items = end - begin,
                               .group = group_,
                               .head_dim = head_dim_,
                               .indirect = indirect_,
                               .q = reinterpret_cast<const uint16_t*>(q_.data()),
                               .state = state_.data() + int64_t{begin} * group_ * (head_dim_ + 2)};
  CheckCuda(AttendItems(params, stream), "AttendItems");
}

void AttendPlan::Merge(cudaStream_t stream) const {
  const MergeParams params = {.state = state_.data(),
                              .first = first_.data(),
                              .units = units_,
                              .group = group_,
                              .head_dim = head_dim_,
                              .out = out_.data()};
  CheckCuda(MergeItems(params, stream), "MergeItems");
}

double AttendPlan::RelativeError(const UnitRows& unit_rows) const {
  const std::vector<uint64_t> words = MakeQueries(int64_t{units_} * group_ * head_dim_, seed_);
  const auto* q = reinterpret_cast<const uint16_t*>(words.data());
  const std::vector<float> out = out_.Download();
  double worst = 0;
  for (int32_t unit = 0; unit < units_; ++unit) {
    const std::vector<const uint16_t*> rows = unit_rows(unit);
    for (int32_t head = unit * group_; head < (unit + 1) * group_; ++head) {
      std::vector<double> logit, sum(head_dim_);
      for (const uint16_t* row : rows) {
        double dot = 0;
        for (int i = 0; i < head_dim_; ++i) {
          dot += static_cast<double>(FromBf16(q[head * head_dim_ + i])) * FromBf16(row[i]);
        }
        logit.push_back(dot / std::sqrt(static_cast<double>(head_dim_)));
      }
      const double top = *std::max_element(logit.begin(), logit.end());
      double mass = 0, wrong = 0, norm = 0;
      for (size_t t = 0; t < rows.size(); ++t) {
        const double e = std::exp(logit[t] - top);
        mass += e;
        for (int i = 0; i < head_dim_; ++i) sum[i] += e * FromBf16(rows[t][head_dim_ + i]);
      }
      for (int i = 0; i < head_dim_; ++i) {
        const double expected = sum[i] / mass;
        wrong += std::pow(out[head * head_dim_ + i] - expected, 2);
        norm += expected * expected;
      }
      const double error = std::sqrt(wrong / norm);
      worst = error <= worst ? worst : error;  // NaN stays
    }
  }
  return worst;
}

int32_t ItemTokens(int64_t rows) {
  int device = 0, multiprocessors = 0;
  CheckCuda(cudaGetDevice(&device), "cudaGetDevice");
  CheckCuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
            "cudaDeviceGetAttribute");
  // Two items for every place on the device, more where they would get long.
  constexpr int64_t kStep = kAttendTile * kAttendWarps, kLongest = 4096;
  const int64_t places = int64_t{multiprocessors} * kAttendBlocks;
  const int64_t even = rows / (2 * places) / kStep * kStep;
  return static_cast<int32_t>(std::clamp(even, kStep, kLongest));
}

}  // namespace vattn::bench
