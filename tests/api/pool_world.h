// Sequences in a pool that is too small for them, and a model that knows every row they must hold.
// What happens next is asked of a source of numbers: a generator (pool_soak.cc) or the bytes of a
// fuzzer (fuzz/fuzz_calls.cc).
#ifndef VATTN_TESTS_API_POOL_WORLD_H_
#define VATTN_TESTS_API_POOL_WORLD_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/api/attention_model.h"
#include "tests/api/owned_prefix.h"

namespace vattn::test {

struct PoolWorldOptions {
  std::string folder;          // for files; exists, and is empty
  int most_sequences = 24;     // alive at a time
  int64_t most_tokens = 8000;  // that one of them asks for
  // Blocks that all of them would need over blocks that the pool has.
  int scarcity = 10;
  bool spill = false;  // what nobody uses goes to the disk when the pool is full
};
// Tenants 1 and 2 have quotas of a third and a half of the pool; prefixes are kept under two salts.

// What has happened so far.
struct PoolWorldTally {
  int64_t created = 0, appended = 0, tokens_appended = 0, forked = 0, truncated = 0, destroyed = 0,
          saved = 0, restored = 0, hibernated = 0, woken = 0, steps = 0, rows_read = 0, misused = 0,
          reserved = 0, kept = 0, begun = 0, forgotten = 0;
  int64_t refused = 0;     // FULL, with a text that names need, limit and knob
  int64_t over_quota = 0;  // of them: for a tenant's quota
  int64_t covered = 0;     // appends and steps that a reservation covered: never FULL
  double demand = 0;  // sum over operations: blocks that were asked for, over blocks of the pool
};

class PoolWorld {
 public:
  // A number from 0 to end - 1.
  using Source = std::function<uint32_t(uint32_t end)>;

  PoolWorld(const PoolWorldOptions& options, Source source);
  ~PoolWorld();

  // One operation and its checks. std::runtime_error names what did not agree with the model.
  void Operate();
  // Destroys everything; the pool must be whole then: nothing used, and all of it can be reserved.
  void Empty();
  const PoolWorldTally& tally() const { return tally_; }
  vattn_stats Stats() const { return runtime_.Stats(); }

 private:
  static constexpr int kLayers = 2, kSlots = 3, kMostFiles = 6, kTenants = 3, kMostPrefixes = 8;

  // What a sequence must hold: for each layer the number that each token's rows come from.
  struct Content {
    std::vector<uint32_t> seeds[kLayers];
    int64_t tokens() const { return static_cast<int64_t>(seeds[0].size()); }
  };
  struct Known {
    std::unique_ptr<Sequence> sequence;
    Content content;
    int64_t wanted = 0;  // tokens that it goes for
    std::string asleep;  // file that it hibernates in, or empty
    uint64_t tenant = 0;
    int64_t reserve = 0;  // tokens that it has reserved
    bool Covers(int64_t tokens) const { return asleep.empty() && tokens <= reserve; }
  };
  // Token ids that were kept, and the rows that they stand for. It may be gone.
  struct Prefix {
    std::string salt;
    Content content;
  };
  struct File {
    std::string path;
    Content content;
  };

  static Shape LayerShape(int layer);
  static void RowOf(uint32_t seed, int layer, int head, bool value, float* out);
  static Rows RowsOf(const Content& content, int layer);
  static uint64_t BlockBytes();
  static vattn_options RuntimeOptions(uint64_t host_bytes, const char* disk_path);

  uint32_t Draw(int64_t end) { return source_(static_cast<uint32_t>(end)); }
  std::string NewPath();
  // True if done, false if refused as a full pool or quota must refuse.
  bool Try(const std::function<void()>& call);
  Known& Enter(std::unique_ptr<Sequence> sequence, Content content);
  vattn_sequence_options NewOptions();
  static OwnedPrefix ArgumentOf(const std::string& salt, const Content& content);
  void CheckLengths(const Known& one) const;
  void CheckCounters() const;

  void Create();
  void Append(Known& one);
  void Fork(const Known& one);
  void Truncate(Known& one, int64_t tokens);
  void Destroy(size_t index);
  void Save(const Known& one);
  void Restore();
  void Hibernate(Known& one);
  void Wake(Known& one);
  void Reserve(Known& one);
  void Keep(Known& one);
  void Begin();
  void Forget();
  void CheckTenants() const;
  void Step(Known& first);
  void CheckAnswer(const Call& call, int slot, const Content& content);
  // Reads single rows back through attention over one token, all bits of V.
  void ReadRows(Known& one);
  // Calls that must be refused and change nothing.
  void Misuse(Known& one);

  const PoolWorldOptions options_;
  const Source source_;
  const std::string disk_;  // empty without spill
  const uint64_t block_bytes_;
  const int64_t pool_blocks_;
  Runtime runtime_;
  Batch batch_;
  std::vector<std::unique_ptr<Known>> known_;
  std::vector<File> files_;
  std::vector<Prefix> prefixes_;
  PoolWorldTally tally_;
  uint32_t seeds_ = 0;
  int64_t paths_ = 0, wanted_blocks_ = 0;
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_POOL_WORLD_H_
