// Value codes in the answer of a team: what the codes of listed rows have said already is taken
// back (METHOD.md, "Value codes"), and dot products for the certificate.
#ifndef VATTN_KERNELS_CUDA_VALUES_CUH_
#define VATTN_KERNELS_CUDA_VALUES_CUH_

#include <cmath>

#include "kernels/cuda/team.cuh"

namespace vattn::cuda {

inline __device__ const std::byte* ValueCode(const DeviceStorage& s, const DeviceGroup& group,
                                             uint32_t token) {
  const BlockLayout& block = s.host.block;
  return s.codes + group.blocks[token / kBlockTokens] * s.code_block_bytes +
         (block.value_codes - block.codes) +
         int64_t{token % kBlockTokens} * s.host.value_code_bytes;
}

// Element j of v^, whose level is in bits [shift, shift + bits) of `byte`.
inline __device__ float CodedValue(const IndexTables& index, int bits, unsigned byte, int shift,
                                   int j) {
  const float middle = .5f - static_cast<float>(1 << (bits - 1));
  const float level = static_cast<float>(byte >> shift & ((1u << bits) - 1));
  return fmaf(level + middle, __ldg(index.value_step + j), __ldg(index.value_mean + j));
}
inline __device__ float CodedValue(const Storage& s, const IndexTables& index,
                                   const std::byte* code, int j) {
  const int chunk = 128 / s.value_bits, in = j % chunk;
  return CodedValue(index, s.value_bits, static_cast<unsigned>(code[j / chunk * 16 + in % 16]),
                    in / 16 * s.value_bits, j);
}

// ln e^ of a token and head; -inf where it is 0.
inline __device__ float LogEstimate(const DeviceGroup& group, int heads, uint32_t token, int h) {
  const int64_t at = (token / kBlockTokens - FirstBlock(group)) * heads + h;
  const float e = __half2float(
      __ushort_as_half(LoadL2(group.scratch.estimate + at * kBlockTokens + token % kBlockTokens)));
  return e > 0 ? logf(e) + group.scratch.shift[at] : -INFINITY;
}

// The weighted sum of v^ over tiles of value codes.
template <int kHeads>
struct CodedSum : ValueSum<DType::kF32, kHeads> {
  using Base = ValueSum<DType::kF32, kHeads>;
  float mean[2], step[2];
  int byte, shift;  // of this thread's two dimensions

  __device__ CodedSum(const Storage& s, const IndexTables& index) : Base(s.row.dim_v) {
    const int chunk = 128 / s.value_bits, j = 2 * this->pair, in = j % chunk;
    byte = j / chunk * 16 + in % 16;
    shift = in / 16 * s.value_bits;
    const float middle = .5f - static_cast<float>(1 << (s.value_bits - 1));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      step[i] = index.value_step[j + i];
      mean[i] = fmaf(middle, step[i], index.value_mean[j + i]);
    }
  }

  // sum += p . v^ over count rows; p [rows][kHeads].
  __device__ void AddCodes(const TileShape& shape, const std::byte* tile, int count, int bits,
                           const float* p) {
    if (this->group >= this->groups) return;
    const unsigned mask = (1u << bits) - 1;
    for (int r = this->group; r < count; r += this->groups) {
      const unsigned two =
          *reinterpret_cast<const uint16_t*>(tile + r * shape.pitch + byte) >> shift;
      const float v0 = fmaf(static_cast<float>(two & mask), step[0], mean[0]);
      const float v1 = fmaf(static_cast<float>(two >> 8 & mask), step[1], mean[1]);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        this->sum[h][0] = fmaf(p[r * kHeads + h], v0, this->sum[h][0]);
        this->sum[h][1] = fmaf(p[r * kHeads + h], v1, this->sum[h][1]);
      }
    }
  }
};

