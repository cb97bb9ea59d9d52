// One tenant's bytes never reach another's output or file. The first fills the whole pool with rows
// of a NaN that nothing else makes, attends and goes; the second works in the same blocks, with the
// same batch. One stale value in a sum would make it NaN.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "tests/api/attention_model.h"
#include "tests/api/backend.h"
#include "tests/api/owned_prefix.h"

namespace vattn::test {
namespace {

uint32_t canary_bits = 0x7fc0ca11;  // a quiet NaN
constexpr int kSlots = 2;
constexpr int64_t kBlock = 256;
const Shape kShape = {4, 2, 32, 32, false, VATTN_F32};

float Canary() {
  float value;
  std::memcpy(&value, &canary_bits, 4);
  return value;
}

// Two canaries in a row, at any byte.
size_t CountCanaries(const char* bytes, size_t size) {
  uint32_t words[2] = {canary_bits, canary_bits};
  char needle[8];
  std::memcpy(needle, words, 8);
  size_t count = 0;
  for (const char* at = bytes;
       (at = std::search(at, bytes + size, needle, needle + 8)) != bytes + size; at += 8) {
    ++count;
  }
  explicit_bzero(needle, 8);
  explicit_bzero(words, 8);
  return count;
}

size_t CountCanariesOfFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  EXPECT_GT(bytes.size(), 0u) << path;
  return CountCanaries(bytes.data(), bytes.size());
}

class CanaryTest : public testing::TestWithParam<int32_t> {
 protected:
  CanaryTest()
      : folder_(std::filesystem::temp_directory_path() /
                ("canary_test." + std::to_string(getpid()))) {
    std::filesystem::create_directory(folder_);
    options_ = OptionsFor(kShape);
    options_.policy = GetParam();
    options_.window = 32;
    options_.exact_below = 64;
    options_.epsilon = .2f;
    options_.host_bytes = 4 << 20;
    disk_ = folder_ / "disk";
    options_.disk_path = disk_.c_str();
    options_.spill = 1;
  }
  ~CanaryTest() override { std::filesystem::remove_all(folder_); }

  static void AppendCanaries(Sequence& sequence, int64_t count) {
    std::vector<float> rows(static_cast<size_t>(count) * kShape.kv_heads * kShape.dim_k, Canary());
    vattn_append_params params = Init<vattn_append_params>();
    params.num_tokens = count;
    params.k = params.v = rows.data();
    const vattn_code code = vattn_append(sequence.get(), &params);
    explicit_bzero(rows.data(), rows.size() * sizeof(float));
    Check(code);
  }

  // Leaves canaries in every block, in the batch's working memory and in its hot set.
  static void Haunt(const Runtime& runtime, Batch& batch) {
    const vattn_stats stats = runtime.Stats();
    Sequence tenant(runtime);
    batch.Set(0, tenant);  // is not spilled from there
    AppendCanaries(tenant, kBlock);
    const int64_t blocks =
        static_cast<int64_t>(stats.host_bytes_limit / runtime.Stats().host_bytes_used);
    AppendCanaries(tenant, (blocks - 1) * kBlock - 8);
    Call call(kShape, kSlots, 0);
    std::mt19937_64 engine(1);
    for (int step = 0; step < 3; ++step) {
      call.Fill(engine, 1);
      std::fill(call.v_new.begin(), call.v_new.end(), Canary());
      batch.BeginStep(1);
      batch.Attend(call.Params());
    }
    EXPECT_TRUE(std::isnan(call.Out(0, 0)[0]));
  }

  void Append(Sequence& sequence, Rows& rows, int64_t count) {
    const int64_t before = rows.tokens;
    rows.AddGaussian(kShape, engine_, count);
    Rows added = rows;
    AppendRows(sequence, kShape, 0, added, before);
  }

  void Truncate(Sequence& sequence, Rows& rows, int64_t tokens) {
    sequence.Truncate(tokens);
    rows.Truncate(kShape, tokens);
  }

  // Steps of one sequence, every answer right.
  void Attend(Batch& batch, Sequence& sequence, Rows& rows, int steps) {
    batch.Set(0, sequence);
    for (int step = 0; step < steps; ++step) {
      Call call(kShape, kSlots, 0);
      call.Fill(engine_, 1);
      batch.BeginStep(1);
      batch.Attend(call.Params());
      call.AddTo(rows, 0);
      if (options_.policy == VATTN_POLICY_DENSE) {
        ExpectExact(call, 0, rows);
        continue;
      }
      for (int h = 0; h < kShape.q_heads; ++h) {
        const Answer answer = test::Attend(kShape, rows, h / 2, call.Query(0, h));
        EXPECT_LE(Distance(answer, call.Out(0, h).data()),
                  2 * options_.epsilon * std::max(answer.norm, .5 * answer.rms_value));
        EXPECT_TRUE(std::isfinite(call.lse[h]) && std::isfinite(call.error[h]));
      }
    }
    batch.Clear(0);
  }

  // Of all that is in the folder.
  void ExpectNoCanaryInFiles(int64_t least_files) const {
    int64_t files = 0;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder_)) {
      if (!entry.is_regular_file() || entry.file_size() == 0) continue;
      EXPECT_EQ(CountCanariesOfFile(entry.path()), 0u) << entry.path();
      ++files;
    }
    EXPECT_GE(files, least_files);
  }

  const std::filesystem::path folder_;
  std::string disk_;
  vattn_options options_;
  std::mt19937_64 engine_{7};
};

