// Operations of kernels/cuda/launch.h on the simulated device. What they compute is as plain as can
// be: the code of a token is a hash of its row and its index, attention is exact, a controller
// state counts the steps.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cuda/launch.h"
#include "tests/runtime/simulated_device.h"

namespace vattn::cuda {
namespace {

using test::Simulation;

template <class F>
int Enqueue(Stream stream, F&& operation) {
  Simulation::Current().Enqueue(static_cast<DeviceStream>(stream.handle),
                                std::forward<F>(operation));
  return 0;
}

bool Reaches(const void* pointer, uint64_t bytes) {
  return Simulation::Current().Reaches(pointer, bytes);
}

std::byte* HostRow(const Storage& s, const int32_t* blocks, int64_t token) {
  return s.base + blocks[token / kBlockTokens] * s.block.bytes +
         token % kBlockTokens * s.row.row_bytes;
}

std::byte* FixedRow(const DeviceStorage& s, std::byte* fixed, int64_t token) {
  return fixed + (token < s.sinks ? token : s.sinks + token % s.ring_tokens) * s.host.row.row_bytes;
}

// FNV-1a over the row and the center of its index.
uint32_t CodeOf(const Storage& s, const std::byte* row, const IndexTables& index) {
  uint32_t hash = 2166136261u;
  const auto add = [&](const void* from, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i)
      hash = (hash ^ static_cast<const uint8_t*>(from)[i]) * 16777619u;
  };
  add(row, static_cast<size_t>(s.row.row_bytes));
  add(index.center, static_cast<size_t>(s.row.dim_k) * sizeof(float));
  return hash;
}

int64_t CodeAt(const Storage& s, int64_t token) { return token % kBlockTokens * s.code.bytes(); }

// The row of a middle token by the hot set: from there, or from the host pool and then kept.
const std::byte* HotRow(const StepParams& p, const DeviceGroup& g, int64_t token, bool* bad) {
  const HotSetRef& hot = p.hot;
  const int64_t row_bytes = p.storage.host.row.row_bytes;
  const std::byte* const host = HostRow(p.storage.host, g.blocks, token);
  if (hot.slots == 0 || token % 3 != 0) return host;
  const int64_t key = int64_t{g.blocks[token / kBlockTokens]} * kBlockTokens + token % kBlockTokens;
  *bad |= !Reaches(hot.slot_of + key, 4) || hot.slot_of[key] >= hot.slots;
  if (*bad) return host;
  if (hot.slot_of[key] >= 0) return hot.rows + hot.slot_of[key] * row_bytes;
  const int32_t slot =
      static_cast<int32_t>((*hot.hand)++ % static_cast<unsigned long long>(hot.slots));
  const int64_t old = hot.owner[slot];
  if (old >= 0) *bad |= !Reaches(hot.slot_of + old, 4);
  if (*bad) return host;
  if (old >= 0 && hot.slot_of[old] == slot) hot.slot_of[old] = -1;
  hot.owner[slot] = key;
  hot.slot_of[key] = slot;
  std::memcpy(hot.rows + slot * row_bytes, host, static_cast<size_t>(row_bytes));
  return hot.rows + slot * row_bytes;
}

// False if what a group is made of has gone.
bool IsThere(const DeviceGroup& g, int group_heads) {
  return Reaches(g.blocks, 4) && Reaches(g.fixed, 1) &&
         Reaches(g.state, sizeof(HeadState) * group_heads) && Reaches(g.scratch.output, 4) &&
         (g.num_segments == 0 || Reaches(g.segments, 1)) &&
         (g.recent == nullptr || Reaches(g.recent, 4));
}

// Tables of the segment that a token lies in.
const IndexTables& TablesAt(const DeviceGroup& g, int64_t token) {
  if (g.num_segments == 0) return g.index;
  return g.segments[SegmentOf(g.segments, g.num_segments, token / kBlockTokens)].tables;
}

// Outputs [G][dim_v] and lse [G] of a group into scratch; not a number where the device contradicts
// itself.
void Answer(const StepParams& p, const DeviceGroup& g) {
  const Storage& s = p.storage.host;
  const int dim_k = s.row.dim_k, dim_v = s.row.dim_v;
  const int64_t place = int64_t{g.slot} * p.kv_heads + g.kv_head;
  if (p.call.k_new != nullptr) {
    std::vector<float> row(static_cast<size_t>(s.row.row_bytes) / 4);
    std::memcpy(row.data(), static_cast<const float*>(p.call.k_new) + place * dim_k,
                size_t{4} * dim_k);
    std::memcpy(row.data() + dim_k, static_cast<const float*>(p.call.v_new) + place * dim_v,
                size_t{4} * dim_v);
    std::memcpy(HostRow(s, g.blocks, g.tokens - 1), row.data(), size_t{4} * (dim_k + dim_v));
    std::memcpy(FixedRow(p.storage, g.fixed, g.tokens - 1), row.data(),
                size_t{4} * (dim_k + dim_v));
  }
  if (g.recent != nullptr) {
    const size_t bytes = size_t{4} * p.group_heads * dim_k;
    std::memcpy(g.recent,
                static_cast<const std::byte*>(p.call.q) + place * static_cast<int64_t>(bytes),
                bytes);
  }
  bool bad = false;
  // Copies: a row's slot in the hot set may be another's before the call ends
  std::vector<float> rows;
  const int width = s.row.row_bytes / 4;
  for (int64_t t = 0; t < g.tokens && !bad; ++t) {
    const bool middle = t >= g.middle_begin && t < g.middle_end;
    const std::byte* row = !middle && (t < p.storage.sinks || t >= g.ring_begin)
                               ? FixedRow(p.storage, g.fixed, t)
                               : HostRow(s, g.blocks, t);
    if (middle) {
      const int64_t block = g.blocks[t / kBlockTokens];
      const std::byte* const code =
          p.storage.codes + block * p.storage.code_block_bytes + CodeAt(s, t);
      const uint32_t expected = CodeOf(s, row, TablesAt(g, t));
      bad |= !Reaches(code, 4) || std::memcmp(code, &expected, 4) != 0;
      row = HotRow(p, g, t, &bad);
    }
    const float* const from = reinterpret_cast<const float*>(row);
    rows.insert(rows.end(), from, from + width);
  }
  for (int h = 0; h < p.group_heads; ++h) {
    const float* const q =
        static_cast<const float*>(p.call.q) + (place * p.group_heads + h) * dim_k;
    std::vector<double> logit, out(static_cast<size_t>(dim_v));
    double most = -std::numeric_limits<double>::infinity(), mass = 0;
    for (size_t at = 0; at < rows.size(); at += width) {
      double sum = 0;
      for (int c = 0; c < dim_k; ++c) sum += double{q[c]} * rows[at + c];
      logit.push_back(sum * s.scale);
      most = std::max(most, logit.back());
    }
    for (size_t t = 0; t < logit.size(); ++t) {
      const double weight = std::exp(logit[t] - most);
      mass += weight;
      for (int c = 0; c < dim_v; ++c) out[c] += weight * rows[t * width + dim_k + c];
    }
    float* const to = g.scratch.output + h * (dim_v + 1);
    for (int c = 0; c < dim_v; ++c) to[c] = bad ? NAN : static_cast<float>(out[c] / mass);
    to[dim_v] = static_cast<float>(most + std::log(mass));
  }
}

void Report(const StepParams& p, const DeviceGroup& g) {
  const int dim = p.storage.host.row.dim_v;
  const int64_t place = int64_t{g.slot} * p.kv_heads + g.kv_head;
  const auto report = [&](auto* array, test::Reported which, int64_t at) {
    if (array != nullptr) array[at] = test::ReportOf(which, at);
  };
  report(p.call.selected, test::Reported::kSelected, place);
  report(p.call.fetched, test::Reported::kFetched, place);
  report(p.call.looks, test::Reported::kLooks, place);
  report(p.call.middle, test::Reported::kMiddle, place);
  for (int h = 0; h < p.group_heads; ++h) {
    report(p.call.verdict, test::Reported::kVerdict, place * p.group_heads + h);
    const float* const from = g.scratch.output + h * (dim + 1);
    const int64_t head = place * p.group_heads + h;
    std::memcpy(static_cast<float*>(p.call.out) + head * dim, from, size_t{4} * dim);
    if (p.call.lse != nullptr) p.call.lse[head] = from[dim];
    if (p.call.error != nullptr) p.call.error[head] = g.state[h].started;
    g.state[h].started += 1;
  }
}

}  // namespace

