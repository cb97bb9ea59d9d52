#include "bench/trace/hostile_inputs.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <utility>

namespace vattn::test {
namespace {

using Logits = std::function<double(int64_t head, int64_t token)>;

double Dot(const float* a, const float* b) {
  double sum = 0;
  for (int64_t d = 0; d < kDim; ++d) sum += double{a[d]} * b[d];
  return sum;
}

// Gaussian numbers that are the same with every standard library.
class Gauss {
 public:
  explicit Gauss(uint32_t seed) : engine_(seed) {}
  float operator()() {
    const double radius = std::sqrt(-2 * std::log((engine_() + .5) / 4294967296.0));
    return static_cast<float>(radius * std::cos(2 * M_PI * (engine_() / 4294967296.0)));
  }
  uint32_t Below(uint32_t bound) { return engine_() % bound; }
  std::vector<float> Fill(int64_t count, float scale) {
    std::vector<float> x(count);
    for (float& value : x) value = scale * (*this)();
    return x;
  }

 private:
  std::mt19937 engine_;
};

// Orthonormal directions of the query heads, [kHeads][kDim].
std::vector<float> Directions(Gauss& gauss) {
  std::vector<float> u = gauss.Fill(kHeads * kDim, 1);
  for (int64_t h = 0; h < kHeads; ++h) {
    float* mine = &u[h * kDim];
    for (int64_t other = 0; other < h; ++other) {
      const double along = Dot(mine, &u[other * kDim]);
      for (int64_t d = 0; d < kDim; ++d) mine[d] -= static_cast<float>(along) * u[other * kDim + d];
    }
    const double norm = std::sqrt(Dot(mine, mine));
    for (int64_t d = 0; d < kDim; ++d) mine[d] = static_cast<float>(mine[d] / norm);
  }
  return u;
}

// What makes x orthogonal to every direction.
void Remove(const std::vector<float>& directions, float* x) {
  for (int64_t h = 0; h < kHeads; ++h) {
    const double along = Dot(x, &directions[h * kDim]);
    for (int64_t d = 0; d < kDim; ++d) x[d] -= static_cast<float>(along) * directions[h * kDim + d];
  }
}

// An input whose logits are `logits`: the query of head h is sqrt(kDim) times direction h, and keys
// are Gaussian of `spread` in all other directions. Values are Gaussian; calibration queries are
// the query with as much noise.
HostileInput Make(std::string name, uint32_t seed, const Logits& logits, float spread = 1) {
  Gauss gauss(seed);
  const std::vector<float> directions = Directions(gauss);
  HostileInput input;
  input.name = std::move(name);
  input.keys = gauss.Fill(kTokens * kDim, spread);
  input.values = gauss.Fill(kTokens * kDim, 1);
  for (int64_t t = 0; t < kTokens; ++t) {
    float* key = &input.keys[t * kDim];
    Remove(directions, key);
    for (int64_t h = 0; h < kHeads; ++h) {
      const float s = static_cast<float>(logits(h, t));
      for (int64_t d = 0; d < kDim; ++d) key[d] += s * directions[h * kDim + d];
    }
  }
  const float scale = std::sqrt(static_cast<float>(kDim));
  for (const float u : directions) input.query.push_back(scale * u);
  input.calibration = gauss.Fill(kCalibration * kHeads * kDim, 1);
  for (int64_t i = 0; i < kCalibration * kHeads * kDim; ++i) {
    input.calibration[i] += input.query[i % (kHeads * kDim)];
  }
  return input;
}

// Independent Gaussian logits of standard deviation `width`.
Logits Noise(uint32_t seed, double width) {
  Gauss gauss(seed);
  std::vector<float> s = gauss.Fill(kHeads * kTokens, static_cast<float>(width));
  return [s = std::move(s)](int64_t h, int64_t t) { return s[h * kTokens + t]; };
}

// The place of each token in a random order, so that ranks are not places. [kHeads][kTokens]
std::vector<int64_t> Ranks(uint32_t seed) {
  Gauss gauss(seed);
  std::vector<int64_t> ranks;
  for (int64_t h = 0; h < kHeads; ++h) {
    for (int64_t t = 0; t < kTokens; ++t) ranks.push_back(t);
    for (uint32_t t = kTokens - 1; t > 0; --t) {
      std::swap(ranks[h * kTokens + t], ranks[h * kTokens + gauss.Below(t + 1)]);
    }
  }
  return ranks;
}

// Adds `shift` to every value element of the tokens that `which` names.
void ShiftValues(HostileInput& input, const std::function<bool(int64_t)>& which, float shift) {
  for (int64_t t = 0; t < kTokens; ++t) {
    if (!which(t)) continue;
    for (int64_t d = 0; d < kDim; ++d) input.values[t * kDim + d] += shift;
  }
}

bool IsSpike(int64_t head, int64_t token) { return token == 1700 + 611 * head; }

HostileInput Spike() {
  // One token of the middle holds most of the mass.
  const Logits noise = Noise(1, 1);
  HostileInput input = Make(
      "spike", 2, [&](int64_t h, int64_t t) { return noise(h, t) + (IsSpike(h, t) ? 11 : 0); });
  ShiftValues(
      input, [](int64_t t) { return IsSpike(0, t) || IsSpike(1, t); }, 2);
  return input;
}

HostileInput TiesAtTheEdge() {
  // One more equal logit than a top 5 % would take.
  const Logits noise = Noise(3, 1);
  return Make("ties at the edge", 4,
              [&](int64_t h, int64_t t) { return t % 20 == h && t < 20 * 198 ? 6 : noise(h, t); });
}

HostileInput Geometric() {
  const std::vector<int64_t> rank = Ranks(7);
  return Make("geometric tail", 8,
              [&](int64_t h, int64_t t) { return -.01 * rank[h * kTokens + t]; });
}

HostileInput Zipf() {
  const std::vector<int64_t> rank = Ranks(9);
  return Make("Zipf tail", 10,
              [&](int64_t h, int64_t t) { return -std::log(1.0 + rank[h * kTokens + t]); });
}

HostileInput Bimodal() {
  HostileInput input =
      Make("bimodal", 12, [](int64_t h, int64_t t) { return t % 50 == h ? 5 : 0; });
  ShiftValues(
      input, [](int64_t t) { return t % 50 < kHeads; }, 1);
  return input;
}

HostileInput HugeValue() {
  // A few tokens of tiny weight with huge values.
  const Logits noise = Noise(13, 1);
  HostileInput input = Make("tiny weight, huge value", 14, [&](int64_t h, int64_t t) {
    return t % 512 == 300 ? -8 : noise(h, t);
  });
  for (int64_t t = 300; t < kTokens; t += 512) {
    for (int64_t d = 0; d < kDim; ++d) input.values[t * kDim + d] *= 1e4f;
  }
  return input;
}

HostileInput Cancelling() {
  // Neighbours of equal weight and opposite value.
  const Logits noise = Noise(15, 2);
  HostileInput input =
      Make("cancelling values", 16, [&](int64_t h, int64_t t) { return noise(h, t / 2 * 2); });
  for (int64_t t = 0; t + 1 < kTokens; t += 2) {
    for (int64_t d = 0; d < kDim; ++d) {
      input.values[(t + 1) * kDim + d] = .3f - input.values[t * kDim + d];
    }
  }
  return input;
}

HostileInput Periodic(int64_t period, uint32_t seed) {
  // Weight and value follow the place in the period.
  HostileInput input = Make("period of " + std::to_string(period), seed, [&](int64_t h, int64_t t) {
    return 4 * std::cos(2 * M_PI * (t % period) / static_cast<double>(period) + h);
  });
  ShiftValues(
      input, [&](int64_t t) { return t % period < period / 2; }, 1);
  return input;
}

HostileInput Duplicates() {
  const Logits noise = Noise(21, 2);
  HostileInput input =
      Make("duplicate keys", 22, [&](int64_t h, int64_t t) { return noise(h, t); });
  for (int64_t t = 32; t < kTokens; ++t) {
    std::copy_n(&input.keys[t % 32 * kDim], kDim, &input.keys[t * kDim]);
  }
  return input;
}

HostileInput Outliers() {
  // Keys far outside the others: along the queries, where they are heavy, and elsewhere.
  const Logits noise = Noise(23, .5);
  HostileInput input = Make("outlier coordinates", 24, [&](int64_t h, int64_t t) {
    return t % 128 == 100 + h ? 9 : noise(h, t);
  });
  for (int64_t t = 7; t < kTokens; t += 97) {
    for (int64_t d = 0; d < kDim; d += 16) input.keys[t * kDim + d] += 4;
  }
  return input;
}

HostileInput Clipped() {
  // One heavy key, far beyond where the calibration lets the codes end.
  const Logits noise = Noise(26, .3);
  return Make("spike beyond the codes", 27,
              [&](int64_t h, int64_t t) { return IsSpike(h, t) ? 9 : noise(h, t); });
}

HostileInput Unseen(std::string name, uint32_t seed, const Logits& logits) {
  // The query points where no calibration query did, and keys vary little there: their codes spend
  // their bits elsewhere.
  HostileInput input = Make(std::move(name), seed, logits, 4);
  Gauss gauss(seed + 1);
  std::vector<float> directions = input.query;
  for (float& u : directions) u /= std::sqrt(static_cast<float>(kDim));
  input.calibration = gauss.Fill(kCalibration * kHeads * kDim, 8);
  for (int64_t i = 0; i < kCalibration * kHeads; ++i)
    Remove(directions, &input.calibration[i * kDim]);
  return input;
}

HostileInput EmptySink() {
  // Of the second head, a sink without a value holds nearly all of the mass, and few tokens the
  // rest. What errors are relative to is then far below what values in the middle are, and a first
  // step does not know it.
  const Logits noise = Noise(42, 1);
  const std::vector<int64_t> rank = Ranks(43);
  HostileInput input = Make("sink without a value", 44, [&](int64_t h, int64_t t) {
    if (h == 0) return noise(h, t) + (t < kMiddleEnd ? 0 : 6);
    if (t == 0) return 4.5;
    return t < kMiddleBegin || t >= kMiddleEnd ? -20 : -1.3 * std::log(1.0 + rank[h * kTokens + t]);
  });
  std::fill_n(input.values.begin(), kMiddleBegin * kDim, 0.f);
  return input;
}

HostileInput Scaled(HostileInput input, float values) {
  for (float& v : input.values) v *= values;
  return input;
}

}  // namespace

std::vector<HostileInput> HostileInputs() {
  std::vector<HostileInput> inputs;
  inputs.push_back(Make("Gaussian logits", 30, Noise(31, 2)));
  inputs.push_back(Spike());
  inputs.push_back(TiesAtTheEdge());
  inputs.push_back(Make(
      "all equal", 6, [](int64_t, int64_t) { return 0; }, 0));
  inputs.push_back(Geometric());
  inputs.push_back(Zipf());
  inputs.push_back(Bimodal());
  inputs.push_back(HugeValue());
  inputs.back().least_coded = 0;  // levels as wide as huge values say nothing of the others
  inputs.push_back(Cancelling());
  inputs.push_back(Make("low-rank keys", 17, Noise(18, 3), 0));
  inputs.push_back(Periodic(256, 19));
  inputs.push_back(Periodic(16, 20));
  inputs.push_back(Make("sorted keys", 25, [](int64_t, int64_t t) { return 8.0 * t / kTokens; }));
  inputs.push_back(Duplicates());
  inputs.push_back(Outliers());
  // Codes are off by many nats: every token could be the one that matters, so everything is read.
  inputs.push_back(Make("logits up to 1000", 36, Noise(37, 300)));
  inputs.back().least_first = inputs.back().least_settled = inputs.back().least_coded = 0;
  inputs.push_back(Scaled(Make("values of 1e12", 38, Noise(39, 2)), 1e12f));
  inputs.push_back(Scaled(Make("values of 1e-12", 40, Noise(41, 2)), 1e-12f));
  inputs.push_back(EmptySink());
  // One key holds most of the mass, and no code tells: such tokens are marked and always read.
  inputs.push_back(Clipped());
  const Logits quiet = Noise(34, .5);
  inputs.push_back(Unseen("spike in an unseen direction", 35,
                          [&](int64_t h, int64_t t) { return IsSpike(h, t) ? 9 : quiet(h, t); }));
  inputs.back().least_settled = 0;  // nothing is known of its direction
  // Codes say nothing of where the query points, and every token's score differs there by 2 nats.
  inputs.push_back(Unseen("unseen direction", 33, Noise(32, 2)));
  inputs.back().least_first = inputs.back().least_settled = inputs.back().least_coded = 0;
  return inputs;
}

Exact ExactAttention(const HostileInput& input, const std::vector<float>& query) {
  Exact exact{.out = std::vector<double>(kHeads * kDim),
              .value_scale = std::vector<double>(kHeads)};
  const double scale = 1 / std::sqrt(static_cast<double>(kDim));
  for (int64_t h = 0; h < kHeads; ++h) {
    std::vector<double> s(kTokens);
    for (int64_t t = 0; t < kTokens; ++t)
      s[t] = scale * Dot(&query[h * kDim], &input.keys[t * kDim]);
    const double most = *std::max_element(s.begin(), s.end());
    double mass = 0, norm2 = 0;
    double* out = &exact.out[h * kDim];
    for (int64_t t = 0; t < kTokens; ++t) {
      const float* v = &input.values[t * kDim];
      const double e = std::exp(s[t] - most);
      mass += e;
      norm2 += e * Dot(v, v);
      for (int64_t d = 0; d < kDim; ++d) out[d] += e * v[d];
    }
    for (int64_t d = 0; d < kDim; ++d) out[d] /= mass;
    exact.value_scale[h] = std::sqrt(norm2 / mass);
  }
  return exact;
}

}  // namespace vattn::test
