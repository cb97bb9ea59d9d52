// Attention over a pool that the caller owns: any block size and strides, shared blocks, ragged query
// tokens, slots that are written again, prompts, and arguments that are out of range.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "tests/api/attention_model.h"
#include "tests/api/backend.h"

namespace vattn::test {
namespace {

struct Layout {
  const char* name;
  Shape shape;
  int block_tokens;
  bool packed;  // K and V of a token and head side by side, else in two arrays
};

std::string TablesPath() {
  return (std::filesystem::temp_directory_path() / ("vattn_paged_" + std::to_string(getpid())))
      .string();
}

// Tables learnt from Gaussian rows: what the rows of these tests are.
std::string MakeTables(const Runtime& runtime, const Shape& shape, const char* model = "gauss") {
  const std::string path = TablesPath();
  std::mt19937_64 engine(17);
  Rows rows;
  rows.AddGaussian(shape, engine, 3000);
  Sequence text(runtime);
  AppendRows(text, shape, 0, rows);
  Check(vattn_tables_save(text.get(), path.c_str(), model));
  return path;
}

// A request: its rows, and where they are.
struct Request {
  Rows rows;
  std::vector<int32_t> blocks;
  int32_t row = 0;
  bool fresh = true;

  static Request In(int32_t row) {
    Request r;
    r.row = row;
    return r;
  }
};

// Arrays of one step, ragged over its requests.
struct PagedCall {
  std::vector<int32_t> table, lengths, starts{0}, rows, resets;
  std::vector<std::byte> q_bytes, out;
  std::vector<float> q, lse, error;
  std::vector<int32_t> verdict, selected, fetched, looks;
  std::vector<int64_t> middle;
};

class Pool {
 public:
  static constexpr int64_t kMaxTokens = 8192;
  static constexpr int kMaxRequests = 8, kMaxQueries = 5;

  Pool(const Layout& layout, vattn_options options, int64_t num_blocks, const char* model = "gauss")
      : layout_(layout), shape_(layout.shape), runtime_(options), num_blocks_(num_blocks) {
    const int64_t element = shape_.dtype == VATTN_F32 ? 4 : 2, heads = shape_.kv_heads;
    const int64_t head = shape_.dim_k + (layout.packed ? shape_.dim_v : 0);
    const int64_t slots = num_blocks * layout.block_tokens;
    // Elements between blocks that belong to nobody.
    const int64_t gap = 64;
    stride_ = layout.block_tokens * heads * head + gap;
    k_.assign(static_cast<size_t>(num_blocks * stride_ * element), std::byte{0xff});
    if (!layout.packed && !shape_.shared_kv) v_ = k_;
    void* k = k_.data();
    void* v = layout.packed ? k_.data() + shape_.dim_k * element : v_.data();
    const bool coded =
        options.policy != VATTN_POLICY_DENSE && options.index == VATTN_INDEX_BALANCED;
    const std::string tables = coded ? MakeTables(runtime_, shape_) : "";
    vattn_paged_options o;
    vattn_paged_options_init(&o, sizeof(o));
    o.tables = coded ? tables.c_str() : nullptr;
    o.model = coded ? model : nullptr;
    o.k = &k;
    o.v = shape_.shared_kv ? nullptr : &v;
    o.num_blocks = num_blocks;
    o.block_stride = stride_;
    o.token_stride = heads * head;
    o.head_stride = head;
    o.max_tokens = kMaxTokens;
    o.block_tokens = layout.block_tokens;
    o.max_requests = kMaxRequests;
    o.max_query_tokens = kMaxQueries;
    o.hot_bytes = 1 << 20;
    const vattn_code code = vattn_paged_create(runtime_.get(), &o, &paged_);
    if (coded) std::filesystem::remove(tables);
    Check(code);
    free_.resize(static_cast<size_t>(num_blocks));
    std::iota(free_.begin(), free_.end(), 0);
    std::shuffle(free_.begin(), free_.end(), engine_);
    (void)slots;
  }
  ~Pool() { vattn_paged_destroy(paged_); }

  vattn_paged* get() const { return paged_; }
  const Runtime& runtime() const { return runtime_; }
  std::mt19937_64& engine() { return engine_; }

