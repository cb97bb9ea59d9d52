#include "api/llama_cpp/range.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <string>

#include "ggml.h"

namespace vattn::llama_cpp {
namespace {

constexpr int64_t kBlock = 256;         // cells of a block: any multiple of 16 would do
constexpr int64_t kQueries = 128;       // tokens whose queries are kept
constexpr int64_t kLeastQueries = 32;   // that tables are learnt with
constexpr int64_t kLeastTaught = 1536;  // cells that tables are learnt from at least
constexpr int64_t kRelearn = 4;  // tables are learnt again when the run has become so much longer
constexpr int64_t kAhead = 64;   // cells that are coded together, before they leave the window
constexpr int64_t kStride = 16;  // of the cells whose tags are compared in every call

int64_t Blocks(int64_t cells) { return (cells + kBlock - 1) / kBlock; }

// A name that no other process or range uses.
std::string TablesPath(const void* owner) {
  return (std::filesystem::temp_directory_path() /
          ("ggml-vattn-" + std::to_string(getpid()) + "-" +
           std::to_string(reinterpret_cast<uintptr_t>(owner)) + ".tables"))
      .string();
}

}  // namespace

Range::Range(const FlashAttention& f, int64_t begin)
    : begin_(begin),
      k_(f.k + begin * f.cell_stride),
      v_(f.v + begin * f.cell_stride),
      cell_stride_(f.cell_stride),
      head_stride_(f.head_stride),
      capacity_(f.capacity - begin),
      tag_bytes_(std::min<int64_t>(64, int64_t{2} * f.shape.head_dim_k)),
      blocks_(static_cast<size_t>(Blocks(capacity_))) {
  std::iota(blocks_.begin(), blocks_.end(), 0);
}

int32_t Range::MostQueries(const Shape& shape) {
  return std::min(16, 1024 / (shape.q_heads / shape.kv_heads));
}

bool Range::See(const FlashAttention& f, int64_t end) {
  const int64_t length = end - begin_, fresh = length - f.num_tokens;
  const bool plain = fresh == length_;
  if (!plain) suspect_ = true;
  ++calls_;
  coded_ = std::min(coded_, fresh);
  length_ = length;
  TakeQueries(f);
  return plain;
}

void Range::SeeOther(int64_t begin, int64_t end) {
  if (end > begin_) coded_ = std::min(coded_, std::max<int64_t>(0, begin - begin_));
}

void Range::TakeQueries(const FlashAttention& f) {
  const size_t width = static_cast<size_t>(f.shape.q_heads) * f.shape.head_dim_k;
  queries_.resize(kQueries * width);
  // Of a long chunk half of the ring is renewed, by tokens evenly spread.
  const int64_t take = std::min<int64_t>(f.num_tokens, kQueries / 2);
  for (int64_t i = 0; i < take; ++i) {
    const int64_t token = (i + 1) * f.num_tokens / take - 1;
    uint16_t* const to = queries_.data() + (queries_seen_++ % kQueries) * width;
    for (int h = 0; h < f.shape.q_heads; ++h) {
      ggml_fp32_to_fp16_row(f.q + token * f.q_token_stride + h * f.q_head_stride,
                            to + static_cast<size_t>(h) * f.shape.head_dim_k, f.shape.head_dim_k);
    }
  }
}

// False: one is too large for fp16.
bool Range::RoundQueries(const FlashAttention& f) {
  const int64_t dim = f.shape.head_dim_k;
  q_.resize(static_cast<size_t>(f.num_tokens) * f.shape.q_heads * dim);
  for (int64_t t = 0; t < f.num_tokens; ++t) {
    for (int h = 0; h < f.shape.q_heads; ++h) {
      ggml_fp32_to_fp16_row(f.q + t * f.q_token_stride + h * f.q_head_stride,
                            q_.data() + (t * f.shape.q_heads + h) * dim, dim);
    }
  }
  return std::none_of(q_.begin(), q_.end(), [](uint16_t q) { return (q & 0x7C00) == 0x7C00; });
}

Paged Range::MakePool(const FlashAttention& f, const Runtime& runtime, const char* tables) const {
  void* const k = k_;
  void* const v = v_;
  vattn_paged_options o = Init<vattn_paged_options>();
  o.tables = tables;
  o.k = &k;
  o.v = &v;
  o.num_blocks = Blocks(capacity_);
  o.block_stride = kBlock * cell_stride_;
  o.token_stride = cell_stride_;
  o.head_stride = head_stride_;
  o.max_tokens = capacity_;
  o.block_tokens = kBlock;
  o.max_requests = 1;
  o.max_query_tokens = MostQueries(f.shape);
  return Paged(runtime, o);
}

bool Range::Step(const FlashAttention& f, Paged& pool, bool first) {
  if (!RoundQueries(f)) return false;
  const int32_t length = static_cast<int32_t>(length_), row = 0, reset = first ? 1 : 0;
  const int32_t starts[2] = {0, f.num_tokens};
  vattn_paged_step step = Init<vattn_paged_step>();
  step.num_requests = 1;
  step.max_query_tokens = f.num_tokens;
  step.num_query_tokens = f.num_tokens;
  step.block_table = blocks_.data();
  step.block_table_stride = static_cast<int64_t>(blocks_.size());
  step.lengths = &length;
  step.query_starts = starts;
  step.request_rows = &row;
  step.resets = &reset;
  pool.BeginStep(step);
  const size_t heads = static_cast<size_t>(f.num_tokens) * f.shape.q_heads;
  verdicts_.assign(heads, VATTN_VERDICT_EXACT);
  errors_.assign(heads, 0);
  vattn_attend_params a = Init<vattn_attend_params>();
  a.num_tokens = f.num_tokens;
  a.out_dtype = VATTN_F32;
  a.q = q_.data();
  a.out = f.out;
  a.verdict = verdicts_.data();
  a.error = errors_.data();
  pool.Attend(a);
  // An answer that is not finite has no finite bound.
  for (size_t i = 0; i < heads; ++i) {
    if (verdicts_[i] == VATTN_VERDICT_BEST_EFFORT && !std::isfinite(errors_[i])) return false;
  }
  return true;
}

bool Range::Dense(const FlashAttention& f, Runtimes& runtimes, int32_t threads) {
  if (!dense_)
    dense_.emplace(MakePool(f, runtimes.Get(f.shape, VATTN_POLICY_DENSE, threads), nullptr));
  return Step(f, *dense_, false);
}

bool Range::Chunk(const FlashAttention& f, Runtimes& runtimes, int32_t threads) {
  if (!dense_)
    dense_.emplace(MakePool(f, runtimes.Get(f.shape, VATTN_POLICY_DENSE, threads), nullptr));
  if (!RoundQueries(f)) return false;
  vattn_paged_prefill_params p = Init<vattn_paged_prefill_params>();
  p.num_tokens = f.num_tokens;
  p.out_dtype = VATTN_F32;
  p.length = length_;
  p.blocks = blocks_.data();
  p.q = q_.data();
  p.out = f.out;
  dense_->Prefill(p);
  return std::all_of(f.out, f.out + int64_t{f.num_tokens} * f.shape.q_heads * f.shape.head_dim_v,
                     [](float x) { return std::isfinite(x); });
}

bool Range::CanVerify() const {
  return verified_ || (queries_seen_ >= kLeastQueries && length_ >= kLeastTaught);
}

bool Range::Verified(const FlashAttention& f, Runtimes& runtimes, int32_t threads,
                     Counters& counters) {
  const auto start = std::chrono::steady_clock::now();
  KeepUp(f, runtimes, threads, counters);
  counters.upkeep_ns += static_cast<uint64_t>(
      std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count());
  const bool first = !begun_;
  begun_ = true;
  return Step(f, *verified_, first);
}

void Range::KeepUp(const FlashAttention& f, Runtimes& runtimes, int32_t threads,
                   Counters& counters) {
  if (verified_) {
    bool changed = suspect_;
    for (int64_t i = phase_; i < coded_ && !changed; i += kStride) changed = tags_[i] != Tag(i);
    phase_ = (phase_ + 1) % kStride;
    if (changed) Check(counters);
    // Tables of a short text serve a longer one badly.
    if (length_ > kRelearn * taught_) verified_.reset();
  }
  suspect_ = false;
  const Runtime& runtime = runtimes.Get(f.shape, VATTN_POLICY_VERIFIED, threads);
  if (!verified_) Learn(f, runtime, counters);
  const int64_t old = length_ - f.num_tokens, needed = old - runtimes.options().window;
  if (coded_ >= needed) return;
  std::vector<int64_t> cells(static_cast<size_t>(std::min(old, needed + kAhead) - coded_));
  std::iota(cells.begin(), cells.end(), coded_);
  coded_ += static_cast<int64_t>(cells.size());
  tags_.resize(static_cast<size_t>(coded_));
  Code(cells, counters);
}

uint64_t Range::Tag(int64_t cell) const {
  const char* const key = reinterpret_cast<const char*>(k_ + cell * cell_stride_);
  uint64_t tag = 0x9E3779B97F4A7C15;
  for (int64_t i = 0; i < tag_bytes_; i += 8) {
    uint64_t word;
    std::memcpy(&word, key + i, sizeof(word));
    tag = (tag ^ word) * 0xD6E8FEB86659FD93;
    tag ^= tag >> 32;
  }
  return tag;
}

void Range::Code(std::vector<int64_t>& cells, Counters& counters) {
  for (const int64_t cell : cells) tags_[static_cast<size_t>(cell)] = Tag(cell);
  vattn_paged_rows rows = Init<vattn_paged_rows>();
  rows.num_tokens = static_cast<int64_t>(cells.size());
  rows.slots = cells.data();
  verified_->Write(rows);
  counters.cells_coded += cells.size();
}

void Range::Check(Counters& counters) {
  ++counters.checks;
  std::vector<int64_t> stale;
  for (int64_t i = 0; i < coded_; ++i) {
    if (tags_[static_cast<size_t>(i)] != Tag(i)) stale.push_back(i);
  }
  if (static_cast<int64_t>(stale.size()) > coded_ / 2) {
    // Another text: tables are learnt anew.
    verified_.reset();
    ++counters.codes_dropped;
    return;
  }
  if (stale.empty()) return;
  Code(stale, counters);
  counters.cells_recoded += stale.size();
}

void Range::Learn(const FlashAttention& f, const Runtime& runtime, Counters& counters) {
  coded_ = 0;
  begun_ = false;
  taught_ = length_;
  // Of a long run, pieces that are evenly spread.
  const int64_t pieces = length_ > kMostTaught ? 8 : 1;
  const int64_t each = std::min(length_, kMostTaught) / pieces;
  Sequence sequence(runtime);
  for (int64_t p = 0; p < pieces; ++p) {
    const int64_t first = pieces == 1 ? 0 : p * (length_ - each) / (pieces - 1);
    vattn_append_params a = Init<vattn_append_params>();
    a.num_tokens = each;
    a.k = k_ + first * cell_stride_;
    a.v = v_ + first * cell_stride_;
    a.k_token_stride = a.v_token_stride = cell_stride_;
    a.k_head_stride = a.v_head_stride = head_stride_;
    if (p == pieces - 1) {
      a.num_queries = static_cast<int32_t>(std::min(queries_seen_, kQueries));
      a.q = queries_.data();
    }
    sequence.Append(a);
  }
  const std::string path = TablesPath(this);
  sequence.SaveTables(path);
  struct Removed {
    const std::string& path;
    ~Removed() { std::remove(path.c_str()); }
  } const removed{path};
  verified_.emplace(MakePool(f, runtime, path.c_str()));
  ++counters.tables_learnt;
}

}  // namespace vattn::llama_cpp
