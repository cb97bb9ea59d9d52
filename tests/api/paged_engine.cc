#include "tests/api/paged_engine.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace vattn::test {
namespace {

constexpr int64_t kMaxTokens = 640, kMeanTokens = 320;  // of a request
constexpr int64_t kMaxRunning = 24, kMaxQueries = 4, kMaxChunk = 160;
constexpr int kUntouched = 0x7b;  // of bytes that no call may write
constexpr int32_t kUntouchedWord = 0x7b7b7b7b;

template <class T>
T* As(const DeviceBytes& bytes) {
  return reinterpret_cast<T*>(bytes.host);
}
template <class T>
T* At(const DeviceBytes& bytes) {
  return reinterpret_cast<T*>(bytes.at);
}
int64_t Blocks(int64_t tokens, int32_t block_tokens) {
  return (tokens + block_tokens - 1) / block_tokens;
}

}  // namespace

PagedEngine::PagedEngine(const Runtime& runtime, const TextModel& model, PagedOracle& oracle,
                         const EngineOptions& options)
    : model_(model),
      oracle_(oracle),
      options_(options),
      random_(options.seed),
      device_(MakeEngineDevice()),
      blocks_(kAlive * kMeanTokens / 4 / options.block_tokens) {
  MakePool();
  const Shape& shape = model.shape();
  vattn_paged_options o = Init<vattn_paged_options>();
  o.tables = options.tables.empty() ? nullptr : options.tables.c_str();
  o.model = options.tables.empty() ? nullptr : kModel;
  o.k = keys_.data();
  o.v = shape.shared_kv ? nullptr : values_.data();
  o.num_blocks = blocks_.size();
  o.block_stride = block_stride_, o.token_stride = token_stride_, o.head_stride = head_stride_;
  if (options.owns_codes) {
    vattn_options resolved = runtime.Options();
    o.code_block_stride =
        (int64_t{shape.kv_heads} * options.block_tokens * resolved.index_bytes + 4095) / 4096 *
        4096;
    for (const int32_t heads : model.layer_heads()) {
      const size_t size = static_cast<size_t>(o.code_block_stride * blocks_.size());
      codes_.push_back(heads == 0 ? nullptr : device_->Allocate(size, Place::kDevice).at);
    }
    o.codes = codes_.data();
  }
  o.max_tokens = kMaxTokens;
  o.hot_bytes = options.hot_bytes;
  o.block_tokens = options.block_tokens;
  o.max_requests = kMaxRunning, o.max_query_tokens = kMaxQueries;
  o.pinned = options.pins_pool;
  paged_ = std::make_unique<Paged>(runtime, o);

  for (int32_t row = 0; row < kMaxRunning; ++row) free_rows_.push_back(row);
  const auto ints = [&](int64_t count) {
    return device_->Allocate(static_cast<size_t>(count) * 4, options_.place);
  };
  slots_ = device_->Allocate(kMaxRunning * kMaxQueries * 8, options.place);
  chunk_slots_ = device_->Allocate(kMaxChunk * 8, options.place);
  block_table_ = ints(kMaxRunning * Blocks(kMaxTokens, options.block_tokens));
  lengths_ = ints(kMaxRunning), query_starts_ = ints(kMaxRunning + 1);
  request_rows_ = ints(kMaxRunning), resets_ = ints(kMaxRunning);
  for (int32_t layer = 0; layer < model.num_layers(); ++layer) {
    step_.push_back(MakeArrays(kMaxRunning * kMaxQueries, true));
    chunk_.push_back(MakeArrays(kMaxChunk, false));
  }
}

void PagedEngine::MakePool() {
  const Shape& shape = model_.shape();
  const int64_t tokens = options_.block_tokens, heads = shape.kv_heads;
  const int64_t dim_v = shape.shared_kv ? 0 : shape.dim_v;
  const bool apart = options_.layout == Layout::kTwoArrays;
  const int64_t row = apart ? std::max<int64_t>(shape.dim_k, dim_v) : shape.dim_k + dim_v;
  const bool heads_first = options_.layout == Layout::kHeadsFirst;
  token_stride_ = heads_first ? row : heads * row;
  head_stride_ = heads_first ? tokens * row : row;
  block_stride_ = tokens * heads * row;
  const size_t bytes = static_cast<size_t>(blocks_.size() * block_stride_) * model_.element();
  EngineDevice& memory = options_.pins_pool ? *device_ : *pageable_;
  for (const int32_t layer_heads : model_.layer_heads()) {
    std::byte *k = nullptr, *v = nullptr;
    if (layer_heads > 0) {
      k = memory.Allocate(bytes, Place::kPinned).host;
      v = apart ? memory.Allocate(bytes, Place::kPinned).host
                : k + shape.dim_k * static_cast<int64_t>(model_.element());
    }
    keys_.push_back(k);
    values_.push_back(v);
  }
}