int TilesInFlight(const Storage&) { return 2; }
AnswerShape ShapeAnswer(const DeviceStorage&, int, int) { return {.teams = 1, .team = 1}; }

// Two operations: what the first leaves in scratch must still be there for the second.
int Decode(const StepParams& p, const AnswerShape&, int, Stream stream) {
  Enqueue(stream, [p] {
    for (int g = 0; g < p.header->num_groups; ++g) {
      if (IsThere(p.groups[g], p.group_heads)) Answer(p, p.groups[g]);
    }
  });
  return Enqueue(stream, [p] {
    for (int g = 0; g < p.header->num_groups; ++g) {
      if (IsThere(p.groups[g], p.group_heads)) Report(p, p.groups[g]);
    }
  });
}

int Encode(const DeviceStorage& storage, const EncodeItem* items, int count, int64_t,
           Stream stream) {
  return Enqueue(stream, [=] {
    const Storage& s = storage.host;
    for (const EncodeItem* item = items; item < items + count; ++item) {
      for (int64_t t = item->begin; t < item->end; ++t) {
        const int64_t block = item->blocks[t / kBlockTokens];
        const uint32_t code = CodeOf(s, HostRow(s, item->blocks, t), item->index);
        std::byte* const there = storage.codes + block * storage.code_block_bytes + CodeAt(s, t);
        if (Reaches(there, 4)) std::memcpy(there, &code, 4);
        std::memcpy(s.base + block * s.block.bytes + s.block.codes + CodeAt(s, t), &code, 4);
      }
    }
  });
}

