// An inference engine as others write them, over a paged KV of its own and the C API alone:
// continuous batching, chunked prompts, second turns, speculative steps, prefixes shared by block,
// preemption when blocks run out, and blocks used again as soon as they are free. Every answer goes
// to an oracle.
#ifndef VATTN_TESTS_API_PAGED_ENGINE_H_
#define VATTN_TESTS_API_PAGED_ENGINE_H_

#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/api/block_manager.h"
#include "tests/api/engine_device.h"
#include "tests/api/paged_oracle.h"
#include "tests/api/text_model.h"

namespace vattn::test {

// Mistakes that the oracle must find.
enum class Fault {
  kNone,
  kSkipCoding,     // rows change behind the library's back
  kSkipRows,       // slots keep what they had
  kStaleTable,     // a row of the block table is not brought up to date
  kForeignPrefix,  // a block of another text counts as shared
};

// How the pool lies in memory.
enum class Layout {
  kTwoArrays,   // K and V apart, [block, token, head, dim]
  kPacked,      // one array, [block, token, head, dim_k + dim_v]
  kHeadsFirst,  // one array, [block, head, token, dim_k + dim_v]
};

struct EngineOptions {
  int32_t block_tokens = 16;
  Layout layout = Layout::kTwoArrays;
  bool writes_rows = false;  // new rows are put into the pool by the engine, not by the library
  bool owns_codes = false;   // memory for codes is the engine's
  bool pins_pool = true;     // CUDA: the pool is page-locked by the engine
  Place place = Place::kDevice;
  uint64_t hot_bytes = 0;  // CUDA
  uint64_t seed = 1;
  Fault fault = Fault::kNone;
  std::string tables = {};  // a file, "" with policy dense
};

struct EngineTally {
  int64_t steps = 0, finished = 0, preempted = 0, shared_blocks = 0, reused_blocks = 0;
  int64_t second_turns = 0, rejected_tokens = 0, decoded_tokens = 0, chunks = 0;
};

class PagedEngine {
 public:
  // Requests that are alive; the pool has blocks for a quarter of what they need.
  static constexpr int kAlive = 64;
  static constexpr const char* kModel = "made-up numbers";

  // The model and the oracle outlive it.
  PagedEngine(const Runtime& runtime, const TextModel& model, PagedOracle& oracle,
              const EngineOptions& options);
  ~PagedEngine() { device_->Wait(); }

  void Step();
  // Ends every request, and checks that no block is held any more.
  void Finish();
  EngineTally tally() const;

 private:
  struct Request {
    Text text;             // prompt and answers
    int64_t computed = 0;  // tokens whose rows are in its blocks
    int64_t goal = 0;      // tokens when it is done, or has its second turn
    bool second_turn = false;
    std::vector<int32_t> blocks;
    int32_t row = -1;    // of controller state
    bool fresh = false;  // it had no step with that row yet
    // Of the step: the text with drafts, and how many of its last tokens are queries or a chunk.
    Text draft;
    int64_t queries = 0, chunk = 0;
  };
  // Arrays of one layer.
  struct Arrays {
    DeviceBytes k, v, q, out, lse, verdict, error, selected, fetched, looks, middle;
  };
  using RequestPtr = std::unique_ptr<Request>;

  void MakePool();
  Arrays MakeArrays(int64_t tokens, bool report);
  void Arrive();
  void Admit();
  void Plan();
  void Preempt();
  void Release(Request& request);
  void Chunk(Request& request);
  void Decode();
  void FillStep(int64_t requests, int64_t queries);
  void CheckStep(int64_t requests, int64_t queries);
  void Accept(Request& request);
  void Continue(Request& request);
  // Puts a token's rows where they go; answers its slot for the library, or -1.
  int64_t PutToken(const Request& request, int64_t position, int64_t index,
                   const std::vector<Arrays>& arrays);
  vattn_paged_rows RowsOf(int32_t layer, const DeviceBytes& slots, int64_t tokens,
                          const Arrays& arrays) const;
  int64_t Below(int64_t end) {
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(end));
  }

  const TextModel& model_;
  PagedOracle& oracle_;
  const EngineOptions options_;
  std::mt19937_64 random_;
  std::unique_ptr<EngineDevice> device_, pageable_ = MakeHostDevice();
  BlockManager blocks_;

  // The pool by layer; strides in elements.
  std::vector<void*> keys_, values_, codes_;
  int64_t block_stride_ = 0, token_stride_ = 0, head_stride_ = 0;
  std::unique_ptr<Paged> paged_;

  std::deque<RequestPtr> waiting_;
  std::vector<RequestPtr> running_;
  std::vector<int32_t> free_rows_;
  int64_t alive_ = 0;
  bool stopping_ = false;

  DeviceBytes slots_, block_table_, lengths_, query_starts_, request_rows_, resets_, chunk_slots_;
  std::vector<Arrays> step_, chunk_;  // by layer
  EngineTally tally_;
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_PAGED_ENGINE_H_