PagedEngine::Arrays PagedEngine::MakeArrays(int64_t tokens, bool report) {
  const Shape& shape = model_.shape();
  const auto make = [&](int64_t count, size_t element) {
    return device_->Allocate(static_cast<size_t>(count) * element, options_.place);
  };
  Arrays a;
  a.k = make(tokens * shape.kv_heads * shape.dim_k, model_.element());
  a.v = make(tokens * shape.kv_heads * shape.dim_v, model_.element());
  a.q = make(tokens * shape.q_heads * shape.dim_k, model_.element());
  a.out = make(tokens * shape.q_heads * shape.dim_v, 4);
  a.lse = make(tokens * shape.q_heads, 4);
  if (!report) return a;
  a.verdict = make(tokens * shape.q_heads, 4), a.error = make(tokens * shape.q_heads, 4);
  for (DeviceBytes* one : {&a.selected, &a.fetched, &a.looks}) {
    *one = make(kMaxRunning * shape.kv_heads, 4);
  }
  a.middle = make(kMaxRunning * shape.kv_heads, 8);
  return a;
}

// Half of the prompts begin with one of four texts.
void PagedEngine::Arrive() {
  while (!stopping_ && alive_ < kAlive) {
    auto request = std::make_unique<Request>();
    const int64_t length = 60 + Below(340);
    const int64_t common = Below(2) == 0 ? std::min<int64_t>(length - 10, 100 + Below(300)) : 0;
    std::mt19937_64 shared(static_cast<uint64_t>(Below(4)));
    for (int64_t i = 0; i < length; ++i) {
      const uint64_t token = i < common ? shared() : random_();
      request->text.Push(static_cast<int32_t>(token % TextModel::kVocabulary));
    }
    request->goal = length + 10 + Below(50);
    request->second_turn = Below(3) == 0;
    waiting_.push_back(std::move(request));
    ++alive_;
  }
}

void PagedEngine::Admit() {
  const int32_t size = options_.block_tokens;
  while (!waiting_.empty() && !free_rows_.empty() && blocks_.free() >= Blocks(kMaxChunk, size)) {
    RequestPtr request = std::move(waiting_.front());
    waiting_.pop_front();
    while (request->computed + size < request->text.size()) {  // one token at least is computed
      int32_t block = blocks_.Share(request->text.hash(request->computed + size - 1));
      if (block < 0 && options_.fault == Fault::kForeignPrefix && Below(16) == 0) {
        block = blocks_.ShareAny(random_());
      }
      if (block < 0) break;
      request->blocks.push_back(block);
      request->computed += size;
      ++tally_.shared_blocks;
    }
    const int64_t any = Below(static_cast<int64_t>(free_rows_.size()));
    std::swap(free_rows_[any], free_rows_.back());
    request->row = free_rows_.back();
    free_rows_.pop_back();
    request->fresh = true;
    running_.push_back(std::move(request));
  }
}

void PagedEngine::Release(Request& request) {
  for (size_t i = request.blocks.size(); i-- > 0;) blocks_.Return(request.blocks[i]);
  request.blocks.clear();
  request.computed = 0;
  free_rows_.push_back(request.row);
}

// The request that came last starts anew when there is room.
void PagedEngine::Preempt() {
  Release(*running_.back());
  waiting_.push_front(std::move(running_.back()));
  running_.pop_back();
  ++tally_.preempted;
}

// What each request does in this step, and blocks for it.
void PagedEngine::Plan() {
  int chunks = 2;
  for (size_t i = 0; i < running_.size(); ++i) {
    Request& request = *running_[i];
    request.draft = request.text;
    request.queries = request.chunk = 0;
    const int64_t left = request.text.size() - request.computed;
    if (left > 1) {
      if (chunks-- > 0) request.chunk = std::min(left, 16 + Below(kMaxChunk - 15));
    } else {
      request.queries = Below(2) == 0 ? 1 : 1 + Below(kMaxQueries);
      for (int64_t draft = 1; draft < request.queries; ++draft) {
        const int32_t next = model_.Next(request.draft, request.draft.size() - 1);
        request.draft.Push(Below(4) > 0 ? next
                                        : static_cast<int32_t>(Below(TextModel::kVocabulary)));
      }
    }
    const int64_t tokens = request.computed + request.queries + request.chunk;
    const size_t needed = static_cast<size_t>(Blocks(tokens, options_.block_tokens));
    while (i < running_.size() && request.blocks.size() < needed) {
      if (blocks_.free() > 0) {
        request.blocks.push_back(blocks_.Take());
      } else {
        Preempt();  // perhaps this very one, which is then no longer in running_
      }
    }
  }
}

