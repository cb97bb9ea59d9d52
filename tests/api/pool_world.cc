#include "tests/api/pool_world.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <utility>

namespace vattn::test {
namespace {

constexpr int kQHeads = 4, kDim = 16, kBlockTokens = 256;
constexpr int kKvHeads[] = {2, 1};
constexpr int kBlockHeads = 3;  // KV heads of all layers: blocks that 256 tokens need

void Expect(bool right, const std::string& what) {
  if (!right) throw std::runtime_error(what);
}

int64_t BlocksFor(int64_t tokens) {
  return (tokens + kBlockTokens - 1) / kBlockTokens * kBlockHeads;
}

}  // namespace

Shape PoolWorld::LayerShape(int layer) {
  return {kQHeads, kKvHeads[layer], kDim, kDim, false, VATTN_F32};
}

// Rows follow from a number per token: the model needs four bytes a token and layer.
void PoolWorld::RowOf(uint32_t seed, int layer, int head, bool value, float* out) {
  uint64_t state =
      (uint64_t{seed} << 8) + static_cast<uint64_t>(layer * 4 + head * 2 + (value ? 1 : 0));
  for (int i = 0; i < kDim; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    out[i] = static_cast<float>(static_cast<int32_t>(state >> 32)) * 0x1p-30f;  // -2 to 2
  }
}

Rows PoolWorld::RowsOf(const Content& content, int layer) {
  const int heads = kKvHeads[layer];
  Rows rows;
  rows.tokens = static_cast<int64_t>(content.seeds[layer].size());
  rows.k.resize(static_cast<size_t>(rows.tokens * heads * kDim));
  rows.v.resize(rows.k.size());
  for (int64_t t = 0; t < rows.tokens; ++t) {
    for (int h = 0; h < heads; ++h) {
      const int64_t at = (t * heads + h) * kDim;
      RowOf(content.seeds[layer][t], layer, h, false, rows.k.data() + at);
      RowOf(content.seeds[layer][t], layer, h, true, rows.v.data() + at);
    }
  }
  return rows;
}

vattn_options PoolWorld::RuntimeOptions(uint64_t host_bytes, const char* disk_path) {
  vattn_options options = OptionsFor(LayerShape(0));
  options.backend = VATTN_BACKEND_CPU;
  options.num_layers = kLayers;
  options.layer_kv_heads = kKvHeads;
  options.policy = VATTN_POLICY_DENSE;  // answers are exact; codes are made all the same
  options.window = 32;
  options.exact_below = 64;
  options.index_bytes = 16;
  options.hot_share = 0;
  options.huge_pages = 0;
  options.host_bytes = host_bytes;
  options.disk_path = disk_path;
  options.spill = disk_path != nullptr ? 1 : 0;
  options.io_block_bytes = 1 << 16;
  return options;
}

uint64_t PoolWorld::BlockBytes() {
  static const uint64_t bytes = [] {
    const Runtime probe(RuntimeOptions(1 << 20, nullptr));
    const Sequence sequence(probe, 0, 1);
    return probe.Stats().host_bytes_used / kBlockHeads;
  }();
  return bytes;
}

PoolWorld::PoolWorld(const PoolWorldOptions& options, Source source)
    : options_(options),
      source_(std::move(source)),
      disk_(options.spill ? options.folder + "/disk" : ""),
      block_bytes_(BlockBytes()),
      // Sequences ask for half of most_tokens on average.
      pool_blocks_(std::max<int64_t>(1, options.most_sequences *
                                            BlocksFor(options.most_tokens / 2) / kBlockHeads /
                                            options.scarcity) *
                   kBlockHeads),
      runtime_(RuntimeOptions(static_cast<uint64_t>(pool_blocks_) * block_bytes_,
                              options.spill ? disk_.c_str() : nullptr)),
      batch_(runtime_, kSlots) {
  const uint64_t bytes = static_cast<uint64_t>(pool_blocks_) * block_bytes_;
  Check(vattn_tenant_limit(runtime_.get(), 1, bytes / 3));
  Check(vattn_tenant_limit(runtime_.get(), 2, bytes / 2));
}

PoolWorld::~PoolWorld() = default;

void PoolWorld::Operate() {
  const uint32_t choice = Draw(100);
  if (known_.empty() ||
      (choice < 12 && known_.size() < static_cast<size_t>(options_.most_sequences))) {
    Create();
  } else if (choice < 15) {
    Restore();
  } else if (choice < 18) {
    Begin();
  } else {
    const size_t index = Draw(static_cast<int64_t>(known_.size()));
    Known& one = *known_[index];
    if (choice < 24) {
      Destroy(index);
    } else if (!one.asleep.empty()) {
      Wake(one);
    } else if (choice < 55) {
      Append(one);
    } else if (choice < 60) {
      Fork(one);
    } else if (choice < 62) {
      Reserve(one);
    } else if (choice < 70) {
      Truncate(one, Draw(one.content.tokens() + 1));
    } else if (choice < 72) {
      Save(one);
    } else if (choice < 74) {
      Keep(one);
    } else if (choice < 78) {
      Hibernate(one);
    } else if (choice < 88) {
      Step(one);
    } else if (choice < 96) {
      ReadRows(one);
    } else if (choice < 97) {
      Try([&] { one.sequence->BuildIndex(); });
    } else {
      Misuse(one);
    }
  }
  CheckCounters();
  CheckTenants();
  tally_.demand += static_cast<double>(wanted_blocks_) / static_cast<double>(pool_blocks_);
}

void PoolWorld::Empty() {
  while (!known_.empty()) Destroy(known_.size() - 1);
  while (!prefixes_.empty()) Forget();
  const vattn_stats stats = runtime_.Stats();
  Expect(stats.host_bytes_used == 0 && stats.tokens == 0 && stats.sequences == 0,
         "an empty runtime uses " + std::to_string(stats.host_bytes_used) + " bytes, " +
             std::to_string(stats.tokens) + " tokens and " + std::to_string(stats.sequences) +
             " sequences");
  const Sequence all(runtime_, 0, pool_blocks_ / kBlockHeads * kBlockTokens);
  batch_.Set(0, all);  // is not spilled from there
  Expect(runtime_.Stats().host_bytes_used == stats.host_bytes_limit, "not all of the pool is free");
  Expect(!Try([&] { const Sequence more(runtime_, 0, 1); }), "a pool gives more than it has");
}

std::string PoolWorld::NewPath() { return options_.folder + "/" + std::to_string(paths_++); }

bool PoolWorld::Try(const std::function<void()>& call) {
  try {
    call();
    return true;
  } catch (const Error& error) {
    const std::string text = error.what();
    Expect(error.code() == VATTN_FULL,
           std::string("refused with ") + vattn_code_name(error.code()) + ": " + text);
    long long need = 0, block = 0, free = 0;
    const char* numbers = std::strstr(text.c_str(), "need ");
    Expect(numbers != nullptr && std::sscanf(numbers, "need %lld blocks of %lld bytes, %lld of",
                                             &need, &block, &free) == 3,
           "a refusal without numbers: " + text);
    const bool quota = text.find(" is at its quota") != std::string::npos;
    Expect(need > free && text.find("limit") != std::string::npos &&
               text.find(quota ? "tenant_bytes" : "host_bytes") != std::string::npos,
           "a refusal without a reason: " + text);
    ++tally_.refused;
    tally_.over_quota += quota;
    return false;
  }
}

PoolWorld::Known& PoolWorld::Enter(std::unique_ptr<Sequence> sequence, Content content) {
  auto one = std::make_unique<Known>();
  one->sequence = std::move(sequence);
  one->content = std::move(content);
  one->wanted = std::max(one->content.tokens(), 1 + int64_t{Draw(options_.most_tokens)});
  wanted_blocks_ += BlocksFor(one->wanted);
  known_.push_back(std::move(one));
  CheckLengths(*known_.back());
  return *known_.back();
}

vattn_sequence_options PoolWorld::NewOptions() {
  vattn_sequence_options options = Init<vattn_sequence_options>();
  options.tenant = Draw(kTenants);
  options.reserve_tokens = Draw(6) == 0 ? Draw(800) : 0;
  return options;
}

void PoolWorld::CheckLengths(const Known& one) const {
  for (int layer = 0; layer < kLayers; ++layer) {
    const int64_t tokens = one.sequence->Length(layer);
    Expect(tokens == static_cast<int64_t>(one.content.seeds[layer].size()),
           "layer " + std::to_string(layer) + " has " + std::to_string(tokens) + " tokens, not " +
               std::to_string(one.content.seeds[layer].size()));
  }
}

void PoolWorld::CheckCounters() const {
  const vattn_stats stats = runtime_.Stats();
  uint64_t tokens = 0;
  for (const auto& one : known_) {
    for (const auto& seeds : one->content.seeds) tokens += one->asleep.empty() ? seeds.size() : 0;
  }
  Expect(stats.sequences == known_.size(), "sequences are miscounted");
  Expect(options_.spill ? stats.tokens <= tokens : stats.tokens == tokens, "tokens are miscounted");
  Expect(stats.full_refusals == static_cast<uint64_t>(tally_.refused), "refusals are miscounted");
  Expect(stats.quota_refusals == static_cast<uint64_t>(tally_.over_quota),
         "refusals for a quota are miscounted");
  Expect(stats.host_bytes_used <= stats.host_bytes_limit, "more is used than there is");
}

void PoolWorld::Create() {
  const vattn_sequence_options o = NewOptions();
  std::unique_ptr<Sequence> made;
  const auto create = [&] {
    made = std::make_unique<Sequence>(runtime_, 0, o.reserve_tokens, o.tenant);
  };
  if (!Try(create)) return;
  Known& one = Enter(std::move(made), {});
  one.tenant = o.tenant;
  one.reserve = o.reserve_tokens;
  ++tally_.created;
}

void PoolWorld::Append(Known& one) {
  const int64_t before = one.content.tokens(), room = one.wanted - before;
  if (room < 1) return;
  const int64_t count = 1 + Draw(std::min<int64_t>(room, Draw(2) == 0 ? 20 : 700));
  Content added;
  for (auto& seeds : added.seeds) {
    for (int64_t t = 0; t < count; ++t) seeds.push_back(seeds_++);
  }
  for (int layer = 0; layer < kLayers; ++layer) {
    const Rows rows = RowsOf(added, layer);
    vattn_append_params params = Init<vattn_append_params>();
    params.layer = layer;
    params.num_tokens = count;
    params.k = rows.k.data();
    params.v = rows.v.data();
    if (!Try([&] { one.sequence->Append(params); })) {
      Expect(!one.Covers(before + count), "an append is FULL that a reservation covers");
      CheckLengths(one);
      return Truncate(one, before);
    }
    tally_.covered += one.Covers(before + count);
    auto& seeds = one.content.seeds[layer];
    seeds.insert(seeds.end(), added.seeds[layer].begin(), added.seeds[layer].end());
  }
  ++tally_.appended;
  tally_.tokens_appended += count;
}

void PoolWorld::Fork(const Known& one) {
  if (known_.size() >= static_cast<size_t>(options_.most_sequences)) return;
  std::unique_ptr<Sequence> made;
  if (!Try([&] { made = std::make_unique<Sequence>(one.sequence->Fork()); })) return;
  Enter(std::move(made), one.content).tenant = one.tenant;
  ++tally_.forked;
}

void PoolWorld::Truncate(Known& one, int64_t tokens) {
  if (!Try([&] { one.sequence->Truncate(tokens); })) return CheckLengths(one);
  for (auto& seeds : one.content.seeds) {
    seeds.resize(std::min<size_t>(seeds.size(), static_cast<size_t>(tokens)));
  }
  CheckLengths(one);
  ++tally_.truncated;
}

void PoolWorld::Destroy(size_t index) {
  if (!known_[index]->asleep.empty()) std::filesystem::remove(known_[index]->asleep);
  wanted_blocks_ -= BlocksFor(known_[index]->wanted);
  known_.erase(known_.begin() + static_cast<ptrdiff_t>(index));
  ++tally_.destroyed;
}

void PoolWorld::Save(const Known& one) {
  if (files_.size() < kMostFiles) files_.push_back({NewPath(), {}});
  File& file = files_[Draw(static_cast<int64_t>(files_.size()))];  // may replace an older one
  if (!Try([&] { one.sequence->Save(file.path); })) return;
  file.content = one.content;
  ++tally_.saved;
}

void PoolWorld::Restore() {
  if (files_.empty() || known_.size() >= static_cast<size_t>(options_.most_sequences)) return;
  const File& file = files_[Draw(static_cast<int64_t>(files_.size()))];
  if (!std::filesystem::exists(file.path)) return;  // entered, but not written
  const vattn_sequence_options o = NewOptions();
  std::unique_ptr<Sequence> made;
  const auto restore = [&] {
    made = std::make_unique<Sequence>(Sequence::Restore(runtime_, file.path, o));
  };
  if (!Try(restore)) return;
  Known& one = Enter(std::move(made), file.content);
  one.tenant = o.tenant;
  one.reserve = o.reserve_tokens;
  ++tally_.restored;
}

void PoolWorld::Hibernate(Known& one) {
  const std::string path = NewPath();
  if (!Try([&] { one.sequence->Hibernate(path); })) return;
  one.asleep = path;
  ++tally_.hibernated;
}

void PoolWorld::Wake(Known& one) {
  if (!Try([&] { one.sequence->Wake(); })) return;
  std::filesystem::remove(one.asleep);
  one.asleep.clear();
  CheckLengths(one);
  ++tally_.woken;
}

}  // namespace vattn::test