// Called after AttendList of the same list. Takes e^ v^ / pi of this block's rows from the numerators
// of its states, and writes their mass to scratch.coded_mass in the unit of the states. The places from
// `from` on are new: their e^ is looked up and kept in scratch.log_predicted_e. A row that FixDrawn
// made exact keeps its e^, because the sum over the middle still contains it.
template <int kHeads>
__device__ __noinline__ void CorrectList(Team<kHeads>& team, int64_t from, int64_t count,
                                         float scale) {
  const GroupScratch& w = team.group.scratch;
  const Storage& s = team.p.storage.host;
  RowsShared<kHeads>& shared = team.shared.rows;
  // The rows that AttendList gave this block. Their codes take less room than they.
  const int tile_rows = MakeTileShape(s.row.row_bytes, count, team.size).rows;
  const TileShape shape{tile_rows, s.value_code_bytes, s.value_code_bytes + 16};
  const int heads = team.heads(), tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
  const int tiles = team.Tiles(count, shape.rows);
  const auto place = [&](int k, int r) { return team.RowPlace(shape.rows, k, r); };
  for (int first = 0; first < heads; first += kHeads) {
    const int now = min(kHeads, heads - first);
    CodedSum<kHeads> values(s, team.group.index);
    if (tid < kHeads) shared.mass[tid] = 0;
    WalkTiles(
        shape, team.p.storage.tiles_in_flight, tiles, shared.address, team.memory,
        [&](int k, int r) -> uint64_t {
          const int64_t i = place(k, r);
          return i < count ? reinterpret_cast<uint64_t>(
                                 ValueCode(team.p.storage, team.group, LoadL2(w.token + i)))
                           : 0;
        },
        [&](int k, const std::byte* tile) {
          const int n = static_cast<int>(min(count - place(k, 0), int64_t{shape.rows}));
          for (int item = tid; item < n * kHeads; item += kThreads) {
            const int h = item % kHeads;
            float p = 0;
            if (h < now) {
              const int64_t i = place(k, item / kHeads), at = (first + h) * w.capacity + i;
              if (i >= from) {
                w.log_predicted_e[at] =
                    LogEstimate(team.group, heads, LoadL2(w.token + i), first + h);
              }
              const float log_e = LoadL2(w.log_predicted_e + at);
              const float pi = Min(1.f, scale * LoadL2(w.weight + i));
              if (log_e > -INFINITY) p = -expf(log_e - team.shared.head[first + h].shift) / pi;
            }
            shared.p[item] = p;
          }
          __syncthreads();
          if (warp < kHeads) {
            float mass = 0;
            for (int r = lane; r < n; r += kWarp) mass += shared.p[r * kHeads + warp];
            mass = WarpSum(mass);
            if (lane == 0) shared.mass[warp] += mass;
          }
          values.AddCodes(shape, tile, n, s.value_bits, shared.p);
        });
    float* state =
        w.state + (static_cast<int64_t>(team.rank) * heads + first) * StateFloats(s.row.dim_v);
    if (tid < now) {
      const float most =
          ConstSoftmaxState(state + tid * StateFloats(s.row.dim_v), s.row.dim_v).max();
      shared.scale[tid] = expf(team.shared.head[first + tid].shift - most);
      w.coded_mass[static_cast<int64_t>(team.rank) * heads + first + tid] =
          shared.mass[tid] * shared.scale[tid];
    }
    values.Finish(reinterpret_cast<float*>(team.memory), now, [&](int h, int j, float x) {
      float& sum = state[h * StateFloats(s.row.dim_v) + j];
      sum = fmaf(x, shared.scale[h], sum);
    });
  }
}

// What the certificate needs of the value codes of a tile of rows. It lies in TeamShared::sums, which
// only planning passes use otherwise.
template <int kHeads>
struct CodedDots {
  float dot[kMostTileRows * kHeads];  // [rows][kHeads] v^ . o
  float norm2[kMostTileRows];         // |v^|^2
  float cross[kMostTileRows];         // v . v^
};
template <int kHeads>
__device__ CodedDots<kHeads>& DotsOf(Team<kHeads>& team) {
  static_assert(sizeof(CodedDots<kHeads>) <= sizeof(team.shared.sums));
  return *reinterpret_cast<CodedDots<kHeads>*>(&team.shared.sums);
}

// CodedDots of the first n rows of a tile of V, one warp a row. Rows whose address [rows] is 0 are
// skipped. token(r) is the token of row r; outputs [kHeads][dim_v] lie in shared memory.
template <DType kType, int kHeads, class Token>
__device__ void DotCodes(Team<kHeads>& team, const TileShape& shape, const std::byte* tile, int n,
                         const uint64_t* address, Token&& token, const float* outputs) {
  using E = Element<kType>;
  const Storage& s = team.p.storage.host;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int bits = s.value_bits, chunk = 128 / bits, dim = s.row.dim_v;
  CodedDots<kHeads>& out = DotsOf(team);
  for (int r = warp; r < n; r += kWarps) {
    if (address[r] == 0) continue;
    const std::byte* code = ValueCode(team.p.storage, team.group, token(r));
    const std::byte* value = tile + r * shape.pitch;
    float dot[kHeads] = {}, norm2 = 0, cross = 0;
    for (int b = lane; b < s.value_code_bytes; b += kWarp) {
      const unsigned byte = static_cast<unsigned>(code[b]);
      for (int k = 0; k < 8 / bits; ++k) {
        const int run = k ^ (lane / 16);  // the two halves of a warp take different banks
        const int j = b / 16 * chunk + 16 * run + b % 16;
        if (j >= dim) continue;
        const float x = CodedValue(team.group.index, bits, byte, run * bits, j);
        norm2 = fmaf(x, x, norm2);
        cross = fmaf(x, E::One(value + j * E::kBytes), cross);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) dot[h] = fmaf(x, outputs[h * dim + j], dot[h]);
      }
    }
    norm2 = WarpSum(norm2), cross = WarpSum(cross);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) dot[h] = WarpSum(dot[h]);
    if (lane == 0) {
      out.norm2[r] = norm2, out.cross[r] = cross;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) out.dot[r * kHeads + h] = dot[h];
    }
  }
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_VALUES_CUH_