int64_t PagedEngine::PutToken(const Request& request, int64_t position, int64_t index,
                              const std::vector<Arrays>& arrays) {
  const Shape& shape = model_.shape();
  const int64_t element = static_cast<int64_t>(model_.element());
  const int64_t block = request.blocks[position / options_.block_tokens];
  const int64_t in_block = position % options_.block_tokens;
  const bool skips_coding = options_.fault == Fault::kSkipCoding && Below(4) == 0;
  const bool skips_rows = options_.fault == Fault::kSkipRows && Below(64) == 0;
  for (int32_t layer = 0; layer < model_.num_layers(); ++layer) {
    const int32_t heads = model_.layer_heads()[layer];
    if (heads == 0) continue;
    const int64_t k_bytes = shape.dim_k * element, v_bytes = shape.dim_v * element;
    std::byte* const k = arrays[layer].k.host + index * heads * k_bytes;
    std::byte* const v = arrays[layer].v.host + index * heads * v_bytes;
    model_.WriteRows(request.draft, position, layer, k, v);
    model_.WriteQueries(request.draft, position, layer,
                        arrays[layer].q.host + index * shape.q_heads * k_bytes);
    if ((!options_.writes_rows && !skips_coding) || skips_rows) continue;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at =
          (block * block_stride_ + in_block * token_stride_ + head * head_stride_) * element;
      std::memcpy(static_cast<std::byte*>(keys_[layer]) + at, k + head * k_bytes, k_bytes);
      if (shape.shared_kv) continue;
      std::memcpy(static_cast<std::byte*>(values_[layer]) + at, v + head * v_bytes, v_bytes);
    }
  }
  return skips_coding || skips_rows ? -1 : block * options_.block_tokens + in_block;
}

vattn_paged_rows PagedEngine::RowsOf(int32_t layer, const DeviceBytes& slots, int64_t tokens,
                                     const Arrays& arrays) const {
  vattn_paged_rows rows = Init<vattn_paged_rows>();
  rows.layer = layer;
  rows.num_tokens = tokens;
  rows.slots = At<const int64_t>(slots);
  if (options_.writes_rows) return rows;
  rows.k = arrays.k.at;
  rows.v = model_.shape().shared_kv ? nullptr : arrays.v.at;
  return rows;
}

// Writes a part of a prompt, or of a second turn, and attends with all of it.
void PagedEngine::Chunk(Request& request) {
  const Shape& shape = model_.shape();
  const int64_t tokens = request.chunk, end = request.computed + tokens;
  for (int64_t t = 0; t < tokens; ++t) {
    As<int64_t>(chunk_slots_)[t] = PutToken(request, request.computed + t, t, chunk_);
  }
  device_->Upload(chunk_slots_, chunk_slots_.size);
  for (int32_t layer = 0; layer < model_.num_layers(); ++layer) {
    if (model_.layer_heads()[layer] == 0) continue;
    const Arrays& arrays = chunk_[layer];
    for (const DeviceBytes& one : {arrays.k, arrays.v, arrays.q}) device_->Upload(one, one.size);
    paged_->Write(RowsOf(layer, chunk_slots_, tokens, arrays), device_->stream());
    device_->Wait();
    vattn_paged_prefill_params params = Init<vattn_paged_prefill_params>();
    params.layer = layer;
    params.out_dtype = VATTN_F32;
    params.num_tokens = tokens, params.length = end;
    params.blocks = request.blocks.data();
    params.q = arrays.q.at, params.out = arrays.out.at;
    params.lse = At<float>(arrays.lse);
    paged_->Prefill(params);
    device_->Download(arrays.out, arrays.out.size), device_->Download(arrays.lse, arrays.lse.size);
    device_->Wait();
    for (int64_t t = layer; t < tokens; t += model_.num_layers()) {  // layers and heads in turn
      const int head = static_cast<int>(t / model_.num_layers() % shape.q_heads);
      const int64_t at = t * shape.q_heads + head;
      oracle_.CheckPrompt(
          request.text, request.computed + t, layer, head,
          {.out = As<float>(arrays.out) + at * shape.dim_v, .lse = As<float>(arrays.lse)[at]});
    }
  }
  request.computed = end;
  ++tally_.chunks;
  if (end == request.text.size()) request.text.Push(model_.Next(request.text, end - 1));
}

