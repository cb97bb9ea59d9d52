#include "tests/api/paged_cases.h"

#include <unistd.h>

#include <filesystem>

#include "tests/api/backend.h"

namespace vattn::test {
namespace {

// A name for a file that goes with the object.
class TemporaryFile {
 public:
  TemporaryFile()
      : path_(std::filesystem::temp_directory_path() /
              ("vattn_tables_" + std::to_string(getpid()))) {}
  ~TemporaryFile() { std::filesystem::remove(path_); }
  std::string path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace

std::vector<PagedCase> PagedCases() {
  std::vector<PagedCase> cases = {
      {"blocks_of_16", {4, 2, 32, 32, false, VATTN_BF16}, {2, 1}, {.hot_bytes = 1 << 20}},
      {"packed_blocks_of_48",
       {4, 1, 64, 64, false, VATTN_F16},
       {1},
       {.block_tokens = 48,
        .layout = Layout::kPacked,
        .owns_codes = true,
        .place = Place::kPinned,
        .hot_bytes = 1 << 18}},
      {"heads_first_blocks_of_256",
       {4, 4, 48, 32, false, VATTN_BF16},
       {4, 0, 2},
       {.block_tokens = 256,
        .layout = Layout::kHeadsFirst,
        .writes_rows = true,
        .pins_pool = false}},
      {"shared_kv",
       {4, 1, 64, 48, true, VATTN_BF16},
       {1},
       {.layout = Layout::kPacked, .owns_codes = true, .hot_bytes = 1 << 20}},
  };
  if (!OnCuda()) {
    cases.push_back({"float32",
                     {6, 2, 32, 48, false, VATTN_F32},
                     {2},
                     {.layout = Layout::kPacked, .writes_rows = true}});
  }
  return cases;
}

PagedRun RunPaged(const PagedCase& given, int32_t policy, int64_t steps, uint64_t seed,
                  Fault fault) {
  const TextModel model(given.shape, given.layer_heads, 7);
  vattn_options options = OptionsFor(given.shape);
  options.num_layers = model.num_layers();
  options.layer_kv_heads = given.layer_heads.data();
  options.host_bytes = uint64_t{32} << 20;
  options.policy = policy;
  options.epsilon = .25f, options.delta = .1f;
  // Short texts, most of which shall be in the middle.
  options.sinks = 16, options.window = 16, options.exact_below = 64;
  options.min_selected = 4;
  options.seed = seed;
  const Runtime runtime(options);
  const TemporaryFile tables;
  EngineOptions chosen = given.options;
  chosen.seed = seed;
  chosen.fault = fault;
  if (policy == VATTN_POLICY_VERIFIED) {
    chosen.tables = tables.path();
    model.SaveTables(runtime, chosen.tables, PagedEngine::kModel);
  }
  PagedOracle oracle(model, options);
  PagedEngine engine(runtime, model, oracle, chosen);
  for (int64_t step = 0; step < steps; ++step) {
    try {
      engine.Step();
    } catch (const WrongAnswer& error) {
      throw WrongAnswer("step " + std::to_string(step) + ", " + error.what());
    }
  }
  engine.Finish();
  oracle.CheckPromise();
  return {engine.tally(), oracle.tally(), runtime.Stats()};
}

}  // namespace vattn::test
