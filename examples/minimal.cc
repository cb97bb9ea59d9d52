// One sequence, one layer: 8192 random prompt tokens, then a few decode steps, by vattn.hpp.
// Build: c++ -std=c++17 minimal.cc -lvattn
#include <cstdio>
#include <random>
#include <vector>

#include "vattn.hpp"

int main() try {
  constexpr int kPrompt = 8192, kQHeads = 8, kKvHeads = 2, kDim = 64;
  std::mt19937 random(1);
  const auto values = [&](size_t count, float sd) {
    std::normal_distribution<float> normal(0, sd);
    std::vector<float> made(count);
    for (float& x : made) x = normal(random);
    return made;
  };

  const vattn::Runtime runtime(
      R"({"num_q_heads": 8, "num_kv_heads": 2, "head_dim_k": 64, "head_dim_v": 64, "dtype": "f32"})");
  vattn::Sequence sequence(runtime);
  const std::vector<float> k = values(kPrompt * kKvHeads * kDim, 1),
                           v = values(kPrompt * kKvHeads * kDim, 1);
  auto prompt = vattn::Init<vattn_append_params>();
  prompt.num_tokens = kPrompt;
  prompt.k = k.data();
  prompt.v = v.data();
  sequence.Append(prompt);

  vattn::Batch batch(runtime, 1);
  batch.Set(0, sequence);
  for (int step = 0; step < 4; ++step) {
    const std::vector<float> q = values(kQHeads * kDim, 1);
    std::vector<float> out(kQHeads * kDim), error(kQHeads);
    int32_t selected[kKvHeads];
    int64_t middle[kKvHeads];
    auto params = vattn::Init<vattn_attend_params>();
    params.q = q.data();
    params.k_new = k.data();  // the first token's row serves as that of the new one
    params.v_new = v.data();
    params.out = out.data();
    params.error = error.data();
    params.selected = selected;
    params.middle = middle;
    batch.BeginStep(1);
    batch.Attend(params);
    std::printf("step %d: head 0 is off by at most %.3f, read %d of %d rows in the middle\n", step,
                static_cast<double>(error[0]), static_cast<int>(selected[0]),
                static_cast<int>(middle[0]));
  }
  std::printf("%llu steps\n", static_cast<unsigned long long>(runtime.Stats().steps));
  return 0;
} catch (const vattn::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