  int64_t SlotOf(const Request& r, int64_t token) const {
    return int64_t{r.blocks[token / layout_.block_tokens]} * layout_.block_tokens +
           token % layout_.block_tokens;
  }
  void TakeBlocks(Request& r, int64_t tokens) {
    while (static_cast<int64_t>(r.blocks.size()) * layout_.block_tokens < tokens) {
      ASSERT_FALSE(free_.empty());
      r.blocks.push_back(free_.back());
      free_.pop_back();
    }
  }
  void GiveBack(Request& r) {
    free_.insert(free_.end(), r.blocks.begin(), r.blocks.end());
    std::shuffle(free_.begin(), free_.end(), engine_);
    r = {};
  }
  // Tokens [from, end) of the request's rows to the pool. by_library: vattn_paged_write copies them,
  // else this test does and the call codes them.
  void Write(Request& r, int64_t from, bool by_library) {
    TakeBlocks(r, r.rows.tokens);
    std::vector<int64_t> slots;
    for (int64_t t = from; t < r.rows.tokens; ++t) slots.push_back(SlotOf(r, t));
    const int64_t k_row = shape_.kv_heads * shape_.dim_k, v_row = shape_.kv_heads * shape_.dim_v;
    const std::vector<std::byte> k = ToBytes(
        shape_.dtype, {r.rows.k.begin() + from * k_row, r.rows.k.begin() + r.rows.tokens * k_row});
    const std::vector<std::byte> v =
        shape_.shared_kv ? std::vector<std::byte>()
                         : ToBytes(shape_.dtype, {r.rows.v.begin() + from * v_row,
                                                  r.rows.v.begin() + r.rows.tokens * v_row});
    if (!by_library) CopyRows(slots, k, v);
    // Padding, as engines have it.
    slots.push_back(-1);
    slots.push_back(num_blocks_ * layout_.block_tokens);
    std::vector<std::byte> padded_k = k, padded_v = v;
    padded_k.resize(k.size() + 2 * static_cast<size_t>(k_row) * 4);
    padded_v.resize(v.size() + 2 * static_cast<size_t>(v_row) * 4);
    vattn_paged_rows rows;
    vattn_paged_rows_init(&rows, sizeof(rows));
    rows.num_tokens = static_cast<int64_t>(slots.size());
    rows.slots = slots.data();
    rows.k = by_library ? padded_k.data() : nullptr;
    rows.v = by_library && !shape_.shared_kv ? padded_v.data() : nullptr;
    Check(vattn_paged_write(paged_, &rows, nullptr));
  }
  // More tokens for a request, written.
  void Grow(Request& r, int64_t tokens, bool by_library = true) {
    const int64_t from = r.rows.tokens;
    r.rows.AddGaussian(shape_, engine_, tokens);
    Write(r, from, by_library);
  }

  // Attends for `queries` tokens of each request (0: it is passed over).
  PagedCall Step(const std::vector<Request*>& requests, const std::vector<int>& queries,
                 float sigma = 1, int32_t out_dtype = VATTN_F32) {
    PagedCall call;
    const int64_t stride = (kMaxTokens + layout_.block_tokens - 1) / layout_.block_tokens;
    const size_t n = requests.size();
    call.table.assign(n * static_cast<size_t>(stride), -1);
    for (size_t i = 0; i < n; ++i) {
      const Request& r = *requests[i];
      std::copy(r.blocks.begin(), r.blocks.end(), call.table.begin() + i * stride);
      call.lengths.push_back(static_cast<int32_t>(r.rows.tokens));
      call.starts.push_back(call.starts.back() + queries[i]);
      call.rows.push_back(queries[i] == 0 ? -1 : r.row);
      call.resets.push_back(r.fresh);
      if (queries[i] > 0) requests[i]->fresh = false;
    }
    const size_t tokens = static_cast<size_t>(call.starts.back());
    const size_t heads = tokens * shape_.q_heads, groups = n * shape_.kv_heads;
    call.q = Gaussian(engine_, shape_.dtype, static_cast<int64_t>(heads) * shape_.dim_k, sigma);
    call.q_bytes = ToBytes(shape_.dtype, call.q);
    call.out.resize(heads * shape_.dim_v * 4);
    call.lse.resize(heads), call.error.resize(heads), call.verdict.assign(heads, -7);
    call.selected.assign(groups, -7), call.fetched.assign(groups, -7);
    call.looks.assign(groups, -7), call.middle.assign(groups, -7);
    vattn_paged_step step;
    vattn_paged_step_init(&step, sizeof(step));
    step.num_requests = static_cast<int32_t>(n);
    step.max_query_tokens = std::max(1, *std::max_element(queries.begin(), queries.end()));
    step.num_query_tokens = static_cast<int64_t>(tokens);
    step.block_table = call.table.data();
    step.block_table_stride = stride;
    step.lengths = call.lengths.data();
    step.query_starts = call.starts.data();
    step.request_rows = call.rows.data();
    step.resets = call.resets.data();
    Check(vattn_paged_begin_step(paged_, &step, nullptr));
    vattn_attend_params p = Params(call, step.max_query_tokens, out_dtype);
    Check(vattn_paged_attend(paged_, &p, nullptr));
    return call;
  }
  vattn_attend_params Params(PagedCall& call, int num_tokens, int32_t out_dtype) const {
    vattn_attend_params p = Init<vattn_attend_params>();
    p.num_tokens = num_tokens;
    p.out_dtype = out_dtype;
    p.q = call.q_bytes.data();
    p.out = call.out.data();
    p.lse = call.lse.data();
    p.verdict = call.verdict.data();
    p.error = call.error.data();
    p.selected = call.selected.data();
    p.fetched = call.fetched.data();
    p.looks = call.looks.data();
    p.middle = call.middle.data();
    return p;
  }