// Fills the arrays of a step of `requests` places with up to `queries` tokens each.
void PagedEngine::FillStep(int64_t requests, int64_t queries) {
  const int64_t entries = Blocks(kMaxTokens, options_.block_tokens);
  std::fill_n(As<int64_t>(slots_), kMaxRunning * kMaxQueries, -1);
  int32_t query = 0;
  for (int64_t i = 0; i < requests; ++i) {
    As<int32_t>(query_starts_)[i] = query;
    const bool filled = i < static_cast<int64_t>(running_.size());
    As<int32_t>(lengths_)[i] = 0;
    As<int32_t>(request_rows_)[i] = As<int32_t>(resets_)[i] = -1;
    if (!filled) continue;
    Request& request = *running_[i];
    As<int32_t>(lengths_)[i] = static_cast<int32_t>(request.computed + request.queries);
    As<int32_t>(request_rows_)[i] = request.row;
    As<int32_t>(resets_)[i] = request.fresh;
    for (int64_t t = 0; t < request.queries; ++t, ++query) {
      As<int64_t>(slots_)[query] = PutToken(request, request.computed + t, query, step_);
    }
    if (options_.fault == Fault::kStaleTable && Below(16) == 0) continue;
    int32_t* const table = As<int32_t>(block_table_) + i * entries;
    std::fill_n(table, entries, options_.fault == Fault::kStaleTable ? 0 : -1);
    std::copy(request.blocks.begin(), request.blocks.end(), table);
  }
  As<int32_t>(query_starts_)[requests] = query;
  for (const DeviceBytes& one :
       {slots_, block_table_, lengths_, query_starts_, request_rows_, resets_}) {
    device_->Upload(one, one.size);
  }
  for (int32_t layer = 0; layer < model_.num_layers(); ++layer) {
    const Arrays& a = step_[layer];
    for (const DeviceBytes& one :
         {a.out, a.lse, a.verdict, a.error, a.selected, a.fetched, a.looks, a.middle}) {
      std::memset(one.host, kUntouched, one.size);
      device_->Upload(one, one.size);
    }
    const size_t tokens = static_cast<size_t>(requests * queries);
    for (const DeviceBytes& one : {a.k, a.v, a.q}) {
      device_->Upload(one, one.size / (kMaxRunning * kMaxQueries) * tokens);
    }
  }
}

// One token, or several with drafts, of every request that has its prompt behind it.
void PagedEngine::Decode() {
  int64_t queries = 1;
  for (const RequestPtr& request : running_) queries = std::max(queries, request->queries);
  if (queries > 1) queries = kMaxQueries;
  const int64_t requests = (static_cast<int64_t>(running_.size()) + 7) / 8 * 8;
  if (requests == 0) return;
  FillStep(requests, queries);
  device_->Run(requests * 16 + queries, [&] {
    vattn_paged_step step = Init<vattn_paged_step>();
    step.num_requests = static_cast<int32_t>(requests);
    step.max_query_tokens = static_cast<int32_t>(queries);
    step.num_query_tokens = requests * queries;
    step.block_table = At<const int32_t>(block_table_);
    step.block_table_stride = Blocks(kMaxTokens, options_.block_tokens);
    step.lengths = At<const int32_t>(lengths_);
    step.query_starts = At<const int32_t>(query_starts_);
    step.request_rows = At<const int32_t>(request_rows_);
    step.resets = At<const int32_t>(resets_);
    paged_->BeginStep(step, device_->stream());
    for (int32_t layer = 0; layer < model_.num_layers(); ++layer) {
      if (model_.layer_heads()[layer] == 0) continue;
      const Arrays& a = step_[layer];
      paged_->Write(RowsOf(layer, slots_, requests * queries, a), device_->stream());
      vattn_attend_params params = Init<vattn_attend_params>();
      params.layer = layer;
      params.num_tokens = static_cast<int32_t>(queries);
      params.out_dtype = VATTN_F32;
      params.q = a.q.at, params.out = a.out.at;
      params.lse = At<float>(a.lse), params.error = At<float>(a.error);
      params.verdict = At<int32_t>(a.verdict);
      params.selected = At<int32_t>(a.selected), params.fetched = At<int32_t>(a.fetched);
      params.looks = At<int32_t>(a.looks), params.middle = At<int64_t>(a.middle);
      paged_->Attend(params, device_->stream());
    }
  });
  for (const Arrays& a : step_) {
    for (const DeviceBytes& one : {a.out, a.lse, a.verdict, a.error, a.selected, a.middle}) {
      device_->Download(one, one.size);
    }
  }
  device_->Wait();
  CheckStep(requests, queries);
  for (const RequestPtr& request : running_) {
    if (request->queries > 0) Accept(*request);
  }
}

