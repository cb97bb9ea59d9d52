// A pool of blocks as an engine has it, with requests in it, for tests of vattn_paged: rows are Gaussian,
// and tables are learnt from others like them.
#ifndef VATTN_TESTS_API_PAGED_POOL_H_
#define VATTN_TESTS_API_PAGED_POOL_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "tests/api/attention_model.h"

namespace vattn::test {

struct PoolLayout {
  const char* name;
  Shape shape;
  int block_tokens;
  bool packed;  // K and V of a token and head side by side, else in two arrays
};

inline std::string TablesPath() {
  return (std::filesystem::temp_directory_path() / ("vattn_paged_" + std::to_string(getpid())))
      .string();
}

// Tables learnt from Gaussian rows: what the rows of these tests are.
inline std::string MakeTables(const Runtime& runtime, const Shape& shape,
                              const char* model = "gauss") {
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

  Pool(const PoolLayout& layout, vattn_options options, int64_t num_blocks,
       const char* model = "gauss", const std::string& whole_tables = "")
      : layout_(layout), shape_(layout.shape), runtime_(options), num_blocks_(num_blocks) {
    const int64_t element = shape_.dtype == VATTN_F32 ? 4 : 2, heads = shape_.kv_heads;
    const int64_t head = shape_.dim_k + (layout.packed ? shape_.dim_v : 0);
    // Elements between blocks that belong to nobody.
    const int64_t gap = 64;
    stride_ = layout.block_tokens * heads * head + gap;
    k_.assign(static_cast<size_t>(num_blocks * stride_ * element), std::byte{0xff});
    if (!layout.packed && !shape_.shared_kv) v_ = k_;
    void* k = k_.data();
    void* v = layout.packed ? k_.data() + shape_.dim_k * element : v_.data();
    const bool coded =
        options.policy != VATTN_POLICY_DENSE && options.index == VATTN_INDEX_BALANCED;
    const bool given = !whole_tables.empty();
    const std::string tables = given ? whole_tables : coded ? MakeTables(runtime_, shape_) : "";
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
    if (coded && !given) std::filesystem::remove(tables);
    Check(code);
    free_.resize(static_cast<size_t>(num_blocks));
    std::iota(free_.begin(), free_.end(), 0);
    std::shuffle(free_.begin(), free_.end(), engine_);
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

  // Attends for `queries` tokens of each request (0: it is passed over), with Gaussian queries unless q
  // has them.
  PagedCall Step(const std::vector<Request*>& requests, const std::vector<int>& queries,
                 float sigma = 1, int32_t out_dtype = VATTN_F32, std::vector<float> q = {}) {
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
    call.q = std::move(q);
    if (call.q.empty())
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

  const PoolLayout layout_;
  const Shape shape_;
  const Runtime runtime_;
  const int64_t num_blocks_;
  int64_t stride_ = 0;
  std::vector<std::byte> k_, v_;
  vattn_paged* paged_ = nullptr;
  std::mt19937_64 engine_{3};
  std::vector<int32_t> free_;
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_PAGED_POOL_H_
