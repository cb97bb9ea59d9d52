// Counters, the Prometheus text and the doctor's JSON through the C API.
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>
#include <string>

#include "tests/api/attention_model.h"

namespace vattn::test {
namespace {

// The counters must be the sums of what the calls reported.
void ExpectCountersAddUp(int32_t policy) {
  const Shape shape = {8, 2, 64, 64, false, VATTN_BF16};
  vattn_options options = OptionsFor(shape);
  options.num_layers = 2;
  options.policy = policy;
  options.exact_below = 256;
  const Runtime runtime(options);
  std::mt19937_64 engine(1);
  Rows rows;
  rows.AddGaussian(shape, engine, 2000);
  Sequence first(runtime), second(runtime);
  for (int layer : {0, 1}) {
    AppendRows(first, shape, layer, rows);
    AppendRows(second, shape, layer, rows, 1950);
  }
  Batch batch(runtime, 3);
  batch.Set(0, first);
  batch.Set(2, second);
  uint64_t heads[4] = {}, middle = 0, selected = 0, fetched = 0, looks = 0;
  for (int step = 0; step < 3; ++step) {
    batch.BeginStep(1);
    for (int layer : {0, 1}) {
      Call call(shape, 3, layer);
      call.Fill(engine, 1, 2);
      batch.Attend(call.Params());
      for (int slot : {0, 2}) {
        for (int h = 0; h < 8; ++h) ++heads[call.verdict[slot * 8 + h]];
        for (int g = slot * 2; g < slot * 2 + 2; ++g) {
          middle += call.middle[g], selected += call.selected[g], fetched += call.fetched[g],
              looks += call.looks[g];
        }
      }
    }
  }
  const vattn_stats stats = runtime.Stats();
  EXPECT_EQ(stats.struct_size, sizeof(stats));
  EXPECT_EQ(stats.steps, 3u * 2 * 2);
  EXPECT_EQ(stats.sequences, 2u);
  EXPECT_EQ(stats.tokens, 2u * (2003 + 53));
  EXPECT_EQ(stats.heads_exact, heads[VATTN_VERDICT_EXACT]);
  EXPECT_EQ(stats.heads_verified, heads[VATTN_VERDICT_VERIFIED]);
  EXPECT_EQ(stats.heads_dense, heads[VATTN_VERDICT_DENSE]);
  EXPECT_EQ(stats.heads_best_effort, heads[VATTN_VERDICT_BEST_EFFORT]);
  EXPECT_EQ(std::accumulate(heads, heads + 4, uint64_t{0}), stats.steps * 8);
  EXPECT_EQ(stats.rows_middle, middle);
  EXPECT_EQ(stats.rows_selected, selected);
  EXPECT_EQ(stats.rows_fetched, fetched);
  EXPECT_EQ(stats.bytes_fetched, fetched * 256);
  EXPECT_EQ(stats.looks, looks);
  EXPECT_GT(middle, 0u);
  EXPECT_LE(stats.host_bytes_used, stats.host_bytes_limit);
  // 9 and 1 blocks of two KV heads and two layers: rows of 256 and codes of 32 bytes.
  EXPECT_EQ(stats.host_bytes_used, (8u + 1) * 4 * 256 * (256 + 32));
  EXPECT_GT(stats.table_bytes, 0u);
}

TEST(ApiStatsTest, CountersAddUp) {
  for (const int32_t policy :
       {VATTN_POLICY_VERIFIED, VATTN_POLICY_TOPK, VATTN_POLICY_TOPK_UNIFORM, VATTN_POLICY_DENSE}) {
    SCOPED_TRACE("policy " + std::to_string(policy));
    ExpectCountersAddUp(policy);
  }
}

TEST(ApiStatsTest, OlderCallersGetTheirPart) {
  const Runtime runtime(OptionsFor({}));
  const Sequence sequence(runtime);
  vattn_stats stats;
  std::memset(&stats, 0xa5, sizeof(stats));
  Check(vattn_runtime_stats(runtime.get(), &stats, offsetof(vattn_stats, tokens)));
  EXPECT_EQ(stats.struct_size, offsetof(vattn_stats, tokens));
  EXPECT_EQ(stats.sequences, 1u);
  EXPECT_EQ(stats.tokens, 0xa5a5a5a5a5a5a5a5u);
}

// Text exposition format: HELP, TYPE and one value for each metric, in this order.
TEST(ApiStatsTest, PrometheusTextParses) {
  const Runtime runtime(OptionsFor({}));
  const Sequence sequence(runtime);
  const std::string text = PrometheusText(runtime);
  ASSERT_FALSE(text.empty());
  EXPECT_EQ(text.back(), '\n');
  std::istringstream lines(text);
  std::map<std::string, uint64_t> values;
  std::string line;
  while (std::getline(lines, line)) {
    std::istringstream help(line);
    std::string mark, word, name, type, rest, same;
    help >> mark >> word >> name;
    std::getline(help, rest);
    EXPECT_TRUE(mark == "#" && word == "HELP" && rest.size() > 5) << line;
    ASSERT_TRUE(std::getline(lines, line));
    std::istringstream kind(line);
    kind >> mark >> word >> same >> type;
    EXPECT_TRUE(mark == "#" && word == "TYPE" && same == name &&
                (type == "gauge" || type == "counter"))
        << line;
    ASSERT_TRUE(std::getline(lines, line));
    std::istringstream sample(line);
    uint64_t value = 0;
    sample >> same >> value;
    EXPECT_TRUE(!sample.fail() && sample.eof() && same == name) << line;
    EXPECT_EQ(name.rfind("vattn_", 0), 0u);
    EXPECT_TRUE(values.emplace(name, value).second) << name << " twice";
  }
  const vattn_stats stats = runtime.Stats();
  EXPECT_EQ(values.size(), (sizeof(stats) - sizeof(size_t)) / sizeof(uint64_t));
  EXPECT_EQ(values["vattn_host_bytes_limit"], stats.host_bytes_limit);
  EXPECT_EQ(values["vattn_sequences"], 1u);
  EXPECT_EQ(values["vattn_table_bytes"], stats.table_bytes);
}

TEST(ApiStatsTest, DoctorJsonParses) {
  const nlohmann::json report = nlohmann::json::parse(DoctorJson());
  EXPECT_EQ(report.at("schema_version"), 1);
  EXPECT_GE(report.at("cpu").at("cpus").get<int>(), 1);
  EXPECT_FALSE(report.at("cpu").at("simd").get<std::string>().empty());
  EXPECT_GT(report.at("memory").at("total_bytes").get<uint64_t>(),
            report.at("memory").at("available_bytes").get<uint64_t>());
  EXPECT_TRUE(report.at("io_uring").is_boolean());
  EXPECT_TRUE(report.at("cuda").at("built").is_boolean());
  EXPECT_TRUE(report.at("advice").is_array());
}

// A short buffer gets the start of the text, its final 0, and nothing behind it.
TEST(ApiStatsTest, ShortBuffersAreNotOverrun) {
  const Runtime runtime(OptionsFor({}));
  const std::string whole = PrometheusText(runtime);
  for (const size_t size :
       {size_t{0}, size_t{1}, size_t{2}, whole.size() - 1, whole.size(), whole.size() + 1}) {
    std::string buffer(whole.size() + 8, '~');
    size_t needed = 0;
    Check(vattn_stats_prometheus(runtime.get(), &buffer[0], size, &needed));
    EXPECT_EQ(needed, whole.size());
    const size_t written = size == 0 ? 0 : std::min(size - 1, whole.size());
    EXPECT_EQ(buffer.substr(0, written), whole.substr(0, written));
    const std::string end(size == 0 ? 0 : 1, '\0');
    EXPECT_EQ(buffer.substr(written), end + std::string(buffer.size() - written - end.size(), '~'))
        << size;
  }
  char one = '~';
  size_t needed = 0;
  Check(vattn_doctor(&one, 1, &needed));
  EXPECT_EQ(one, '\0');
  EXPECT_GT(needed, 100u);
}

}  // namespace
}  // namespace vattn::test
