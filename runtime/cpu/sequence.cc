#include "runtime/cpu/sequence.h"

#include <algorithm>

#include "kernels/cpu/encode.h"
#include "kernels/cpu/workers.h"
#include "runtime/sequence.h"

namespace vattn {

void CpuSequence::BeginStep(const Sequence& sequence) {
  states_before_step_.clear();
  for (int l = 0; l < sequence.runtime().options().num_layers; ++l) {
    for (const KvHead& kv_head : sequence.layer(l).kv_heads) {
      states_before_step_.insert(states_before_step_.end(), kv_head.states.begin(),
                                 kv_head.states.end());
    }
  }
}

void CpuSequence::GiveUpStep(Sequence& sequence) {
  auto before = states_before_step_.cbegin();
  for (int l = 0; l < sequence.runtime().options().num_layers; ++l) {
    for (KvHead& kv_head : sequence.layer(l).kv_heads) {
      std::copy_n(before, kv_head.states.size(), kv_head.states.begin());
      before += static_cast<std::ptrdiff_t>(kv_head.states.size());
    }
  }
}

void CpuSequence::Code(Sequence& sequence, int l, int64_t begin) {
  Runtime& runtime = sequence.runtime();
  Layer& layer = sequence.layer(l);
  cpu::Workers* const workers = runtime.workers();
  uint64_t outliers = 0;
  cpu::ParallelFor(workers, static_cast<int64_t>(layer.kv_heads.size()), [&](int64_t h) {
    const KvHead& kv_head = layer.kv_heads[h];
    ForSegments(layer, begin, layer.coded, [&](size_t k, int64_t from, int64_t to) {
      cpu::Encode({.storage = runtime.storage(),
                   .index = kv_head.segments[k].tables,
                   .blocks = kv_head.blocks.data(),
                   .begin = from,
                   .end = to,
                   .outliers = &outliers},
                  workers);
    });
  });
  layer.codes_made = layer.coded;
  runtime.counters().outliers += outliers;
}

}  // namespace vattn
