#include "bench/replay/session.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <utility>

#include "bench/cli/dtype.h"

namespace vattn::bench {
namespace {

// [layers, heads, dim] at one token of a [layers, heads, tokens, dim] tensor.
void Gather(const Tensor& tensor, std::span<const int32_t> layers, int64_t token,
            std::vector<std::byte>* to) {
  const size_t row = tensor.shape[3] * ElementBytes(tensor.dtype);
  to->resize(layers.size() * tensor.shape[1] * row);
  std::byte* out = to->data();
  for (const int32_t layer : layers) {
    for (int64_t head = 0; head < tensor.shape[1]; ++head, out += row) {
      std::memcpy(out, tensor.Row(layer, head, token), row);
    }
  }
}

}  // namespace

Session::Session(const Trace& trace, std::span<const int32_t> layers, const vattn_options& options,
                 NoSequence)
    : trace_(trace),
      layers_(layers),
      runtime_(CreateRuntime(options)),
      batch_(CreateBatch(runtime_.get(), /*slots=*/1)) {
  const size_t num_layers = layers.size();
  result_.out.resize(num_layers * trace.q_heads * trace.head_dim_v);
  result_.error.resize(num_layers * trace.q_heads);
  result_.verdict.resize(num_layers * trace.q_heads);
  for (auto* list : {&result_.selected, &result_.fetched, &result_.looks}) {
    list->resize(num_layers * trace.kv_heads);
  }
  result_.middle.resize(num_layers * trace.kv_heads);
  if (options.index == VATTN_INDEX_EXTERNAL && options.policy != VATTN_POLICY_DENSE)
    scores_.emplace(trace, layers);
}

Session::Session(const Trace& trace, std::span<const int32_t> layers, const vattn_options& options)
    : Session(trace, layers, options, NoSequence()) {
  Take(CreateSequence(runtime_.get(), /*id=*/1));
}

Session::Session(const Trace& trace, std::span<const int32_t> layers, const vattn_options& options,
                 bool prompt_queries)
    : Session(trace, layers, options) {
  Append(0, trace.prompt_tokens,
         prompt_queries ? AppendedQueries::kPrompt : AppendedQueries::kNone);
  BuildIndex();
}

Session::Session(const Trace& trace, std::span<const int32_t> layers, const vattn_options& options,
                 const std::string& path)
    : Session(trace, layers, options, NoSequence()) {
  vattn_sequence* restored = nullptr;
  Check(vattn_sequence_restore(runtime_.get(), path.c_str(), &restored), "vattn_sequence_restore");
  Take(Sequence(restored));
}

void Session::Take(Sequence sequence) {
  sequence_ = std::move(sequence);
  Check(vattn_batch_set(batch_.get(), 0, sequence_.get()), "vattn_batch_set");
}

void Session::Save(const std::string& path) const {
  Check(vattn_sequence_save(sequence_.get(), path.c_str()), "vattn_sequence_save");
}

void Session::Append(int64_t begin, int64_t count, AppendedQueries queries) {
  int64_t first = begin + count;  // position of the first query that is passed
  if (queries == AppendedQueries::kOwn) first = std::max(begin, FirstQuery(trace_));
  if (queries == AppendedQueries::kPrompt)
    first = begin + count - std::min(count, trace_.prompt_queries);
  // With kPrompt, the recording's queries stand in for those of the last tokens.
  const int64_t shift =
      queries == AppendedQueries::kPrompt ? trace_.prompt_tokens - begin - count : 0;
  const int64_t num_queries = std::max<int64_t>(0, begin + count - first);
  for (size_t i = 0; i < layers_.size(); ++i) {
    vattn_append_params params;
    vattn_append_params_init(&params, sizeof(params));
    params.layer = static_cast<int32_t>(i);
    params.num_tokens = count;
    params.k = trace_.k.Row(layers_[i], 0, begin);
    params.k_token_stride = trace_.head_dim_k;
    params.k_head_stride = trace_.tokens * trace_.head_dim_k;
    params.v = trace_.v.Row(layers_[i], 0, begin);
    params.v_token_stride = trace_.head_dim_v;
    params.v_head_stride = trace_.tokens * trace_.head_dim_v;
    if (num_queries > 0) {
      appended_q_.clear();
      const size_t row = trace_.head_dim_k * ElementBytes(trace_.q.dtype);
      for (int64_t position = first; position < begin + count; ++position) {
        for (int64_t head = 0; head < trace_.q_heads; ++head) {
          const std::byte* from = QueryRow(trace_, layers_[i], head, position + shift);
          appended_q_.insert(appended_q_.end(), from, from + row);
        }
      }
      params.num_queries = static_cast<int32_t>(num_queries);
      params.q = appended_q_.data();
    }
    Check(vattn_append(sequence_.get(), &params), "vattn_append");
  }
}

void Session::BuildIndex() {
  Check(vattn_sequence_build_index(sequence_.get()), "vattn_sequence_build_index");
}

void Session::Restart(uint64_t id) {
  vattn_sequence* fork = nullptr;
  Check(vattn_sequence_fork(sequence_.get(), id, &fork), "vattn_sequence_fork");
  Sequence next(fork);
  Check(vattn_batch_set(batch_.get(), 0, fork), "vattn_batch_set");
  fork_ = std::move(next);
}

double Session::StepAt(int64_t position) { return Attend(batch_.get(), position); }

void Session::StepAside(uint64_t id, int64_t position) {
  if (aside_ == nullptr) aside_ = CreateBatch(runtime_.get(), /*slots=*/1);
  vattn_sequence* fork = nullptr;
  Check(vattn_sequence_fork(sequence_.get(), id, &fork), "vattn_sequence_fork");
  const Sequence owner(fork);
  Check(vattn_batch_set(aside_.get(), 0, fork), "vattn_batch_set");
  Attend(aside_.get(), position);
}

double Session::Attend(vattn_batch* batch, int64_t position) {
  if (position < trace_.prompt_tokens) {
    Gather(trace_.q_prompt, layers_, position - FirstQuery(trace_), &q_);
  } else {
    Gather(trace_.q, layers_, position - trace_.prompt_tokens, &q_);
  }
  Gather(trace_.k, layers_, position, &k_);
  Gather(trace_.v, layers_, position, &v_);
  const size_t count = layers_.size();
  const float* scores = scores_ ? scores_->At(position - trace_.prompt_tokens) : nullptr;
  const auto start = std::chrono::steady_clock::now();
  Check(vattn_batch_begin_step(batch, /*new_tokens=*/1, nullptr), "vattn_batch_begin_step");
  for (size_t layer = 0; layer < count; ++layer) {
    const size_t q_head = layer * trace_.q_heads, kv_head = layer * trace_.kv_heads;
    vattn_attend_params params;
    vattn_attend_params_init(&params, sizeof(params));
    params.layer = static_cast<int32_t>(layer);
    params.num_tokens = 1;
    params.out_dtype = VATTN_F32;
    params.q = q_.data() + layer * (q_.size() / count);
    params.k_new = k_.data() + layer * (k_.size() / count);
    params.v_new = v_.data() + layer * (v_.size() / count);
    params.out = &result_.out[q_head * trace_.head_dim_v];
    params.verdict = &result_.verdict[q_head];
    params.error = &result_.error[q_head];
    params.selected = &result_.selected[kv_head];
    params.fetched = &result_.fetched[kv_head];
    params.looks = &result_.looks[kv_head];
    params.middle = &result_.middle[kv_head];
    if (scores_) {
      params.scores = scores + static_cast<int64_t>(q_head) * scores_->stride();
      params.scores_stride = scores_->stride();
      params.score_heads = static_cast<int32_t>(trace_.q_heads);
    }
    Check(vattn_attend(batch, &params, /*stream=*/nullptr), "vattn_attend");
  }
  const auto stop = std::chrono::steady_clock::now();
  return std::chrono::duration<double, std::micro>(stop - start).count();
}

uint64_t Session::bytes_fetched() const {
  vattn_stats stats = {};
  Check(vattn_runtime_stats(runtime_.get(), &stats, sizeof(stats)), "vattn_runtime_stats");
  return stats.bytes_fetched;
}

std::map<std::string, double> Session::counters() const {
  size_t size = 0;
  vattn_stats_prometheus(runtime_.get(), nullptr, 0, &size);
  std::string text(size + 1, '\0');
  Check(vattn_stats_prometheus(runtime_.get(), text.data(), text.size(), &size),
        "vattn_stats_prometheus");
  text.resize(size);
  std::map<std::string, double> counters;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t blank = line.find(' ');
    if (line.empty() || line[0] == '#' || line.find("tenant=") != std::string::npos ||
        blank == std::string::npos)
      continue;
    counters[line.substr(0, blank)] = std::strtod(line.c_str() + blank, nullptr);
  }
  return counters;
}

}  // namespace vattn::bench
