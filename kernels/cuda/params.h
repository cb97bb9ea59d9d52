// Parameters of the CUDA backend's operations. Every pointer is one that the device can follow;
// what changes from step to step lies in device memory, so that a captured graph can be replayed. G
// = query heads of one GQA group (one KV head), of all query tokens of the call.
#ifndef VATTN_KERNELS_CUDA_PARAMS_H_
#define VATTN_KERNELS_CUDA_PARAMS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/merge.h"
#include "kernels/params.h"
#include "kernels/softmax.h"

namespace vattn::cuda {

// A cudaStream_t, on which the work of a call is enqueued.
struct Stream {
  void* handle = nullptr;
};

constexpr int kMaxDeviceGroup = 128;  // query heads per KV head, of all query tokens
// The most sums that a team adds up at a time: those of the certificate, TailTotals of verify.cuh, and
// of groups with few heads the three of a report.
VATTN_HD constexpr int MostTotals(int heads) { return 7 * heads + 4; }
constexpr int kMaxPrefillDim = 256;
constexpr int kFixedParts = 4;  // thread blocks that share the sinks and window of a group
constexpr int kMostWalks = 3;   // over lists of rows, with Policy::kTopKUniform

// Where the bytes of a token are. Blocks of the host pool are as in kernels/geometry.h. Codes have a
// copy on the device, block by block.
struct DeviceStorage {
  // base: the device's address of the mapped host pool. row says how rows lie on the device, and in the
  // library's own pool.
  Storage host;
  // In a pool of an engine's: bytes from a row's K to its V, and whether rows lie otherwise there than
  // on the device.
  int64_t pool_v_offset = 0;
  bool split = false;
  // [blocks of the pool][256 tokens of code, then of value code]. In an engine's pool [blocks][KV
  // heads][block.tokens] of code, and code_block_bytes from a block to the next.
  std::byte* codes = nullptr;
  int64_t code_block_bytes = 0;
  int32_t sinks = 0;            // rows kept on the device: the first tokens ...
  int32_t ring_tokens = 0;      // ... and the last ones: token t in row sinks + t % ring_tokens
  int32_t tiles_in_flight = 0;  // of rows, in a thread block's shared memory
};

// Rows of the middle that stay on the device, shared by the groups of a batch. A clock evicts them: it
// passes over a slot whose use mark is set once, and clears the mark.
struct HotSetRef {
  std::byte* rows = nullptr;  // [slots][row_bytes]
  // [keys] slot of a row, -1: none. The key of a row is DeviceGroup::hot_key + its block's id * tokens
  // of a block + its place in the block.
  int32_t* slot_of = nullptr;
  int64_t* owner = nullptr;            // [slots] key of the row that it holds, -1: none
  unsigned long long* use = nullptr;   // [slots] 2 * call of the last use + mark
  unsigned long long* hand = nullptr;  // [1] of the clock
  unsigned long long* call = nullptr;  // [1] counts attention calls
  int32_t slots = 0;
};

struct ValuePart;

// Working memory of one group for one call. Sizes are for the group's tokens, rounded up to blocks.
struct GroupScratch {
  uint16_t* estimate = nullptr;  // [blocks][G][256] e^ over its block's largest, fp16
  float* shift = nullptr;        // [blocks][G] ln of that largest
  float* mass = nullptr;         // [blocks][G] sum of estimate
  // [blocks][G][256] s^. Top-k policies and kinds of index without codes only.
  float* score = nullptr;
  // [blocks][256] tokens that may be drawn, in the low word, with their weight in the high one. A
  // segment's candidates stand from its first place on; `candidates` [kMostSegments] counts them.
  uint64_t* candidate = nullptr;
  uint32_t* candidates = nullptr;
  float* predicted = nullptr;       // [kMostSegments][G + 1] variances and draws
  float* log_gain = nullptr;        // [G] of the plan, see kernels/cpu/sample.h
  float* floor = nullptr;           // [G]
  uint32_t* token = nullptr;        // [capacity] selected tokens
  float* weight = nullptr;          // [capacity] inclusion probability before the cap at 1
  uint64_t* row = nullptr;          // [capacity] address of the row
  int32_t* slot = nullptr;          // [capacity] hot slot to copy it to, -1: none
  float* norm2 = nullptr;           // [capacity] |v|^2
  float* logit = nullptr;           // [G][capacity]
  float* residual = nullptr;        // [G][capacity] |e (v - o')|^2 / (pi D^2), 0 with pi = 1
  float* term = nullptr;            // [G][capacity] its part of the variance
  float* query = nullptr;           // [G][dim_k] scaled
  PackedQueries* packed = nullptr;  // [segments of the index][G / 8 rounded up]
  // [segments of the index][G] as in Scratch. IndexKind::kBalanced, else null.
  float* noise = nullptr;
  float* sure = nullptr;
  // [kFixedParts][G][dim_v + 3] softmax states of sinks and window.
  float* fixed = nullptr;
  float* state = nullptr;               // [walks][team][G][dim_v + 3] softmax states of the draw
  double* partial = nullptr;            // [2][team][MostTotals(G)] sums of a team's parts
  float* output = nullptr;              // [G][dim_v]
  HeadWork* head = nullptr;             // [G]
  float* growth = nullptr;              // [G]
  HeadState* state_of_token = nullptr;  // [G], with several query tokens
  // The next four with a slice of a context (kernels/merge.h).
  RankStep* slice = nullptr;    // [1]
  Outlook* outlook = nullptr;   // [G] of the whole context
  float* log_others = nullptr;  // [G] for HeadWork
  float* moment = nullptr;      // [team][G][dim_v] sum of c v over the tail
  // The next six only with value codes. What codes had said of rows that were read is taken back from
  // the numerators in `state`, and its mass is kept in coded_mass.
  float* log_predicted_e = nullptr;  // [G][capacity] ln e^ of selected tokens
  // [G][dim_v + 3] softmax states of the codes of the whole middle.
  float* coded = nullptr;
  float* coded_mass = nullptr;           // [team][G] mass taken back, in the unit of the state
  ValuePart* value_part = nullptr;       // [items][kMostParts] see kernels/cuda/values.h
  uint32_t* value_parts_done = nullptr;  // [items] in this call
  // The next five only with top-k policies (kernels/cuda/rank.cuh). A mask has a bit for each token of
  // a block.
  uint32_t* top = nullptr;        // [blocks][G][8] masks of each head's best
  uint32_t* drawn = nullptr;      // [blocks][G][8] masks of each head's sample
  uint32_t* seen = nullptr;       // [blocks][8] masks of the tokens listed so far
  uint32_t* histogram = nullptr;  // [kDigits][G][kDigitBins]
  // [warps of the team][G] how many tokens are tied for the last place.
  uint32_t* ties = nullptr;
  uint32_t* barrier = nullptr;  // [1] arrivals in this call
  int64_t capacity = 0;         // of the list of selected tokens
};

// One (sequence, layer, KV head) of one step.
struct DeviceGroup {
  const int32_t* blocks = nullptr;  // [tokens / block.tokens rounded up] block ids
  std::byte* fixed = nullptr;       // [sinks + ring_tokens][row_bytes]
  // Of an engine's pool, else null: which row each place of `fixed` holds, as FixedTag says it, and how
  // often each slot of the pool was written.
  unsigned long long* fixed_tag = nullptr;
  const uint32_t* writes = nullptr;
  HeadState* state = nullptr;  // [G]
  // With several query tokens, else null: the controller that each of them starts from, and that
  // goes on as the last one leaves it.
  HeadState* carried = nullptr;  // [G / query tokens]
  // The tables of the first segment. Values are coded with them in every segment.
  IndexTables index;
  const IndexSegment* segments = nullptr;  // [num_segments]
  int32_t num_segments = 0;
  // Where the last token's queries go, [][dim_k] in the row dtype; null: nowhere.
  std::byte* recent = nullptr;
  RandomKey key;
  int32_t slot = 0, kv_head = 0;  // of the batch, or the number of the request
  // Where the queries and outputs of its query tokens are: from number first_query on, in
  // num_queries tokens. Where a step has room for more, the last one is answered again.
  int64_t first_query = 0;
  int32_t num_queries = 1;
  bool refused = false;  // its arguments were out of range: outputs are NaN, and tokens is 0
  int64_t hot_key = 0;
  int64_t tokens = 0;  // with the step's new ones; 0: nobody sits here
  int64_t middle_begin = 0, middle_end = 0;
  int64_t ring_begin = 0;   // tokens from here on are in the ring
  int64_t first_block = 0;  // of the scan: how many blocks the groups before this one have
  uint64_t step = 0;
  GroupScratch scratch;
};

// What a step is made of, besides its groups.
struct StepHeader {
  int64_t scan_blocks = 0;  // of all groups
  int32_t num_groups = 0;
  int32_t num_tokens = 0;  // query tokens that the step was begun for
};

// Sums over calls, read by vattn_runtime_stats.
struct DeviceCounters {
  unsigned long long verdicts[4];
  unsigned long long middle, selected, fetched, looks;
  unsigned long long outliers, noisy;
  unsigned long long refused;  // requests of an engine's whose arguments were out of range
};

// How the answer kernel is launched: teams of thread blocks, each at work on one group.
struct AnswerShape {
  int32_t teams = 0;  // teams at a time; if there are more groups, a team takes several in turn
  int32_t team = 0;   // thread blocks of a team
};

// Arrays of an attention call, extents as vattn_attend_params.
struct CallArrays {
  const void* q = nullptr;
  const void* k_new = nullptr;
  const void* v_new = nullptr;
  void* out = nullptr;
  float* lse = nullptr;
  int32_t* verdict = nullptr;
  float* error = nullptr;
  int32_t* selected = nullptr;
  int32_t* fetched = nullptr;
  int32_t* looks = nullptr;
  int64_t* middle = nullptr;
  uint64_t* timeline = nullptr;
  int32_t out_dtype = 0;
  int32_t score_heads = 0;   // the KV heads or the query heads
  int32_t scores_dtype = 0;  // DType
  const void* scores = nullptr;
  int64_t scores_stride = 0;
};

// Places in CallArrays::timeline, as vattn_timeline.
enum class TimelinePoint : int32_t {
  kStart,
  kPrepared,
  kScanned,
  kPlanned,
  kDrawn,
  kAttended,
  kJudged,
  kDone
};
constexpr int kTimelinePoints = 8;

// As vattn_selection. kAttendSelected reads them, kSelect writes them.
struct SelectionArrays {
  int64_t capacity = 0;
  int32_t* tokens = nullptr;
  float* log_weights = nullptr;
  int32_t* counts = nullptr;
};

using vattn::Task;

// True if a stage of its own writes GroupScratch::score, from which the scan goes on.
VATTN_HD inline bool ScoredBeforeScan(IndexKind index) {
  return index == IndexKind::kExact || index == IndexKind::kExternal;
}

// What a slice of a context has besides, extents as vattn_attend_params.
struct SliceArrays {
  float* partial = nullptr;
  const float* gathered = nullptr;
  int64_t gathered_stride = 0;  // floats from one rank to the next
  int32_t* again = nullptr;
  int32_t rank = 0, ranks = 1;
};

struct StepParams {
  Task task = Task::kDecode;
  DeviceStorage storage;
  Promise promise;  // quantile: device memory
  HotSetRef hot;
  const DeviceGroup* groups = nullptr;  // [most_groups] of this layer
  const StepHeader* header = nullptr;
  DeviceCounters* counters = nullptr;
  int32_t most_groups = 0;  // slots * kv_heads
  int32_t kv_heads = 0;
  int32_t group_heads = 0;  // G
  int32_t num_tokens = 1;   // query tokens, the sequence's last; their heads are in their order
  bool paged = false;       // codes lie in an engine's pool
  CallArrays call;
  SelectionArrays selection;
  SliceArrays slice;
};

// Attention of tokens [first, first + count) of one (sequence, layer) to those of one chunk [begin,
// begin + tokens), as PrefillParams. Chunks come in order from token 0 on; sums of those before are
// in most, mass and sum, for each part of the keys apart.
struct PrefillChunk {
  RowLayout row;
  float scale = 1;
  int32_t kv_heads = 0;
  int32_t group_heads = 0;  // of one token
  int32_t q_heads = 0;
  int32_t out_dtype = 0;
  int64_t first = 0, count = 0;
  int64_t begin = 0, tokens = 0;
  bool last = false;                // no chunk follows: outputs are written
  const std::byte* rows = nullptr;  // [kv_heads][tokens][row_bytes]
  int64_t rows_stride = 0;          // bytes from one KV head to the next
  const void* q = nullptr;
  int64_t q_token_stride = 0, q_head_stride = 0;
  int32_t splits = 1;     // parts that the keys of each chunk are split into
  float* most = nullptr;  // [splits][count][q_heads] largest logit so far, times log2 e ...
  float* mass = nullptr;  // ... sum of weights relative to it
  float* sum = nullptr;   // [splits][count][q_heads][dim_v] of weight times value
  void* out = nullptr;    // [count][q_heads][dim_v]
  float* lse = nullptr;   // or null
};

// What a row of controller states knows of the request that it has (runtime/paged_pool.h).
struct PagedRow {
  unsigned long long requests_before = 0, step = 0;
};

// A layer of a pool of an engine's, as the groups of a step see it.
struct PagedLayer {
  int32_t kv_heads = 0;                     // 0: the layer is left out
  int32_t group_heads = 0;                  // of one query token
  int32_t team = 0;                         // thread blocks that answer a group
  const IndexTables* index = nullptr;       // [kv_heads]; null: nothing is coded
  HeadState* states = nullptr;              // [rows][kv_heads * group_heads]
  std::byte* fixed = nullptr;               // [rows][kv_heads][sinks + ring_tokens][row_bytes]
  unsigned long long* fixed_tag = nullptr;  // [rows][kv_heads][sinks + ring_tokens]
  const uint32_t* writes = nullptr;         // [slots]
  int64_t hot_key = 0;
  StepHeader* header = nullptr;
  DeviceGroup* groups = nullptr;  // [max_requests * kv_heads]
};

// A step over an engine's pool. The arrays of requests are as vattn_paged_step has them.
struct PagedStepParams {
  DeviceStorage storage;  // of any layer
  Promise promise;
  ExactSets sets;
  uint64_t seed = 0;
  uint32_t first_kv_head = 0;  // of the model's, for random numbers
  int32_t num_layers = 0;
  const PagedLayer* layers = nullptr;  // [num_layers] in device memory
  int64_t num_blocks = 0, max_tokens = 0, max_step_tokens = 0;
  int32_t max_requests = 0;
  int32_t num_requests = 0, num_tokens = 1;  // num_tokens: most query tokens of a request
  int64_t num_query_tokens = 0;
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  const int32_t* lengths = nullptr;
  const int32_t* query_starts = nullptr;
  const int32_t* request_rows = nullptr;
  const int32_t* resets = nullptr;
  PagedRow* rows = nullptr;      // [max_requests]
  int32_t* verdicts = nullptr;   // [max_requests] how each request of the step was found
  std::byte* scratch = nullptr;  // of scratch_bytes, for the groups of one layer
  int64_t scratch_bytes = 0;
  DeviceCounters* counters = nullptr;
};

// Codes of tokens [begin, end) of groups, both multiples of 16, into the device and the host copy.
struct EncodeItem {
  const int32_t* blocks = nullptr;
  IndexTables index;
  int64_t begin = 0, end = 0;
  unsigned long long* outliers = nullptr;  // if not null, the number of outliers is added here
};

// Sinks and ring of a group whose rows are brought to the device, as far as they lie below `tokens`.
struct FixedItem {
  const int32_t* blocks = nullptr;
  std::byte* fixed = nullptr;
  int64_t tokens = 0;
};

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_PARAMS_H_
