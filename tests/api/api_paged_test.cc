// Attention over a pool that the caller owns: any block size and strides, shared blocks, ragged query
// tokens, slots that are written again, prompts, and arguments that are out of range.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "tests/api/attention_model.h"
#include "tests/api/backend.h"
#include "tests/api/paged_pool.h"

namespace vattn::test {
namespace {

class PagedLayoutTest : public testing::TestWithParam<PoolLayout> {};

TEST_P(PagedLayoutTest, DenseIsExact) {
  const PoolLayout& layout = GetParam();
  vattn_options options = OptionsFor(layout.shape);
  options.policy = VATTN_POLICY_DENSE;
  const int most = std::min(5, 128 / (layout.shape.q_heads / layout.shape.kv_heads));
  Pool pool(layout, options, 3000 / layout.block_tokens + 8);
  Request a = Request::In(3), b = Request::In(0), none = Request::In(1);
  pool.Grow(a, 700);
  pool.Grow(b, 3, /*by_library=*/false);
  for (const int queries : {1, most, 2}) {
    pool.Grow(a, queries);
    pool.Grow(b, 2, /*by_library=*/false);
    const int32_t dtype = queries == 2 ? layout.shape.dtype : VATTN_F32;
    const PagedCall call =
        pool.Step({&a, &none, &b, &a}, {queries, 0, std::min(most, 2), 0}, 1, dtype);
    pool.ExpectExact(call, 0, a, dtype);
    pool.ExpectExact(call, 2, b, dtype);
    EXPECT_EQ(call.selected[1 * layout.shape.kv_heads], -7)
        << "one that was passed over is written";
  }
}

TEST_P(PagedLayoutTest, PromptsAreExact) {
  const PoolLayout& layout = GetParam();
  if (OnCuda() && (layout.shape.dtype == VATTN_F32 || layout.shape.dim_k > 256))
    GTEST_SKIP() << "vattn_prefill on CUDA has 16-bit rows of 256 elements at most";
  vattn_options options = OptionsFor(layout.shape);
  options.policy = VATTN_POLICY_DENSE;
  Pool pool(layout, options, 3000 / layout.block_tokens + 8);
  Request r;
  for (const int64_t count : {300, 1, 257}) {
    pool.Grow(r, count);
    const Shape& shape = layout.shape;
    const int64_t heads = count * shape.q_heads;
    const std::vector<float> q = Gaussian(pool.engine(), shape.dtype, heads * shape.dim_k, 1);
    const std::vector<std::byte> q_bytes = ToBytes(shape.dtype, q);
    std::vector<float> out(static_cast<size_t>(heads * shape.dim_v)), lse(heads);
    vattn_paged_prefill_params p;
    vattn_paged_prefill_params_init(&p, sizeof(p));
    p.num_tokens = count;
    p.length = r.rows.tokens;
    p.blocks = r.blocks.data();
    p.q = q_bytes.data();
    p.out = out.data();
    p.lse = lse.data();
    Check(vattn_paged_prefill(pool.get(), &p));
    for (int64_t i = 0; i < heads; i += 1 + heads / 40) {
      const int64_t token = i / shape.q_heads;
      const int h = static_cast<int>(i % shape.q_heads);
      const Answer answer =
          Attend(shape, r.rows, r.rows.tokens - count + 1 + token,
                 h / (shape.q_heads / shape.kv_heads), q.data() + i * shape.dim_k);
      EXPECT_LE(Distance(answer, out.data() + i * shape.dim_v),
                OnCuda() ? .01 * answer.rms_value : Tolerance(answer, VATTN_F32));
      EXPECT_NEAR(lse[i], answer.lse, OnCuda() ? .01 : 1e-3);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, PagedLayoutTest,
    testing::Values(
        PoolLayout{"two_arrays_16_f32", {4, 4, 64, 64, false, VATTN_F32}, 16, false},
        PoolLayout{"two_arrays_48_bf16", {12, 2, 128, 128, false, VATTN_BF16}, 48, false},
        PoolLayout{"packed_32_f16", {6, 2, 96, 96, false, VATTN_F16}, 32, true},
        PoolLayout{"packed_256_bf16", {8, 2, 64, 128, false, VATTN_BF16}, 256, true},
        PoolLayout{"two_arrays_512_bf16", {8, 1, 256, 256, false, VATTN_BF16}, 512, false},
        PoolLayout{"mla_64_bf16", {16, 1, 576, 512, true, VATTN_BF16}, 64, false}),
    [](const auto& info) { return std::string(info.param.name); });

struct Sampled {
  const char* name;
  int block_tokens;
  int32_t dtype, policy;
};

class PagedSampledTest : public testing::TestWithParam<Sampled> {};

// Requests that share their first blocks, take ragged numbers of query tokens, leave, and are followed
// by others in their blocks: verified answers keep the promise throughout.
TEST_P(PagedSampledTest, KeepsThePromise) {
  const Shape shape{8, 2, 64, 64, false, GetParam().dtype};
  vattn_options options = OptionsFor(shape);
  options.policy = GetParam().policy;
  options.epsilon = .2f;
  options.refresh = 1;
  options.topk_share = 1;
  Pool pool({"", shape, GetParam().block_tokens, false}, options, 16000 / GetParam().block_tokens);
  int trials = 0, verified = 0, failures = 0;
  for (int round = 0; round < 3; ++round) {
    Request a = Request::In(round), b = Request::In(5 - round);
    pool.Grow(a, 4000 + 37 * round, round % 2 == 0);
    // b begins as a does, in the same blocks.
    const int64_t shared = 3000 / GetParam().block_tokens * GetParam().block_tokens;
    b.rows = a.rows;
    b.rows.Truncate(shape, shared);
    b.blocks.assign(a.blocks.begin(), a.blocks.begin() + shared / GetParam().block_tokens);
    pool.Grow(b, 1500);
    for (int step = 0; step < 6; ++step) {
      const int qa = step % 3 == 0 ? 1 : 3, qb = step % 2 == 0 ? 2 : 1;
      pool.Grow(a, qa), pool.Grow(b, qb);
      std::vector<Request*> requests{&a, &b};
      const PagedCall call = pool.Step(requests, {qa, qb}, 2);
      for (size_t i = 0; i < 2; ++i) {
        const int queries = i == 0 ? qa : qb;
        EXPECT_GT(call.middle[i * 2], 3000);
        EXPECT_GT(call.selected[i * 2], 0);
        EXPECT_LE(call.fetched[i * 2], call.selected[i * 2]);
        for (int t = 0; t < queries; ++t) {
          for (int h = 0; h < 8; ++h, ++trials) {
            const Rows& rows = requests[i]->rows;
            const Answer answer = Attend(shape, rows, rows.tokens - queries + 1 + t, h / 4,
                                         pool.Query(call, i, t, h));
            const double distance = Distance(answer, pool.Out(call, i, t, h).data());
            const double ref = std::max(answer.norm, double{options.norm_floor} * answer.rms_value);
            const int at = (call.starts[i] + t) * 8 + h;
            if (call.verdict[at] == VATTN_VERDICT_VERIFIED) {
              ++verified;
              failures += distance > options.epsilon * ref;
              EXPECT_LE(call.error[at], options.epsilon);
              EXPECT_NEAR(call.lse[at], answer.lse, .5);
            } else {
              EXPECT_LE(distance, Tolerance(answer, VATTN_F32));
            }
          }
        }
      }
    }
    b.blocks.erase(b.blocks.begin(), b.blocks.begin() + shared / GetParam().block_tokens);
    pool.GiveBack(a), pool.GiveBack(b);
  }
  EXPECT_LE(failures, options.delta * trials);
  if (options.policy == VATTN_POLICY_VERIFIED) {
    EXPECT_GE(verified, trials / 2);
    const vattn_stats stats = pool.runtime().Stats();
    EXPECT_GE(stats.heads_verified, static_cast<uint64_t>(verified));
    EXPECT_GT(stats.rows_selected, 0u);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Pools, PagedSampledTest,
    testing::Values(Sampled{"blocks_of_16", 16, VATTN_F32, VATTN_POLICY_VERIFIED},
                    Sampled{"blocks_of_48", 48, VATTN_BF16, VATTN_POLICY_VERIFIED},
                    Sampled{"blocks_of_256", 256, VATTN_F16, VATTN_POLICY_VERIFIED},
                    Sampled{"topk", 32, VATTN_F32, VATTN_POLICY_TOPK},
                    Sampled{"topk_uniform", 16, VATTN_F32, VATTN_POLICY_TOPK_UNIFORM}),
    [](const auto& info) { return std::string(info.param.name); });

// A row that a query looks for and that is written over is not found any more, and its successor is.
TEST(PagedTest, RewrittenSlotsAreCodedAgain) {
  const Shape shape{4, 2, 64, 64, false, VATTN_F32};
  vattn_options options = OptionsFor(shape);
  options.refresh = 1;
  Pool pool({"", shape, 16, false}, options, 700);
  Request r;
  pool.Grow(r, 6000);
  for (int step = 0; step < 12; ++step) {
    // Every round another token of the middle becomes the needle of the query.
    const int64_t needle = 500 + 397 * step;
    pool.Grow(r, 1);
    const std::vector<float> key = Gaussian(pool.engine(), VATTN_F32, 64, 1);
    Rows before = r.rows;
    for (int c = 0; c < 128; ++c) r.rows.k[needle * 128 + c] = 3 * key[c % 64];
    for (int c = 0; c < 128; ++c) r.rows.v[needle * 128 + c] = 5.f + static_cast<float>(step);
    Request one;
    one.blocks = r.blocks;
    std::vector<int64_t> slots{pool.SlotOf(r, needle)};
    vattn_paged_rows rows;
    vattn_paged_rows_init(&rows, sizeof(rows));
    rows.num_tokens = 1;
    rows.slots = slots.data();
    rows.k = r.rows.k.data() + needle * 128;
    rows.v = r.rows.v.data() + needle * 128;
    Check(vattn_paged_write(pool.get(), &rows, nullptr));
    const PagedCall call = pool.Step({&r}, {1}, 3);
    for (int h = 0; h < 4; ++h) {
      const Answer answer = Attend(shape, r.rows, h / 2, pool.Query(call, 0, 0, h));
      const double ref = std::max(answer.norm, .5 * answer.rms_value);
      EXPECT_LE(Distance(answer, pool.Out(call, 0, 0, h).data()), .5 * ref) << "step " << step;
    }
  }
}

TEST(PagedTest, WrongArgumentsAreNamed) {
  const Shape shape{4, 2, 64, 64, false, VATTN_F32};
  vattn_options options = OptionsFor(shape);
  Pool pool({"", shape, 16, false}, options, 100);
  const auto refused = [&](vattn_code code, const std::string& text) {
    EXPECT_EQ(code, VATTN_INVALID_ARGUMENT);
    EXPECT_NE(std::string(vattn_last_error()).find(text), std::string::npos) << vattn_last_error();
  };
  std::vector<std::byte> memory(1 << 20);
  void* k = memory.data();
  vattn_paged_options o;
  const auto create = [&](auto&& change) {
    vattn_paged_options_init(&o, sizeof(o));
    o.k = &k, o.v = &k;
    o.num_blocks = 10, o.block_stride = 4096, o.token_stride = 128, o.head_stride = 64;
    o.max_tokens = 160;
    change();
    vattn_paged* made = nullptr;
    const vattn_code code = vattn_paged_create(pool.runtime().get(), &o, &made);
    EXPECT_EQ(made, nullptr);
    return code;
  };
  refused(create([&] { o.k = nullptr; }), "k is NULL");
  refused(create([&] { o.v = nullptr; }), "v is NULL");
  refused(create([&] { o.block_tokens = 24; }), "block_tokens is 24, must be a multiple of 16");
  refused(create([&] { o.num_blocks = 0; }), "num_blocks is 0");
  refused(create([&] { o.head_stride = -1; }), "head_stride is -1");
  refused(create([&] { o.max_requests = 4097; }), "max_requests is 4097");
  refused(create([&] { o.max_query_tokens = 17; }), "max_query_tokens is 17");
  refused(create([&] { o.max_tokens = 0; }), "max_tokens is 0");
  refused(create([&] { o.pinned = 2; }), "pinned is 2");
  refused(create([] {}), "tables is NULL");
  const std::string tables = MakeTables(pool.runtime(), shape);
  refused(create([&] { o.tables = tables.c_str(), o.model = "another"; }),
          "model is another, must be that of tables");
  refused(create([&] { o.tables = tables.c_str(), o.code_block_stride = 100; }),
          "code_block_stride is 100");
  EXPECT_EQ(create([&] { o.tables = "/nowhere/tables"; }), VATTN_NOT_FOUND);
  std::filesystem::resize_file(tables, std::filesystem::file_size(tables) - 100);
  EXPECT_EQ(create([&] { o.tables = tables.c_str(); }), VATTN_DATA_LOSS);
  std::filesystem::remove(tables);
  // Tables need tokens to learn from.
  Sequence text(pool.runtime());
  refused(vattn_tables_save(text.get(), tables.c_str(), nullptr),
          "tokens between sinks and window");
  EXPECT_FALSE(std::filesystem::exists(tables));

  vattn_paged_rows rows;
  vattn_paged_rows_init(&rows, sizeof(rows));
  rows.layer = 1;
  refused(vattn_paged_write(pool.get(), &rows, nullptr), "layer is 1");
  rows.layer = 0, rows.num_tokens = 1;
  refused(vattn_paged_write(pool.get(), &rows, nullptr), "slots is NULL");
  const int64_t slot = 5;
  rows.slots = &slot, rows.v = memory.data();
  refused(vattn_paged_write(pool.get(), &rows, nullptr), "v is given, must be NULL");

  PagedCall call;
  vattn_attend_params p = pool.Params(call, 1, VATTN_F32);
  std::vector<float> q(4 * 64), out(4 * 64);
  p.q = q.data(), p.out = out.data();
  refused(vattn_paged_attend(pool.get(), &p, nullptr), "no step is open");
}

// What a step is told wrong is refused on the CPU, and leaves its requests unanswered on CUDA.
TEST(PagedTest, NothingOutsideThePoolIsRead) {
  const Shape shape{4, 2, 64, 64, false, VATTN_F32};
  vattn_options options = OptionsFor(shape);
  options.policy = VATTN_POLICY_DENSE;
  Pool pool({"", shape, 16, false}, options, 100);
  Request good = Request::In(1), bad = Request::In(2);
  pool.Grow(good, 40), pool.Grow(bad, 40);
  struct Fault {
    const char* text;
    void (*make)(std::vector<int32_t>& table, std::vector<int32_t>& lengths,
                 std::vector<int32_t>& starts, std::vector<int32_t>& rows);
  };
  const Fault faults[] = {
      {"block_table[1][2] is 100", [](auto& t, auto&, auto&, auto&) { t[512 + 2] = 100; }},
      {"block_table[1][0] is -1", [](auto& t, auto&, auto&, auto&) { t[512] = -1; }},
      {"lengths[1] is 8193", [](auto&, auto& l, auto&, auto&) { l[1] = 8193; }},
      {"lengths[1] is -5", [](auto&, auto& l, auto&, auto&) { l[1] = -5; }},
      {"query_starts[2] is 42", [](auto&, auto&, auto& s, auto&) { s[2] = 42; }},
      {"request_rows[1] is 8", [](auto&, auto&, auto&, auto& r) { r[1] = 8; }},
      {"request_rows[1] is 1, must be another", [](auto&, auto&, auto&, auto& r) { r[1] = 1; }}};
  uint64_t expected = 0;
  for (const Fault& fault : faults) {
    SCOPED_TRACE(fault.text);
    std::vector<int32_t> table(2 * 512, -1), lengths{40, 40}, starts{0, 1, 2}, rows{1, 2};
    std::copy(good.blocks.begin(), good.blocks.end(), table.begin());
    std::copy(bad.blocks.begin(), bad.blocks.end(), table.begin() + 512);
    fault.make(table, lengths, starts, rows);
    vattn_paged_step step;
    vattn_paged_step_init(&step, sizeof(step));
    step.num_requests = 2;
    step.num_query_tokens = 2;
    step.block_table = table.data();
    step.block_table_stride = 512;
    step.lengths = lengths.data();
    step.query_starts = starts.data();
    step.request_rows = rows.data();
    const vattn_code code = vattn_paged_begin_step(pool.get(), &step, nullptr);
    if (!OnCuda()) {
      EXPECT_EQ(code, VATTN_INVALID_ARGUMENT);
      EXPECT_NE(std::string(vattn_last_error()).find(fault.text), std::string::npos)
          << vattn_last_error();
      continue;
    }
    Check(code);
    PagedCall call;
    call.starts = {0, 1, 2};
    call.q = Gaussian(pool.engine(), VATTN_F32, 2 * 4 * 64, 1);
    call.q_bytes = ToBytes(VATTN_F32, call.q);
    call.out.resize(2 * 4 * 64 * 4);
    call.lse.resize(8), call.error.resize(8), call.verdict.assign(8, -7);
    call.selected.resize(4), call.fetched.resize(4), call.looks.resize(4), call.middle.resize(4);
    vattn_attend_params p = pool.Params(call, 1, VATTN_F32);
    Check(vattn_paged_attend(pool.get(), &p, nullptr));
    pool.ExpectExact(call, 0, good);
    // A start that is out of range may leave no place for NaN.
    if (starts[2] == 2) {
      for (int h = 0; h < 4; ++h) {
        EXPECT_TRUE(std::isnan(pool.Out(call, 1, 0, h)[0]));
        EXPECT_TRUE(std::isnan(call.lse[4 + h]));
        EXPECT_EQ(call.verdict[4 + h], VATTN_VERDICT_BEST_EFFORT);
      }
    }
    EXPECT_EQ(pool.runtime().Stats().requests_refused, ++expected);
  }
}

// Codes in memory of the caller's, with room between blocks, are the bytes that ours would be: answers
// do not change.
TEST(PagedTest, CodesMayLieInMemoryOfTheCaller) {
  if (OnCuda()) GTEST_SKIP() << "device memory is what the engine of paged_engine_test gives";
  const Shape shape{4, 2, 64, 64, false, VATTN_F32};
  const vattn_options options = OptionsFor(shape);
  const Runtime runtime(options);
  const std::string tables = MakeTables(runtime, shape);
  std::vector<std::vector<float>> answers;
  for (const int64_t stride : {int64_t{0}, int64_t{2 * 16 * 32 + 160}}) {
    std::vector<float> k(300 * 16 * 128), v(k.size());
    std::vector<std::byte> codes(static_cast<size_t>(300 * std::max<int64_t>(stride, 1)));
    void *k_at = k.data(), *v_at = v.data(), *codes_at = codes.data();
    vattn_paged_options o;
    vattn_paged_options_init(&o, sizeof(o));
    o.tables = tables.c_str();
    o.k = &k_at, o.v = &v_at;
    o.codes = stride > 0 ? &codes_at : nullptr;
    o.code_block_stride = stride;
    o.num_blocks = 300, o.block_stride = 16 * 128, o.token_stride = 128, o.head_stride = 64;
    o.max_tokens = 4800;
    vattn_paged* paged = nullptr;
    Check(vattn_paged_create(runtime.get(), &o, &paged));
    std::mt19937_64 engine(8);
    Rows rows;
    rows.AddGaussian(shape, engine, 4500);
    std::vector<int64_t> slots(4500);
    std::iota(slots.begin(), slots.end(), 0);
    vattn_paged_rows r;
    vattn_paged_rows_init(&r, sizeof(r));
    r.num_tokens = 4500, r.slots = slots.data(), r.k = rows.k.data(), r.v = rows.v.data();
    Check(vattn_paged_write(paged, &r, nullptr));
    std::vector<int32_t> table(300), starts{0, 1};
    std::iota(table.begin(), table.end(), 0);
    const int32_t length = 4500, row = 0, reset = 1;
    vattn_paged_step step;
    vattn_paged_step_init(&step, sizeof(step));
    step.num_requests = 1, step.num_query_tokens = 1;
    step.block_table = table.data(), step.block_table_stride = 300;
    step.lengths = &length, step.query_starts = starts.data();
    step.request_rows = &row, step.resets = &reset;
    Check(vattn_paged_begin_step(paged, &step, nullptr));
    const std::vector<float> q = Gaussian(engine, VATTN_F32, 4 * 64, 2);
    std::vector<float> out(4 * 64);
    std::vector<int32_t> selected(2);
    vattn_attend_params p = Init<vattn_attend_params>();
    p.q = q.data(), p.out = out.data(), p.selected = selected.data();
    Check(vattn_paged_attend(paged, &p, nullptr));
    EXPECT_LT(selected[0], 2000);
    answers.push_back(out);
    vattn_paged_destroy(paged);
    if (stride == 0) continue;
    // What lies between is the caller's.
    for (int64_t b = 0; b < 300; ++b) {
      for (int64_t i = 2 * 16 * 32; i < stride; ++i)
        ASSERT_EQ(codes[static_cast<size_t>(b * stride + i)], std::byte{0});
    }
  }
  std::filesystem::remove(tables);
  EXPECT_EQ(answers[0], answers[1]);
}

}  // namespace
}  // namespace vattn::test