void PagedEngine::CheckStep(int64_t requests, int64_t queries) {
  const Shape& shape = model_.shape();
  for (int32_t layer = 0; layer < model_.num_layers(); ++layer) {
    const int32_t heads = model_.layer_heads()[layer];
    if (heads == 0) continue;
    const Arrays& a = step_[layer];
    int64_t at = 0;
    for (int64_t i = 0; i < requests; ++i) {
      const Request* request =
          i < static_cast<int64_t>(running_.size()) ? running_[i].get() : nullptr;
      const int64_t tokens = request == nullptr ? 0 : request->queries;
      for (int64_t t = 0; t < tokens; ++t) {
        for (int head = 0; head < shape.q_heads; ++head, ++at) {
          oracle_.CheckStep(request->draft, request->computed + t, layer, head,
                            {.out = As<float>(a.out) + at * shape.dim_v,
                             .lse = As<float>(a.lse)[at],
                             .verdict = As<int32_t>(a.verdict)[at],
                             .error = As<float>(a.error)[at]});
        }
      }
      for (int32_t head = 0; head < heads; ++head) {
        const int32_t selected = As<int32_t>(a.selected)[i * heads + head];
        const int64_t middle = As<int64_t>(a.middle)[i * heads + head];
        const bool right = tokens == 0 ? selected == kUntouchedWord
                                       : selected >= 0 && selected <= middle &&
                                             middle < request->computed + tokens;
        if (!right) throw WrongAnswer("selected is " + std::to_string(selected));
      }
    }
    for (; at < requests * queries * shape.q_heads; ++at) {
      if (As<int32_t>(a.verdict)[at] != kUntouchedWord ||
          As<int32_t>(a.out)[at * shape.dim_v] != kUntouchedWord) {
        throw WrongAnswer("a call wrote behind the step's query tokens");
      }
    }
  }
}

// Takes over the drafts that the model would have written, and one token more.
void PagedEngine::Accept(Request& request) {
  const int64_t first = request.text.size() - 1;
  for (int64_t t = 0; t < request.queries; ++t) {
    const int32_t next = model_.Next(request.draft, first + t);
    request.text.Push(next);
    ++tally_.decoded_tokens;
    if (t + 1 < request.queries && request.draft.token(first + t + 1) != next) {
      tally_.rejected_tokens += request.queries - t - 1;
      break;
    }
  }
  request.computed = request.text.size() - 1;
  request.fresh = false;
}

// Full blocks may be shared from now on; a request that has its goal ends or goes on by a turn.
void PagedEngine::Continue(Request& request) {
  for (int64_t end = options_.block_tokens; end <= request.computed; end += options_.block_tokens) {
    blocks_.Register(request.blocks[end / options_.block_tokens - 1], request.text.hash(end - 1));
  }
  if (request.text.size() < request.goal || !request.second_turn) return;
  request.second_turn = false;
  const int64_t more = 20 + Below(60);
  for (int64_t i = 0; i < more; ++i) {
    request.text.Push(static_cast<int32_t>(Below(TextModel::kVocabulary)));
  }
  request.goal = request.text.size() + 5 + Below(30);
  ++tally_.second_turns;
}

void PagedEngine::Step() {
  Arrive();
  Admit();
  Plan();
  const bool chunks_first = Below(2) == 0;
  for (const bool chunks : {chunks_first, !chunks_first}) {
    if (!chunks) Decode();
    for (size_t i = 0; chunks && i < running_.size(); ++i) {
      if (running_[i]->chunk > 0) Chunk(*running_[i]);
    }
  }
  for (const RequestPtr& request : running_) Continue(*request);
  const auto ended = [](const RequestPtr& one) { return one->text.size() >= one->goal; };
  for (const RequestPtr& request : running_) {
    if (!ended(request)) continue;
    Release(*request);
    --alive_;
    ++tally_.finished;
  }
  running_.erase(std::remove_if(running_.begin(), running_.end(), ended), running_.end());
  ++tally_.steps;
}

void PagedEngine::Finish() {
  stopping_ = true;
  while (!waiting_.empty() || !running_.empty()) Step();
  if (blocks_.free() != blocks_.size()) throw std::runtime_error("blocks are held at the end");
}

EngineTally PagedEngine::tally() const {
  EngineTally tally = tally_;
  tally.reused_blocks = blocks_.reused();
  return tally;
}

}  // namespace vattn::test
