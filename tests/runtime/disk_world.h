// A small runtime over a scratch directory, its sequences, and what they hold, for the tests of
// files and of the disk.
#ifndef VATTN_TESTS_RUNTIME_DISK_WORLD_H_
#define VATTN_TESTS_RUNTIME_DISK_WORLD_H_

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "memory/file_ops.h"
#include "memory/status.h"
#include "runtime/files/disk.h"
#include "runtime/prefix/tiers.h"
#include "runtime/runtime.h"
#include "runtime/sequence.h"

namespace vattn {

class ScratchDirectory {
 public:
  ScratchDirectory() {
    std::string pattern = testing::TempDir() + "vattn_disk_XXXXXX";
    EXPECT_NE(mkdtemp(pattern.data()), nullptr);
    path_ = pattern;
  }
  ~ScratchDirectory() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

  std::vector<std::string> Names(const std::string& folder) const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path_ + "/" + folder)) {
      names.push_back(entry.path().filename());
    }
    std::sort(names.begin(), names.end());
    return names;
  }

 private:
  std::string path_;
};

inline Options DiskOptions(bool uring, const std::string& disk_path, int64_t blocks = 64) {
  Options options;
  options.num_layers = 2;
  options.num_q_heads = 4;
  options.num_kv_heads = 2;
  options.head_dim_k = options.head_dim_v = 16;
  options.dtype = DType::kF32;
  options.backend = BackendKind::kCpu;
  options.num_threads = 1;
  options.exact_below = 64;
  options.index_bytes = 32;
  options.disk_path = disk_path;
  options.io_engine = uring ? IoEngine::kAuto : IoEngine::kPread;
  options.io_depth = 2;
  options.io_block_bytes = 64 << 10;
  options.host_bytes = static_cast<uint64_t>(blocks * MakeStorage(options).block.bytes);
  return options;
}

inline std::shared_ptr<Runtime> OpenRuntime(const Options& options, const FileOps& ops,
                                            Logger logger = nullptr) {
  absl::StatusOr<std::shared_ptr<Runtime>> made = Runtime::Create(options, std::move(logger), ops);
  EXPECT_TRUE(made.ok()) << made.status();
  return made.ok() ? *made : nullptr;
}

inline absl::Status AppendRandom(Sequence& sequence, int64_t tokens, uint32_t seed) {
  const Options& o = sequence.runtime().options();
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  for (int l = 0; l < o.num_layers; ++l) {
    const int64_t heads = sequence.runtime().kv_heads(l);
    std::vector<float> k(static_cast<size_t>(tokens * heads * o.head_dim_k)), v(k.size());
    for (float& x : k) x = normal(engine);
    for (float& x : v) x = normal(engine);
    VATTN_RETURN_IF_ERROR(sequence.Append({.layer = l,
                                           .num_tokens = tokens,
                                           .k = k.data(),
                                           .v = v.data(),
                                           .k_token_stride = heads * o.head_dim_k,
                                           .k_head_stride = o.head_dim_k,
                                           .v_token_stride = heads * o.head_dim_v,
                                           .v_head_stride = o.head_dim_v}));
  }
  return absl::OkStatus();
}

// A sequence of `tokens` tokens with codes of its middle.
inline std::unique_ptr<Sequence> MakeSequence(const std::shared_ptr<Runtime>& runtime,
                                              int64_t tokens, uint32_t seed) {
  absl::StatusOr<std::unique_ptr<Sequence>> made = Sequence::Create(runtime, {});
  EXPECT_TRUE(made.ok()) << made.status();
  EXPECT_TRUE(AppendRandom(**made, tokens, seed).ok());
  EXPECT_TRUE((*made)->BuildIndex().ok());
  return *std::move(made);
}

// Everything that attention reads: lengths, rows, codes and index of the first `most` tokens.
inline std::string ContentOf(Sequence& sequence, int64_t most = int64_t{1} << 31) {
  Runtime& runtime = sequence.runtime();
  const Storage& s = runtime.storage();
  std::string content;
  const auto add = [&](const void* data, int64_t bytes) {
    content.append(static_cast<const char*>(data), static_cast<size_t>(bytes));
  };
  for (int l = 0; l < runtime.options().num_layers; ++l) {
    const Layer& layer = sequence.layer(l);
    const int64_t tokens = std::min(layer.tokens, most);
    const int64_t coded = std::min(layer.coded, tokens / kCodeTokens * kCodeTokens);
    add(&tokens, sizeof(tokens));
    add(&coded, sizeof(coded));
    for (const KvHead& kv_head : layer.kv_heads) {
      for (int64_t t = 0; t < tokens; ++t) {
        const std::byte* block =
            runtime.store().data(BlockId{kv_head.blocks[static_cast<size_t>(t / kBlockTokens)]});
        add(block + t % kBlockTokens * s.row.row_bytes, s.row.row_bytes);
        if (t < runtime.options().sinks || t >= coded) continue;
        add(block + s.block.codes + t % kBlockTokens * s.code.bytes(), s.code.bytes());
      }
      for (const SegmentTables& tables : kv_head.tables)
        add(tables.index->floats().data(), Index::NumFloats(s) * 4);
    }
  }
  return content;
}

inline Prefix MakePrefix(const std::string& salt, int64_t tokens, int32_t first = 0) {
  Prefix prefix = {.salt = salt, .tokens = std::vector<int32_t>(static_cast<size_t>(tokens))};
  std::iota(prefix.tokens.begin(), prefix.tokens.end(), first);
  return prefix;
}

}  // namespace vattn

#endif  // VATTN_TESTS_RUNTIME_DISK_WORLD_H_