  // The answer of query token t of request i, head h.
  const float* Query(const PagedCall& call, size_t i, int t, int h) const {
    return call.q.data() + (int64_t{call.starts[i] + t} * shape_.q_heads + h) * shape_.dim_k;
  }
  std::vector<float> Out(const PagedCall& call, size_t i, int t, int h,
                         int32_t dtype = VATTN_F32) const {
    const int64_t at = (int64_t{call.starts[i] + t} * shape_.q_heads + h) * shape_.dim_v,
                  element = dtype == VATTN_F32 ? 4 : 2;
    return ToFloats(
        dtype, {call.out.begin() + at * element, call.out.begin() + (at + shape_.dim_v) * element});
  }
  void ExpectExact(const PagedCall& call, size_t i, const Request& r, int32_t dtype = VATTN_F32) {
    const int queries = call.starts[i + 1] - call.starts[i];
    for (int t = 0; t < queries; ++t) {
      for (int h = 0; h < shape_.q_heads; ++h) {
        const Answer answer = Attend(shape_, r.rows, r.rows.tokens - queries + 1 + t,
                                     h / (shape_.q_heads / shape_.kv_heads), Query(call, i, t, h));
        EXPECT_LE(Distance(answer, Out(call, i, t, h, dtype).data()), Tolerance(answer, dtype))
            << "request " << i << " token " << t << " head " << h;
        const int at = (call.starts[i] + t) * shape_.q_heads + h;
        EXPECT_NEAR(call.lse[at], answer.lse, 1e-3);
        EXPECT_EQ(call.error[at], 0);
        EXPECT_EQ(call.verdict[at], VATTN_VERDICT_EXACT);
      }
    }
  }

 private:
  void CopyRows(const std::vector<int64_t>& slots, const std::vector<std::byte>& k,
                const std::vector<std::byte>& v) {
    const int64_t element = shape_.dtype == VATTN_F32 ? 4 : 2, heads = shape_.kv_heads;
    const int64_t head = shape_.dim_k + (layout_.packed ? shape_.dim_v : 0);
    for (size_t i = 0; i < slots.size(); ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = (slots[i] / layout_.block_tokens * stride_ +
                            slots[i] % layout_.block_tokens * heads * head + h * head) *
                           element;
        const int64_t from = static_cast<int64_t>(i) * heads + h;
        std::copy_n(k.begin() + from * shape_.dim_k * element, shape_.dim_k * element,
                    k_.begin() + at);
        if (shape_.shared_kv) continue;
        std::copy_n(v.begin() + from * shape_.dim_v * element, shape_.dim_v * element,
                    layout_.packed ? k_.begin() + at + shape_.dim_k * element : v_.begin() + at);
      }
    }
  }

  const Layout layout_;
  const Shape shape_;
  const Runtime runtime_;
  const int64_t num_blocks_;
  int64_t stride_ = 0;
  std::vector<std::byte> k_, v_;
  vattn_paged* paged_ = nullptr;
  std::mt19937_64 engine_{3};
  std::vector<int32_t> free_;
};

class PagedLayoutTest : public testing::TestWithParam<Layout> {};

TEST_P(PagedLayoutTest, DenseIsExact) {
  const Layout& layout = GetParam();
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
  const Layout& layout = GetParam();
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
    testing::Values(Layout{"two_arrays_16_f32", {4, 4, 64, 64, false, VATTN_F32}, 16, false},
                    Layout{"two_arrays_48_bf16", {12, 2, 128, 128, false, VATTN_BF16}, 48, false},
                    Layout{"packed_32_f16", {6, 2, 96, 96, false, VATTN_F16}, 32, true},
                    Layout{"packed_256_bf16", {8, 2, 64, 128, false, VATTN_BF16}, 256, true},
                    Layout{"two_arrays_512_bf16", {8, 1, 256, 256, false, VATTN_BF16}, 512, false},
                    Layout{"mla_64_bf16", {16, 1, 576, 512, true, VATTN_BF16}, 64, false}),
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
  if (OnCuda()) GTEST_SKIP() << "device memory is in cuda_paged_test";
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