int LoadFixed(const DeviceStorage& storage, const FixedItem* items, int count, Stream stream) {
  return Enqueue(stream, [=] {
    for (const FixedItem* item = items; item < items + count; ++item) {
      for (int64_t t = 0; t < item->tokens; ++t) {
        if (t >= storage.sinks && t < item->tokens - storage.ring_tokens) continue;
        std::memcpy(FixedRow(storage, item->fixed, t), HostRow(storage.host, item->blocks, t),
                    static_cast<size_t>(storage.host.row.row_bytes));
      }
    }
  });
}

int LoadCodes(const DeviceStorage& storage, const int32_t* blocks, int64_t count, Stream stream) {
  return Enqueue(stream, [=] {
    const Storage& s = storage.host;
    for (int64_t i = 0; i < count; ++i) {
      std::byte* const there = storage.codes + blocks[i] * storage.code_block_bytes;
      const uint64_t bytes = static_cast<uint64_t>(storage.code_block_bytes);
      if (Reaches(there, bytes))
        std::memcpy(there, s.base + blocks[i] * s.block.bytes + s.block.codes, bytes);
    }
  });
}

int ForgetBlocks(const HotSetRef& hot, const int32_t* blocks, int64_t count, Stream stream) {
  if (hot.slots == 0) return 0;
  return Enqueue(stream, [=] {
    for (int64_t i = 0; i < count; ++i) {
      int32_t* const first = hot.slot_of + int64_t{blocks[i]} * kBlockTokens;
      if (Reaches(first, 4 * kBlockTokens)) std::fill(first, first + kBlockTokens, -1);
    }
  });
}

int ApplyPatches(const Patch* patches, int64_t count, Stream stream) {
  return Enqueue(stream, [=] {
    for (int64_t i = 0; i < count; ++i)
      *patches[i].address = static_cast<int32_t>(patches[i].value);
  });
}

// No world of this device prefills.
// No rank has a slice here.
int Forecast(const StepParams&, int, Stream) { return 1; }
int LookOn(const StepParams&, const AnswerShape&, bool, Stream) { return 1; }
int Merge(const MergeParams&, Stream) { return 1; }
int PrefillSplits(int64_t, int32_t, int32_t, int) { return 1; }
int Prefill(const PrefillChunk&, Stream) { return 1; }

int Gather(const std::byte* base, const int64_t* offsets, int64_t count, int64_t bytes,
           std::byte* to, Stream stream) {
  return Enqueue(stream, [=] {
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * bytes, base + offsets[i], static_cast<size_t>(bytes));
  });
}

int Write(const WriteParams& p, Stream stream) {
  return Enqueue(stream, [p] {
    const RowLayout& row = p.storage.row;
    for (int64_t t = 0; t < p.count; ++t) {
      for (int h = 0; h < p.kv_heads; ++h) {
        std::byte* const to = HostRow(p.storage, p.blocks[h], p.first + t);
        const float* const k =
            static_cast<const float*>(p.k) + t * p.k_token_stride + h * p.k_head_stride;
        const float* const v =
            static_cast<const float*>(p.v) + t * p.v_token_stride + h * p.v_head_stride;
        std::memcpy(to, k, size_t{4} * row.dim_k);
        std::memcpy(to + row.v_offset, v, size_t{4} * row.dim_v);
      }
    }
  });
}

// Pools of engines are not simulated.
int WriteSlots(const DeviceStorage&, const WriteSlotsParams&, const HotSetRef&, int64_t, uint32_t*,
               Stream) {
  return 1;
}
int EncodeSlots(const DeviceStorage&, const WriteSlotsParams&, Stream) { return 1; }
int FetchRows(const DeviceStorage&, const int32_t*, int32_t, int64_t, int64_t, std::byte*, int64_t,
              Stream) {
  return 1;
}
int BeginPagedStep(const PagedStepParams&, Stream) { return 1; }
size_t CarveScratch(const Storage& storage, const Promise&, int64_t, int group_heads, int,
                    std::byte* memory, GroupScratch& out) {
  if (memory != nullptr) out.output = reinterpret_cast<float*>(memory);
  return static_cast<size_t>(group_heads) * (storage.row.dim_v + 1) * sizeof(float);
}

}  // namespace vattn::cuda
