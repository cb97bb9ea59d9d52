// Parameters of every operation: plain structs of pointers with their extents. Kernels own nothing
// and allocate nothing. G = query heads of one GQA group (one KV head), of all query tokens of a
// call.
#ifndef VATTN_KERNELS_PARAMS_H_
#define VATTN_KERNELS_PARAMS_H_

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels/geometry.h"
#include "kernels/rng.h"

namespace vattn {

enum class Policy : int32_t { kVerified = 0, kTopK = 1, kTopKUniform = 2, kDense = 3 };
enum class Norm : int32_t { kValue = 0, kOutput = 1 };
enum class OnUnverified : int32_t { kDense = 0, kBestEffort = 1 };
enum class Bound : int32_t { kSharp = 0, kSafe = 1 };
enum class Target : int32_t { kSdpa = 0, kNumerator = 1, kDenominator = 2 };
// What a call is for: kDecode answers by the policy, kSelect lists the rows that the first look would
// read, kAttendSelected attends the rows that the caller lists.
// kForecast and kMore answer a slice of a context (kernels/merge.h).
enum class Task : int32_t { kDecode, kSelect, kAttendSelected, kForecast, kMore };
enum class Verdict : int32_t { kExact = 0, kVerified = 1, kDense = 2, kBestEffort = 3 };

constexpr int kMaxLooks = 8;
constexpr int kMaxGroup = 1024;      // query heads per KV head, of all query tokens
constexpr int kMaxQueryTokens = 16;  // of a call
// Bins of a table of z over the mean squared cosine, which is 1 / effective rank.
constexpr int kQuantileBins = 256;

// What a runtime promises and how it samples; the same for all its calls.
struct Promise {
  Policy policy = Policy::kVerified;
  IndexKind index = IndexKind::kBalanced;
  Norm norm = Norm::kValue;
  OnUnverified on_unverified = OnUnverified::kDense;
  Bound bound = Bound::kSharp;
  Target target = Target::kSdpa;
  float epsilon = .1f;
  float delta = .1f;
  float norm_floor = .5f;
  int32_t max_looks = 6;
  int32_t min_selected = 16;
  float max_selected_share = .5f;
  float topk_share = .05f;
  float base_share = .05f;
  uint32_t refresh = 64;
  bool pilot = false;  // the first draw is small on purpose, and teaches the second
  // quantile[look - 1][bin] is z of a look at 1 / rank = bin / kQuantileBins (runtime/quantiles.cc).
  const float (*quantile)[kQuantileBins + 1] = nullptr;
  float normal_quantile = 0;  // Phi^-1(1 - delta / 2), for kTopKUniform
};

// Tokens that are attended exactly (METHOD.md, "Three sets").
struct ExactSets {
  int32_t sinks = 0, window = 0, exact_below = 0;
};

// How rows and codes lie in the host pool, or in a pool of an engine's own.
struct Storage {
  std::byte* base = nullptr;  // block b starts at base + b * block.bytes
  RowLayout row;
  CodeLayout code;
  BlockLayout block;
  // Null: codes lie in the blocks. Else codes of block b and KV head h begin at
  // codes + b * code_block_bytes + h * block.tokens * code.bytes().
  std::byte* codes = nullptr;
  int64_t code_block_bytes = 0;
  int32_t value_bits = 0;
  int32_t value_code_bytes = 0;  // per token
  float scale = 1;               // of q.k
};

// The frozen index of one (sequence, layer, KV head) (METHOD.md, "Index").
//
// The level of key k in code dimension j is clamp(floor(encode_j . (k - center))), and adds
// (project_j . q) * level to the predicted score q . (k - center). kBalanced writes a key as center
// + the sum over dim_k directions of a coordinate times the direction's vector. The calibration keys
// have variance 1 in each direction, and the first `dims` coordinates are coded.
//
// A token is an outlier if its code misrepresents it. It then has a code of all 0 and is always
// read. r_j is the error of coordinate j, and the coordinate itself where it has no code. A token is
// an outlier if one of these holds:
//   sum r_j^2 > residual_limit
//   sum weight_j r_j^2 > noise_limit: the squared error of its score for queries like those known
//                                     when the index was made
//   |v|^2 > value_limit, which no score can tell
struct IndexTables {
  const float* center = nullptr;     // [dim_k] mean key
  const float* encode = nullptr;     // [dim_k][padded_dims]
  const float* project = nullptr;    // [dims][dim_k]
  const float* centroids = nullptr;  // [centroids][dim_k] less the center
  // [dims] width of a level in standard deviations. This one, rest and the limits: kBalanced only.
  const float* step = nullptr;
  const float* rest = nullptr;    // [dim_k][padded_rest] the other directions, see geometry.h
  const float* weight = nullptr;  // [dim_k] mean squared part of a query in each direction
  // The variance of s - s^ over tokens, for a scaled query q, is
  //   sum_j level_noise2_j (project_j . q)^2 + sum_j (noise_j . q)^2.
  // m_j is the mean of r_j^2 over calibration tokens that are no outliers. level_noise2 [dims] is
  // m_j / step_j^2. noise [dim_k - dims][dim_k] has the vectors of the directions without a code,
  // each times sqrt(m_j).
  const float* level_noise2 = nullptr;
  const float* noise = nullptr;
  const float* value_mean = nullptr;  // [dim_v], with value codes
  const float* value_step = nullptr;  // [dim_v] distance of two levels
  float value_residual = 0;           // mean |v - v^|^2
  float value_spread = 0;             // mean |v - mean v|^2 when the index was made
  float value_norm2 = 0;              // mean |v|^2
  // kSign and kPage: s^ = q . center + slope * raw + intercept * |q|, fitted when the index was
  // made. raw is |q| (matches - mismatches) / 2, or the page's bound.
  float slope = 1;
  float intercept = 0;
  float residual_limit = 0;
  float noise_limit = 0;
  float value_limit = 0;
};

// A run of blocks whose keys were coded by the same tables. An index grows by segments, because keys
// that come later have another mean and vary in other directions than the first ones.
constexpr int kMaxSegments = 64;
struct IndexSegment {
  // A block number in the sequence. The segment ends where the next one begins.
  int64_t first_block = 0;
  IndexTables tables;
};

// Controller state of one query head, carried from step to step (METHOD.md, "Selection").
struct HeadState {
  float log_multiplier = 0;
  float eta2 = 0;     // squared relative error of e^, with value codes
  float rho = 0;      // quantile of realised over predicted variance
  float spread = 0;   // weighted mean |v - o|^2 of the sampled tail
  float ref = 0;      // what the last error was relative to
  float cos2 = 0;     // mean squared cosine of two sampled residuals
  float z = 0;        // quantile of the last first look
  float started = 0;  // 0 before the first step
};

// One query head in the middle of a step.
struct HeadWork {
  float shift = 0;      // logarithm of the unit of all sums below
  float mass = 0;       // sum of e^ over the middle
  float top = 0;        // ln of the largest e^ of the middle
  float log_norm = 0;   // predicted root error contribution of a token: exp(log_norm) * e^
  float floor = 0;      // defensive floor of that contribution
  float target = 0;     // variance asked for
  float predicted = 0;  // variance expected of the draw
  float variance = 0;   // variance estimated from the draw: V of METHOD.md, "Certificate"
  float denominator = 0;
  // 1: the sequence holds a slice of a context, and log_others is ln of what the other slices add to
  // the denominator.
  float sliced = 0;
  float log_others = 0;
  float unseen = 0;        // with value codes: e^ over the middle less the draw's estimate of it
  float fixed_norm2 = 0;   // sum of e |v|^2 over the exact sets
  float value_norm2 = 0;   // mean |v|^2, weighted by attention
  float least_ref = 0;     // what the error is relative to, at least: norm_floor rms|v|, or 0
  float output_norm2 = 0;  // |o'|^2; the CPU hands it on instead
  float ref = 0;
  float cos2 = 0;  // 1 / effective rank
  float few = 1;   // sum t^2 / (sum t)^2 over the terms t of the variance
  float z = 0;
  float bound = 0;    // z sqrt(V) / ref
  float settled = 0;  // with several ranks, 1: the answer is written
};

// The int8 queries of eight query heads, in the order of the code runs.
struct PackedQueries {
  int32_t run[kMaxCodeDims / 4][8];  // 4 int8 each
  float scale[8];                    // s^ = scale * sum + offset, natural logarithm units
  float offset[8];
};

// Working memory of one group on the CPU, carved from one range by CarveScratch. n is the number of
// the group's tokens, rounded up to blocks, and one block more. "Of selected" means of the tokens in
// the list `token`, in its order. A page of the range is touched when it is first used.
struct Scratch {
  uint16_t* estimate = nullptr;      // [blocks][G][256] e^ over its block's largest, fp16
  float* shift = nullptr;            // [blocks][G] ln of that largest
  float* mass = nullptr;             // [blocks][G] sum of estimate
  float* score = nullptr;            // [G][n] s^, policies with a ranking only
  uint32_t* token = nullptr;         // [n] selected tokens
  float* weight = nullptr;           // [n] their inclusion probability before the cap at 1
  uint32_t* sparse_token = nullptr;  // [n] before compaction
  float* sparse_weight = nullptr;    // [n]
  float* logit = nullptr;            // [G][n] s of selected
  float* predicted_e = nullptr;      // [G][n] e^ of selected, as head.shift; with value codes
  float* scaled = nullptr;           // [G][n] weights in use
  float* residual = nullptr;         // [G][n] |e (v - o') - e^ (v^ - o')|^2 / (pi D^2) of the tail
  float* dot = nullptr;              // [G][n] v . o' of the tail
  float* value_norm2 = nullptr;      // [n] |v|^2 of selected
  float* code_norm2 = nullptr;       // [n] |v^|^2 of selected, with value codes
  float* cross = nullptr;            // [n] v . v^ of selected, with value codes
  float* code_dot = nullptr;         // [G][n] v^ . o' of the tail, with value codes
  const uint8_t** row = nullptr;     // [n] rows of selected
  uint32_t* tail = nullptr;          // [n] places in the list of the tokens with pi < 1
  float* query = nullptr;            // [G][dim_k] scaled
  PackedQueries* packed = nullptr;   // [segments][packed_stride]
  int32_t packed_stride = 0;         // G / 8 rounded up
  float* prepared = nullptr;         // [G][PreparedFloats()], kinds without levels
  // kBalanced, else null: [segments of the index][G]. noise is the standard deviation of s - s^, and
  // a token with ln e^ >= sure is always drawn.
  float* noise = nullptr;
  float* sure = nullptr;
  HeadWork* head = nullptr;   // [G]
  float* tops = nullptr;      // [G][kTopBins] blocks by their largest e^, see kernels/sampling.h
  float* log_gain = nullptr;  // [G] of cpu::Inclusion
  float* floor = nullptr;     // [G]
  float* state = nullptr;     // [segments][G][dim_v + 3] softmax states
  float* sums = nullptr;      // [segments][G + 2] of a planning pass
  float* work = nullptr;      // [5][G][dim_v + 3]
  int64_t stride = 0;         // n
};

struct RankStep;

// One (sequence, layer, KV head) in one decode step.
struct Group {
  const int32_t* blocks = nullptr;  // [tokens / block.tokens rounded up] block ids
  int32_t kv_head = 0;
  int64_t tokens = 0;
  int64_t middle_begin = 0;  // multiple of 16; [middle_begin, middle_end) is sampled
  int64_t middle_end = 0;    // multiple of 64, or middle_begin: nothing to sample
  int32_t group_heads = 0;   // G
  // The heads are those of the sequence's last num_tokens tokens, in order: as many for each, and
  // each sees the tokens up to its own. The middle ends where the window of the first one begins.
  int32_t num_tokens = 1;
  // Heads from those of one query token to those of the next in q, out, lse, verdict and error.
  int64_t token_stride = 0;
  int32_t out_dtype = 0;  // DType
  // The tables of the first segment. Values are coded with them in every segment.
  IndexTables index;
  // [num_segments] in the order of blocks. Without any, all keys are coded with `index`.
  const IndexSegment* segments = nullptr;
  int32_t num_segments = 0;
  HeadState* state = nullptr;  // [G]
  RandomKey key;
  uint64_t step = 0;
  // The place of head h in the next five is HeadPlace(group, h).
  const void* q = nullptr;  // [][dim_k] in the row dtype, unscaled
  void* out = nullptr;      // [][dim_v]
  float* lse = nullptr;     // or null
  Verdict* verdict = nullptr;
  float* error = nullptr;  // bound on the relative error
  // kExternal: [G] rows of predicted scores, [tokens] each. Heads may share a row.
  const void* const* external = nullptr;
  DType external_dtype = DType::kF32;
  // Of a slice of a context, else null (kernels/merge.h): how far it is; its records, [] in the order of
  // heads; and those of all ranks, `gathered_stride` floats apart.
  RankStep* slice = nullptr;
  float* partial = nullptr;
  const float* gathered = nullptr;
  int64_t gathered_stride = 0;
  // Filled by cpu::Decode.
  int64_t selected = 0;   // middle rows read: scratch.token[0..selected), unless all_read
  bool all_read = false;  // the whole middle was read
  int32_t looks = 0;
  // The codes are too coarse for the queries, so that nothing was verified.
  bool noisy = false;
  Scratch scratch;
};

// Rows of tokens [first, first + count) of one (sequence, layer). Strides in elements.
struct WriteParams {
  Storage storage;
  const int32_t* const* blocks = nullptr;  // [kv_heads] block ids by block number
  int32_t kv_heads = 0;
  int64_t first = 0;
  int64_t count = 0;
  const void* k = nullptr;  // [count][kv_heads][dim_k] in the row dtype
  const void* v = nullptr;  // [count][kv_heads][dim_v]; null with shared_kv
  int64_t k_token_stride = 0, k_head_stride = 0;
  int64_t v_token_stride = 0, v_head_stride = 0;
};

// Rows at slots of a pool, and their codes. A slot is block * block.tokens + the number of tokens
// before it in the block.
struct WriteSlotsParams {
  Storage storage;
  int32_t kv_heads = 0;
  int64_t num_slots = 0;               // of the pool
  const IndexTables* index = nullptr;  // [kv_heads]; null: no codes are made
  int64_t count = 0;
  const int64_t* slots = nullptr;  // [count]; those out of range are left out
  // As in WriteParams; k null: the rows are there.
  const void* k = nullptr;
  const void* v = nullptr;
  int64_t k_token_stride = 0, k_head_stride = 0;
  int64_t v_token_stride = 0, v_head_stride = 0;
  uint64_t* outliers = nullptr;  // as in EncodeParams
};

// Exact attention of tokens [first, first + count) of one (sequence, layer), each of which sees the
// tokens up to its own. Their rows are written. Strides in elements.
struct PrefillParams {
  Storage storage;
  const int32_t* const* blocks = nullptr;  // [kv_heads] block ids by block number
  int32_t kv_heads = 0;
  int32_t group_heads = 0;  // query heads per KV head, of one token
  int32_t q_heads = 0;      // kv_heads * group_heads
  int32_t out_dtype = 0;    // DType
  int64_t first = 0;
  int64_t count = 0;
  const void* q = nullptr;  // [count][q_heads][dim_k] in the row dtype, unscaled
  int64_t q_token_stride = 0, q_head_stride = 0;
  void* out = nullptr;   // [count][q_heads][dim_v]
  float* lse = nullptr;  // [count][q_heads] or null
};

// Codes of tokens [begin, end) of one KV head, both multiples of 16.
struct EncodeParams {
  Storage storage;
  IndexTables index;
  const int32_t* blocks = nullptr;
  int64_t begin = 0;
  int64_t end = 0;
  // If not null, the number of outliers among the tokens is added here, atomically.
  uint64_t* outliers = nullptr;
};

struct DecodeParams {
  Storage storage;
  Promise promise;
  Group* groups = nullptr;  // [num_groups]
  int32_t num_groups = 0;
};

// Answers from the records of several ranks (kernels/merge.h).
struct MergeParams {
  Promise promise;
  int32_t dim_v = 0;
  int32_t ranks = 0;
  int64_t heads = 0;
  const float* records = nullptr;  // [ranks][heads][PartialFloats(dim_v)]
  int64_t stride = 0;              // floats from one rank to the next
  int32_t out_dtype = 0;           // DType
  void* out = nullptr;             // [heads][dim_v]
  float* lse = nullptr;            // [heads], as the next two, or null
  int32_t* verdict = nullptr;
  float* error = nullptr;
  // Heads that are not verified yet or have no look yet, -1: records that do not fit each other; or
  // null.
  int32_t* again = nullptr;
};

// Attention over listed tokens and nothing else.
struct AttendSelectedParams {
  Storage storage;
  Group* groups = nullptr;  // [num_groups]; scratch.query and scratch.work are used
  int32_t num_groups = 0;
  const int32_t* tokens = nullptr;     // [num_groups][capacity]
  const float* log_weights = nullptr;  // [num_groups][capacity] or null
  const int32_t* counts = nullptr;     // [num_groups]
  int64_t capacity = 0;
};

// The first look's draw of each group, which goes to scratch.token, scratch.weight and selected.
struct SelectParams {
  Storage storage;
  Promise promise;
  Group* groups = nullptr;
  int32_t num_groups = 0;
};

// Where the row of a token, and the codes of the tile of 16 tokens that begins with it, are. blocks:
// the ids of the blocks that the tokens lie in.
struct TokenPlace {
  uint32_t block;     // its number among the sequence's
  uint32_t in_block;  // tokens before it there
};
VATTN_HD inline TokenPlace PlaceOf(const BlockLayout& block, int64_t token) {
  const uint32_t t = static_cast<uint32_t>(token);  // a sequence has at most 2^31
  if (block.tokens == kBlockTokens) return {t / kBlockTokens, t % kBlockTokens};
  const uint32_t size = static_cast<uint32_t>(block.tokens), number = t / size;
  return {number, t - number * size};
}
VATTN_HD inline std::byte* RowInBlock(const Storage& s, int64_t block, int64_t in_block,
                                      int kv_head) {
  return s.base + block * s.block.bytes + in_block * s.block.token_bytes +
         kv_head * s.block.head_bytes;
}
VATTN_HD inline std::byte* RowAt(const Storage& s, const int32_t* blocks, int kv_head,
                                 int64_t token) {
  const TokenPlace at = PlaceOf(s.block, token);
  return RowInBlock(s, blocks[at.block], at.in_block, kv_head);
}
inline std::byte* CodesInBlock(const Storage& s, int64_t block, int64_t in_block, int kv_head) {
  const int64_t bytes = s.code.bytes();
  return s.codes == nullptr ? s.base + block * s.block.bytes + s.block.codes + in_block * bytes
                            : s.codes + block * s.code_block_bytes +
                                  (int64_t{kv_head} * s.block.tokens + in_block) * bytes;
}
inline std::byte* CodesAt(const Storage& s, const int32_t* blocks, int kv_head, int64_t token) {
  const TokenPlace at = PlaceOf(s.block, token);
  return CodesInBlock(s, blocks[at.block], at.in_block, kv_head);
}

// The middle [begin, end) of a step whose last num_tokens of `tokens` tokens are its queries: that of
// the first one. end = begin: none.
struct Middle {
  int64_t begin = 0, end = 0;
};
VATTN_HD inline int64_t MiddleEnd(const ExactSets& sets, int64_t tokens) {
  const int64_t end = (tokens - sets.window) / kCodeTokens * kCodeTokens;
  if (end - sets.sinks >= sets.exact_below) return end;
  return tokens < sets.sinks ? tokens : sets.sinks;
}
VATTN_HD inline Middle MiddleOfStep(const ExactSets& sets, int64_t tokens, int num_tokens) {
  const int64_t seen = tokens - num_tokens + 1, begin = seen < sets.sinks ? seen : sets.sinks,
                end = MiddleEnd(sets, seen);
  return {begin, end > begin ? end : begin};
}

// The place of a head among the arrays of a call, and where the tokens end that it sees.
inline int64_t HeadPlace(const Group& g, int head) {
  const int heads = g.group_heads / g.num_tokens;
  return head / heads * g.token_stride + head % heads;
}
inline int64_t VisibleEnd(const Group& g, int head) {
  return g.tokens - g.num_tokens + 1 + head / (g.group_heads / g.num_tokens);
}

// The blocks of the middle of a Group or a cuda::DeviceGroup: the first one's number in the
// sequence, and how many there are.
template <class G>
VATTN_HD inline int64_t FirstBlock(const G& g) {
  return g.middle_begin / kBlockTokens;
}
template <class G>
VATTN_HD inline int64_t NumBlocks(const G& g) {
  return g.middle_end <= g.middle_begin ? 0 : BlocksFor(g.middle_end) - FirstBlock(g);
}

// The segments of an index as kernels see them: at least one, the number of the segment that a block
// lies in, and its tables.
VATTN_HD inline int NumSegments(int num_segments) { return num_segments > 0 ? num_segments : 1; }
VATTN_HD inline int SegmentOf(const IndexSegment* segments, int num_segments, int64_t block) {
  int k = 0;
  while (k + 1 < num_segments && segments[k + 1].first_block <= block) ++k;
  return k;
}
inline const IndexTables& TablesOf(const Group& group, int segment) {
  return group.num_segments > 0 ? group.segments[segment].tables : group.index;
}

// How many floats Scratch::prepared holds of a query head. kPage: its positive elements, then its
// negative ones. kPooled: the query; Scratch::packed has the offset. kClusters: the score of each
// centroid.
inline int PreparedFloats(const Storage& s) {
  switch (s.code.kind) {
    case IndexKind::kPage:
      return 2 * s.row.dim_k;
    case IndexKind::kPooled:
      return s.row.dim_k;
    case IndexKind::kClusters:
      return s.code.centroids;
    default:
      return 0;
  }
}

// Bytes of working memory of a group with `tokens` tokens.
size_t ScratchBytes(const Storage& storage, const Promise& promise, int64_t tokens,
                    int group_heads);
// Carves it from `memory`, 64-byte aligned.
Scratch CarveScratch(const Storage& storage, const Promise& promise, int64_t tokens,
                     int group_heads, std::byte* memory);

}  // namespace vattn

#endif  // VATTN_KERNELS_PARAMS_H_