INSTANTIATE_TEST_SUITE_P(Policies, CanaryTest,
                         testing::Values(VATTN_POLICY_DENSE, VATTN_POLICY_VERIFIED),
                         [](const auto& info) {
                           return info.param == VATTN_POLICY_DENSE ? "Dense" : "Verified";
                         });

TEST_P(CanaryTest, OfAGoneTenantReachesNoOutput) {
  const Runtime runtime(options_);
  Batch batch(runtime, kSlots);
  Haunt(runtime, batch);
  Sequence sequence(runtime);
  Rows rows;
  Attend(batch, sequence, rows, 3);  // the window and sinks alone
  Append(sequence, rows, 500);
  Attend(batch, sequence, rows, 40);
  Sequence fork = sequence.Fork();
  Rows forks = rows;
  Truncate(sequence, rows, 300);  // what follows in the block were codes and rows of its own
  Attend(batch, sequence, rows, 3);
  Append(sequence, rows, 700);
  Attend(batch, sequence, rows, 3);
  Attend(batch, fork, forks, 3);  // its tail is a copy
}

TEST_P(CanaryTest, OfAGoneTenantReachesNoFile) {
  const Runtime runtime(options_);
  Batch batch(runtime, kSlots);
  Haunt(runtime, batch);
  int files = 0;
  const auto save = [&](const Sequence& sequence) {
    sequence.Save(folder_ / ("saved" + std::to_string(files++)));
  };
  Rows rows;
  Sequence sequence(runtime);
  save(sequence);
  for (const int64_t tokens : {int64_t{1}, kBlock - 1, kBlock, kBlock + 1, int64_t{700}}) {
    Append(sequence, rows, tokens - rows.tokens);
    save(sequence);
  }
  Attend(batch, sequence, rows, 2);  // codes, too
  save(sequence);
  const Sequence fork = sequence.Fork();
  Truncate(sequence, rows, 290);
  save(sequence);
  Attend(batch, sequence, rows, 1);
  save(fork);
  Sequence restored = Sequence::Restore(runtime, folder_ / "saved6");
  save(restored);
  restored.Hibernate(folder_ / "asleep");
  sequence.SavePrefix(OwnedPrefix("b", std::vector<int32_t>(270, 5)));
  ExpectNoCanaryInFiles(files + 2);
}

TEST_P(CanaryTest, OfALivingTenantReachesNoFileOfAnother) {
  const Runtime runtime(options_);
  Sequence tenant(runtime);
  AppendCanaries(tenant, 900);
  const Sequence its_fork = tenant.Fork();
  Rows rows;
  Sequence sequence(runtime);
  Append(sequence, rows, 300);
  sequence.Save(folder_ / "saved");
  tenant.Truncate(100);
  Append(sequence, rows, 300);
  sequence.Hibernate(folder_ / "asleep");
  ExpectNoCanaryInFiles(2);
  tenant.Save(folder_ / "its_own");
  EXPECT_GT(CountCanariesOfFile(folder_ / "its_own"), 0u);
}

// Canaries in all memory of the process that can be written, but for what is larger than 1 GiB.
size_t CountCanariesOfProcess() {
  std::ifstream maps("/proc/self/maps");
  const int memory = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
  EXPECT_GE(memory, 0);
  size_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    unsigned long begin = 0, end = 0;
    char mode[5] = "";
    if (std::sscanf(line.c_str(), "%lx-%lx %4s", &begin, &end, mode) != 3) continue;
    if (std::strncmp(mode, "rw", 2) != 0 || end - begin > 1 << 30) continue;
    for (unsigned long at = begin; at < end; at += 4096) {
      char page[4096];
      const ssize_t got = pread(memory, page, sizeof(page), static_cast<off_t>(at));
      const bool own = at <= reinterpret_cast<unsigned long>(page) + sizeof(page) &&
                       at + 4096 >= reinterpret_cast<unsigned long>(page);
      if (got == sizeof(page) && !own) count += CountCanaries(page, sizeof(page));
      explicit_bzero(page, sizeof(page));
    }
  }
  close(memory);
  return count;
}

TEST_P(CanaryTest, ZeroOnFreeLeavesNoneInMemory) {
  if (OnCuda()) GTEST_SKIP() << "device memory is not covered";
  for (const int32_t zero : {0, 1}) {
    canary_bits += 0x111;  // none that is left from before
    options_.zero_on_free = zero;
    const Runtime runtime(options_);
    {
      Sequence tenant(runtime), other(runtime);
      AppendCanaries(tenant, 1000);
      const Sequence fork = tenant.Fork();
      tenant.Truncate(300);
      AppendCanaries(tenant, 1);  // a copy of the tail
      tenant.Hibernate(folder_ / "asleep");
      EXPECT_GT(CountCanariesOfProcess(), 30000u);
    }
    std::filesystem::remove(folder_ / "asleep");
    if (zero == 0) {
      EXPECT_GT(CountCanariesOfProcess(), 30000u);
    } else {
      // The test's own canary is in a register now and then, and so in a frame on the stack. A row
      // is more.
      EXPECT_LT(CountCanariesOfProcess(), static_cast<size_t>(kShape.dim_k + kShape.dim_v));
    }
  }
}

}  // namespace
}  // namespace vattn::test
