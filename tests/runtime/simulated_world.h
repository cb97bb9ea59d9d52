// Sequences and batches on a simulated device beside a model of what they hold: random operations,
// with every answer against exact attention over the model's rows.
#ifndef VATTN_TESTS_RUNTIME_SIMULATED_WORLD_H_
#define VATTN_TESTS_RUNTIME_SIMULATED_WORLD_H_

#include <array>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "runtime/batch.h"
#include "runtime/cuda/backend.h"
#include "runtime/sequence.h"
#include "tests/runtime/simulated_device.h"

namespace vattn::test {

class SimulatedWorld {
 public:
  static constexpr int kLayers = 2, kQHeads = 4, kKvHeads = 2, kDim = 16, kSlots = 2, kBatches = 2;

  SimulatedWorld(uint64_t seed, Lacks lacks, const std::string& disk_path);
  ~SimulatedWorld();

  void Run(int operations);
  // Answers that were not what the model says, unexpected codes, and accesses that a device would
  // not survive.
  int64_t wrong() const { return wrong_ + simulation_.faults(); }
  // Ends all sequences and batches; true if every block of the pool is free then.
  bool EndsEmpty();
  const std::string& first_wrong() const { return first_wrong_; }
  int64_t answers() const { return answers_; }
  int64_t refused() const { return refused_; }
  int64_t abandoned() const { return abandoned_; }
  StatsSnapshot Stats() const { return runtime_->Stats(); }

 private:
  struct Row {
    std::array<float, kDim> k, v;
  };
  struct Twin {
    std::unique_ptr<Sequence> sequence;
    std::vector<Row> rows[kLayers][kKvHeads];
    std::array<int, kLayers> attended = {};  // calls
    size_t size() const { return rows[0][0].size(); }
  };
  // The attention of a layer of batch 0 with a new token, captured once, and the arrays that it is
  // over.
  struct Graph {
    DeviceMemory memory;
    std::vector<std::function<void()>> operations;
  };
  struct Answers {
    DeviceMemory memory, pinned;  // without memory of their own: a graph's
    DeviceStream stream = nullptr;
    std::string what;
    std::vector<float> expected;  // [out, error], not a number where nothing is written
  };

  size_t Below(size_t n) { return random_() % n; }
  Row RandomRow();
  Twin* AnyTwin();
  // True if the call was done; FULL and OUT_OF_MEMORY are refusals, other codes wrong.
  bool Done(const absl::Status& status, const char* call);
  void Wrong(const std::string& what);
  std::vector<float> Attention(const Twin& twin, int layer, int q_head, const float* q) const;

  void Create();
  void Append();
  void Step(int b);
  // Gives the open step up after `layers` layers.
  void Abandon(int b, int layers, int new_tokens);
  void Attend(int b, int layer, int new_tokens, DeviceStream stream, bool staged);
  void Fork();
  void Begin();
  void Enter(std::unique_ptr<Sequence> sequence, const Twin& like, size_t tokens,
             const std::array<int, kLayers>& attended);
  void Truncate();
  void Destroy();
  void Sleep();
  void BuildIndex();
  void Sit(int b);
  void NewBatch(int b);
  // Compares what the device has answered so far.
  void Check();
  void Compare(const Answers& answers, const float* got);

  Simulation simulation_;
  std::mt19937_64 random_;
  std::normal_distribution<float> normal_;
  std::shared_ptr<Runtime> runtime_;
  std::vector<std::unique_ptr<Twin>> twins_;
  std::unique_ptr<Batch> batches_[kBatches];
  Twin* seats_[kBatches][kSlots] = {};
  std::vector<DeviceStream> streams_;
  std::vector<Answers> pending_;
  Graph graphs_[kLayers];
  int64_t wrong_ = 0, answers_ = 0, refused_ = 0, abandoned_ = 0;
  std::string first_wrong_;
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_RUNTIME_SIMULATED_WORLD_H_
