/* vattn: decode attention over long contexts with most of the KV cache outside the accelerator.
 *
 * (1) Handles are opaque; the library makes and frees them. destroy(NULL) is a no-op.
 * (2) Calls that can fail return vattn_code; vattn_last_error() has the text, per thread.
 * (3) A call with a stream enqueues: its pointers stay valid until the stream has passed it. A call
 *     without a stream, or with stream NULL on the CPU backend, blocks until the result is there.
 * (4) Structs start with struct_size and have no implicit padding. Fields are only appended; zero
 *     in a new field means "as before". Fill a struct with its _init function, then change fields.
 * (5) A runtime serves many threads at a time, a sequence or a batch one at a time. A sequence that
 *     sits in a batch is used through the batch while a step is open.
 * (6) Nothing here exits, prints, or reads the environment but for two variables, which
 *     vattn_runtime_create looks at: VATTN_LOG_LEVEL (error, warning, info or debug: lines that
 *     matter less are not logged; unset: all are) and VATTN_BACKEND (cpu or cuda in place of
 *     backend auto). Another word in one of them is INVALID_ARGUMENT; an empty one counts as unset.
 * (7) fork(): a child has copies of its parent's handles. On the CPU it may use them: tokens,
 *     answers and the host pool are from then on each one's own. What is shared stays the parent's:
 *     a child neither writes nor removes anything in disk_path (INVALID_ARGUMENT; a full pool is
 *     FULL, as nothing can be spilled), and its ending or destroying handles touches no file and no
 *     lock of the parent. On CUDA every call of a child with such a handle is INVALID_ARGUMENT, and
 *     destroying one only forgets it. A runtime that the child makes is wholly its own. Not while
 *     another thread is inside of a call: that thread's locks would stay taken in the child.
 *
 * Terms: a row is the K and V of one token and one KV head. Sinks are the first tokens, the window
 * the last ones; both are always attended exactly. The tokens between them are the middle: their
 * rows are chosen by sampling from a small index (codes). A decode step answers 1 to 16 query tokens
 * per sequence and layer. A GQA group is the query heads that share one KV head.
 *
 * The host pool is blocks of 256 tokens of one KV head. A block is free, used, or reserved: set
 * aside for a sequence (vattn_sequence_reserve), which then cannot be told FULL for it. Forks and
 * sequences begun from one prefix share blocks; a write to a shared block copies it first. Each
 * used or reserved block counts once, for the tenant (vattn_sequence_options.tenant) whose sequence
 * took it, until nobody holds it.
 */
#ifndef VATTN_H_
#define VATTN_H_

#include <stddef.h>
#include <stdint.h>

/* Marks what the library exports. */
#if defined(__GNUC__)
#define VATTN_EXPORT __attribute__((visibility("default")))
#else
#define VATTN_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define VATTN_VERSION_MAJOR 0 /* of this header, as vattn_version has it of the library */
#define VATTN_VERSION_MINOR 1 /* goes up with what is added */
#define VATTN_VERSION_PATCH 0 /* goes up with what is mended */

struct CUstream_st;                           /* what cudaStream_t points to */
typedef struct vattn_runtime vattn_runtime;   /* a host pool, its options and counters */
typedef struct vattn_sequence vattn_sequence; /* rows of a sequence of tokens in every layer */
typedef struct vattn_batch vattn_batch; /* slots for sequences that take decode steps together */

/* ---- Codes and texts ------------------------------------------------------------------------ */

typedef enum vattn_code {
  VATTN_OK = 0,
  VATTN_INVALID_ARGUMENT = 1, /* the text names the argument, its value and the limit */
  VATTN_OUT_OF_MEMORY = 2,    /* the system refused memory */
  VATTN_NOT_SUPPORTED = 3,    /* valid, but not by this build or backend */
  VATTN_DEVICE_ERROR = 4,
  VATTN_IO_ERROR = 5,
  VATTN_INTERNAL = 6, /* a bug of the library */
  /* our own pool or a quota is full: need, limit and knob are in the text; nothing is lost */
  VATTN_FULL = 7,
  VATTN_DEVICE_LOST = 8,
  VATTN_DATA_LOSS = 9, /* a stored copy failed its check */
  VATTN_NOT_FOUND = 10
} vattn_code;

/* Text of the last failed call of this thread; never NULL, "" before the first failure. Valid until
 * the next failing call of the same thread. */
VATTN_EXPORT const char* vattn_last_error(void);
/* "OK", "INVALID_ARGUMENT", ...; "UNKNOWN" for a number that is no code. */
VATTN_EXPORT const char* vattn_code_name(int32_t code);
/* "0.1.0". A static string, as that of vattn_build_info: commit, compiler, backends. */
VATTN_EXPORT const char* vattn_version(void);
/* Commit, compiler and backends that the library was built with, in one line. */
VATTN_EXPORT const char* vattn_build_info(void);

/* ---- Options -------------------------------------------------------------------------------- */

typedef enum vattn_dtype {
  VATTN_F32 = 0,
  VATTN_F16 = 1,
  VATTN_BF16 = 2
  /* 3.. are kept for fp8 and int4 rows with scales */
} vattn_dtype;

/* Where steps are computed. */
typedef enum vattn_backend {
  VATTN_BACKEND_AUTO = 0, /* CUDA when built with it and a device is there, else CPU */
  VATTN_BACKEND_CPU = 1,
  VATTN_BACKEND_CUDA = 2
} vattn_backend;

/* Which rows of the middle a step reads. */
typedef enum vattn_policy {
  /* Poisson sampling with a checked error bound (kernels/METHOD.md) */
  VATTN_POLICY_VERIFIED = 0,
  VATTN_POLICY_TOPK = 1,         /* the best topk_share of the middle by index score, no sample */
  VATTN_POLICY_TOPK_UNIFORM = 2, /* vAttention (arXiv 2510.05688): top-k plus a uniform sample */
  VATTN_POLICY_DENSE = 3         /* every row: exact */
} vattn_policy;

/* What predicts the scores of the middle. */
typedef enum vattn_index {
  VATTN_INDEX_BALANCED = 0, /* balanced-truncation codes, index_bytes a token */
  /* True scores: reads every key, on CUDA those of the middle over PCIe in every call (they are
   * in no count of fetched rows). A yardstick, not a way to save bytes. */
  VATTN_INDEX_EXACT = 1,
  /* What others predict scores with, to compare and to build on. Verified answers need an index
   * that ranks heavy tokens high: sign, page, pooled and clusters broke the promise for some
   * heads of real recordings (bench/ZOO.md). CUDA has sign and hadamard2 of these. */
  /* 8 * index_bytes signs of a linear map (sign_maps), by Hamming distance */
  VATTN_INDEX_SIGN = 2,
  /* 2-bit levels after a Hadamard rotation (Adamas); head_dim_k up to 256 */
  VATTN_INDEX_HADAMARD2 = 3,
  /* bounds of 16 tokens by dimension (Quest); head_dim_k / 4 bytes a token */
  VATTN_INDEX_PAGE = 4,
  /* mean key of 16 tokens (NSA, InfLLM-v2); head_dim_k / 8 bytes a token */
  VATTN_INDEX_POOLED = 5,
  /* k-means of the prompt's keys, 2 bytes a token and 16,384 * index_bytes bytes of centroids per
   * KV head (RetroInfer) */
  VATTN_INDEX_CLUSTERS = 6,
  VATTN_INDEX_EXTERNAL = 7 /* the caller's: vattn_attend_params.scores; no codes */
} vattn_index;

/* What an error is relative to: ref of the promise, with o the head's answer. */
typedef enum vattn_norm {
  VATTN_NORM_VALUE = 0, /* ref = max(|o|, norm_floor * rms|v|), rms weighted by attention */
  VATTN_NORM_OUTPUT = 1 /* ref = |o| */
} vattn_norm;

/* What becomes of a head that max_looks draws did not verify. */
typedef enum vattn_on_unverified {
  VATTN_ON_UNVERIFIED_DENSE = 0,      /* read the rest: exact */
  VATTN_ON_UNVERIFIED_BEST_EFFORT = 1 /* return the estimate, flagged and counted */
} vattn_on_unverified;

/* How the error is bounded from its estimated variance. */
typedef enum vattn_bound {
  VATTN_BOUND_SHARP = 0, /* chi-square quantile at the effective rank of the error */
  VATTN_BOUND_SAFE = 1   /* one-dimensional normal quantile: wider, needs no rank estimate */
} vattn_bound;

/* what the sample of VATTN_POLICY_TOPK_UNIFORM is sized for */
typedef enum vattn_target {
  VATTN_TARGET_SDPA = 0, /* the attention output */
  VATTN_TARGET_NUMERATOR = 1,
  VATTN_TARGET_DENOMINATOR = 2
} vattn_target;

/* How files are read and written. */
typedef enum vattn_io {
  VATTN_IO_AUTO = 0,  /* io_uring where it is to be had, else pread and pwrite */
  VATTN_IO_URING = 1, /* NOT_SUPPORTED where it is not */
  VATTN_IO_PREAD = 2
} vattn_io;

/* what a sequence may take from the host pool */
typedef enum vattn_admission {
  /* what it has reserved, and beyond that whatever is free when it is needed */
  VATTN_ADMISSION_OVERCOMMIT = 0,
  /* what it has reserved, no more: whoever was admitted can finish */
  VATTN_ADMISSION_RESERVED = 1
} vattn_admission;

/* where stored prefixes are */
typedef enum vattn_tier {
  /* saved to the disk if there is a disk_path, else to memory; looked for in both */
  VATTN_TIER_AUTO = 0,
  VATTN_TIER_MEMORY = 1, /* blocks of the host pool */
  VATTN_TIER_DISK = 2    /* files in disk_path */
} vattn_tier;

/* What is known of a query head's answer. */
typedef enum vattn_verdict {
  VATTN_VERDICT_EXACT = 0, /* nothing was sampled away */
  /* Of a head's answers with this verdict, over steps, at most a share delta is off by more than
   * epsilon * ref. That is no statement about a single call (kernels/METHOD.md, "Promise"). */
  VATTN_VERDICT_VERIFIED = 1,
  VATTN_VERDICT_DENSE = 2, /* could not be verified, so every row was read: exact */
  /* No promise: policy without one, or on_unverified = best effort. Also, with an infinite
   * error, an answer on the CPU backend that is not finite, from rows or queries that are not or
   * from sums and types too small for them. */
  VATTN_VERDICT_BEST_EFFORT = 3
} vattn_verdict;

/* How much a line of the log matters. */
typedef enum vattn_log_level {
  VATTN_LOG_ERROR = 0,
  VATTN_LOG_WARNING = 1,
  VATTN_LOG_INFO = 2,
  VATTN_LOG_DEBUG = 3
} vattn_log_level;
/* Called on the thread of the API call that caused the line, when that call has done its work
 * and holds no lock any more: it may make vattn calls, on the handle of the call as well, but
 * for destroying that one. Lines that such calls cause are dropped. An exception that it throws
 * ends there. message ends without a newline and dies with the call. */
typedef void (*vattn_log_function)(void* user, int32_t level, const char* message);

/* What a runtime is made with; fill it with vattn_options_init, then change fields. */
typedef struct vattn_options {
  size_t struct_size; /* bytes of the struct that the caller knows */

  /* Model shape. Query head h reads KV head h / (num_q_heads / kv_heads of the layer). */
  int32_t num_layers;   /* 1 to 1024 */
  int32_t num_q_heads;  /* 1 to 1024, a multiple of every layer's KV heads */
  int32_t num_kv_heads; /* 1 to 1024 */
  int32_t head_dim_k;   /* 16 to 1024, a multiple of 16 */
  int32_t head_dim_v;   /* as head_dim_k */
  int32_t dtype;        /* vattn_dtype of rows, q, k and v */
  int32_t shared_kv;    /* 1: MLA-shaped rows, V is the first head_dim_v elements of K */
  float softmax_scale;  /* 0: 1 / sqrt(head_dim_k) */
  /* NULL: every layer has num_kv_heads. Else [num_layers] KV heads by layer, read during the call
   * only; 0 leaves a layer out (sliding window layers that the engine serves itself). */
  const int32_t* layer_kv_heads;

  /* Machine. */
  int32_t backend; /* vattn_backend */
  int32_t device;  /* CUDA ordinal */
  /* CPU threads that a call is spread over. 0: all that this process may use, by its affinity
   * and by the CPU time that its control groups allow; 1: the calling one, so that calls of
   * several threads run side by side. 0 to 4096; more than its affinity allows count as all.
   * Started by vattn_runtime_create, which answers OUT_OF_MEMORY if the system refuses one. */
  int32_t num_threads;
  int32_t numa_node; /* placement of the host pool; -1: where the threads first touch it */

  /* Host pool, and who may take how much of it. */
  uint64_t host_bytes; /* limit of the host pool in bytes; mapped at create, touched as used */
  /* Most bytes of the host pool that one tenant may use and reserve, unless vattn_tenant_limit
   * gives it a limit of its own; rounded down to whole blocks; 0: no limit. */
  uint64_t tenant_bytes;
  int32_t admission;  /* vattn_admission */
  int32_t huge_pages; /* 1: ask for transparent huge pages */
  /* 1: touch the whole host pool at create, in parallel; OUT_OF_MEMORY where the machine or the
   * control group has not as much available. */
  int32_t prefault;
  /* 0; 1: a block of the host pool is filled with zeros before another sequence may have it.
   * Without it old bytes stay in memory until they are overwritten, but reach no output and no
   * file. Codes, tables and rows in device memory are not covered. */
  int32_t zero_on_free;

  /* Sets that are always exact, in tokens. */
  int32_t sinks;       /* 16: first tokens; multiple of 16, 0 to 256 */
  int32_t window;      /* 128: last tokens; 1 to 65536 */
  int32_t exact_below; /* 1024: a middle with fewer tokens is attended whole; >= 64 */

  /* Index and value codes. */
  int32_t index; /* vattn_index */
  /* Bytes of code per token and KV head: 16, 32, 48 or 64; 4, 8, 16 or 32 with sign. 0, the
   * default: a quarter of head_dim_k, but 32 to 64, with balanced, else 32. Indices whose size
   * follows from head_dim_k ignore it. */
  int32_t index_bytes;
  /* 0, 2 or 4 bits per value element kept beside the rows; on CUDA, like codes, on the device
     too. */
  int32_t value_bits;
  /* NULL or "": random hyperplanes. Else the path of learned maps for VATTN_INDEX_SIGN, as
   * examples/train_sign_index.py writes them: a safetensors file with the F32 tensors key and
   * query [num_layers, most KV heads of a layer, 8 * index_bytes, head_dim_k] and metadata
   * format = "vattn-sign-1". Bit j of a key k is [key_j . (k - mean key) >= 0], of a query q
   * [query_j . q >= 0]. Read by vattn_runtime_create, which then answers as with profile. */
  const char* sign_maps;
  /* NULL or "": none. Else the path of a model profile, as `vattn calibrate` writes it: what the
   * index is calibrated on when a sequence has had no queries (vattn_append_params.q) by the
   * time its index is fixed. A safetensors file with the F32 tensor c_q [num_layers, most KV
   * heads of a layer, head_dim_k, head_dim_k], the mean of q q^T over scaled queries by KV head,
   * and metadata format = "vattn-profile-1" and softmax_scale, the factor in those queries. Read
   * by vattn_runtime_create, which then also answers NOT_FOUND, IO_ERROR, DATA_LOSS (cut short,
   * damaged, no safetensors file) and INVALID_ARGUMENT (another format or shape). */
  const char* profile;

  /* Promise. */
  int32_t policy;        /* vattn_policy */
  int32_t norm;          /* vattn_norm */
  int32_t on_unverified; /* vattn_on_unverified */
  int32_t bound;         /* vattn_bound */
  float epsilon;         /* relative error, over 0, at most 10 */
  /* share of a head's answers that may be off by more, over 0, at most 0.215 */
  float delta;
  float norm_floor; /* 0.5: c of VATTN_NORM_VALUE; 0 to 1 */

  /* Sampling. */
  int32_t max_looks; /* 6: draws in one step before on_unverified; 1 to 8 */
  uint64_t seed;     /* all random numbers derive from it */
  /* 0: the first draw aims at the promise, and seldom needs a second look: the least time. 1: it
   * is a pilot for a second one in every step: fewer rows (a seventh on recorded attention),
   * more time (a fifth on CUDA with 1M tokens). */
  int32_t pilot;
  /* 64: 1 / refresh of the random numbers are renewed a step; 1 to 4096 */
  int32_t refresh;
  int32_t min_selected; /* 16: expected rows drawn per KV head at least; 0 to 65536 */
  /* 0.5: of the middle; above it a head counts as unverified; (0, 1] */
  float max_selected_share;

  /* Policies topk and topk_uniform. */
  float topk_share; /* 0.05: top-k of the middle per query head; [0, 1] */
  /* 0.05: base sample of the middle, VATTN_POLICY_TOPK_UNIFORM; [0, 1] */
  float base_share;
  int32_t target; /* vattn_target */

  /* Hot set. */
  /* 0.05: share of the middle that the hot set may hold; [0, 1]. On CUDA each batch keeps one of
   * its own in device memory, with this share of the rows of the host pool. */
  float hot_share;

  /* Disk. */
  /* NULL or "": none. Else a directory for stored prefixes (vattn_prefix_save) and spilled
   * sequences. The runtime owns it as long as it lives: another one, in any process, is refused
   * with INVALID_ARGUMENT. The directory is meant, not its name: a change of the current
   * directory or of links does not matter, and one that is moved away or replaced is IO_ERROR
   * when it is next written to. It is made if it alone is missing. Stored prefixes are found
   * again by the next runtime with the same layout (shape, dtype, sinks, index); files of
   * spilled sequences of a dead process are removed. vattn_runtime_create then also answers
   * IO_ERROR. */
  const char* disk_path;
  /* most bytes of files there; 0: no limit. Prefixes unused for longest go first */
  uint64_t disk_bytes;
  /* 1: when the host pool is full, sequences that sit in no batch, that no call works on and
   * that have no reservation hibernate in disk_path until there is room, and wake by their next
   * use: those of the tenant that needs it first, those unused for longest first. Only then
   * FULL. A tenant at its quota moves its own sequences alone. */
  int32_t spill;
  int32_t io_engine;      /* vattn_io: how files are read and written */
  int32_t io_depth;       /* 8: transfers under way at most; 1 to 256 */
  int32_t io_block_bytes; /* 1 MiB: of a transfer; a multiple of 4096 up to 256 MiB */
  /* 1: through the page cache; 0: past it (O_DIRECT) where the file system allows */
  int32_t io_buffered;
  int32_t io_timeout_ms; /* 60000: IO_ERROR if no transfer of io_uring ends for so long */

  /* Logger; NULL keeps the library silent. */
  vattn_log_function log;
  void* log_user; /* first argument of log */

  /* Tensor parallelism. */
  /* 0: with one runtime for each rank, the number among the model's KV heads of this rank's first
   * one; 0 to 64512. Random numbers and tables (vattn_tables_save) are
   * those of the model's heads, so that a head draws the same rows and answers with the same bits as
   * in one runtime with all heads: over a pool always, over sequences as long as no new segment of
   * the index is due to another head (kernels/METHOD.md, "Segments"). */
  uint64_t first_kv_head;
} vattn_options;

/* Fills options with defaults: one layer, 8 query heads, 2 KV heads, head_dim 128, bf16, 1 GiB host
 * pool, verified (epsilon 0.1, delta 0.1, norm value), 32-byte balanced codes. struct_size is
 * sizeof(vattn_options) as the caller compiled it. NULL is ignored. */
VATTN_EXPORT void vattn_options_init(vattn_options* options, size_t struct_size);

/* Applies a JSON object over options, for engines that pass settings through as text:
 * {"num_layers": 28, "dtype": "bf16", "policy": "verified", "preset": "strict", "epsilon": 0.1}
 * Keys are the field names above; enums by lower-case name ("f16", "value", "best_effort", ...);
 * "preset" is "strict" (epsilon 0.1, norm output), "default" (0.1, norm value) or "fast" (0.2,
 * norm value)
 * and is applied first. layer_kv_heads is an array; it and the texts of profile, disk_path and
 * sign_maps are kept alive by the library until the thread's next call of this function. Unknown
 * keys and wrong types are refused by name. INVALID_ARGUMENT leaves options unchanged. */
VATTN_EXPORT vattn_code vattn_options_from_json(const char* json, vattn_options* options);

/* ---- Runtime -------------------------------------------------------------------------------- */

/* Creates a runtime: checks every option, reads the profile and maps the host pool. Blocks until
 * that is done. INVALID_ARGUMENT, OUT_OF_MEMORY, NOT_SUPPORTED, and those of
 * vattn_options.profile. *out is NULL after a failure. */
VATTN_EXPORT vattn_code vattn_runtime_create(const vattn_options* options, vattn_runtime** out);
/* Defaults, then the JSON object, then vattn_runtime_create. */
VATTN_EXPORT vattn_code vattn_runtime_create_json(const char* json, vattn_runtime** out);
/* Sequences and batches of the runtime must be destroyed first; those that were not are reported to
 * the logger and stay valid for destroy only. */
VATTN_EXPORT void vattn_runtime_destroy(vattn_runtime* runtime);
/* The options in force, every default resolved. layer_kv_heads, profile, disk_path and sign_maps
 * point into the runtime. */
VATTN_EXPORT vattn_code vattn_runtime_options(const vattn_runtime* runtime, vattn_options* options);

/* What this machine offers, as JSON (CPU, SIMD target, NUMA, memory, huge pages, memlock, io_uring,
 * CUDA). Writes at most size bytes with the final 0 and the full length without it to *needed.
 * buffer may be NULL with size 0. */
VATTN_EXPORT vattn_code vattn_doctor(char* buffer, size_t size, size_t* needed);

/* ---- Sequences ------------------------------------------------------------------------------ */

typedef struct vattn_sequence_options {
  size_t struct_size;     /* bytes of the struct that the caller knows */
  uint64_t id;            /* keys the random numbers; 0: a number of the runtime's own */
  int64_t reserve_tokens; /* as vattn_sequence_reserve, before anything is created; 0: none */
  /* Whose blocks it takes count for, and under whose quota; 0: nobody's, which has none. Forks
     are of the same. */
  uint64_t tenant;
} vattn_sequence_options;

/* Fills *options with defaults; struct_size is sizeof(*options). */
VATTN_EXPORT void vattn_sequence_options_init(vattn_sequence_options* options, size_t struct_size);

/* An empty sequence. options may be NULL. FULL if reserve_tokens cannot be set aside: nothing is
   created. */
VATTN_EXPORT vattn_code vattn_sequence_create(vattn_runtime* runtime,
                                              const vattn_sequence_options* options,
                                              vattn_sequence** out);
/* Sets aside all blocks that the sequence still needs to have `tokens` tokens (0 to 2^31) in
 * every layer, in place of what it had set aside before; 0 gives that back. Until it has more
 * tokens than that, appends and steps draw from the reservation and are not FULL. It outlasts
 * them: what truncation frees returns to it, and while blocks are shared with forks and prefixes
 * in memory it holds room for the copies too, so that fork, truncate, vattn_prefix_save and this
 * call can be FULL, which changes nothing. A sequence with a reservation is never spilled.
 * Hibernating gives the room away; the sequence wakes with all of it or stays asleep. Forks
 * start without one. FULL names need, free, reserved, limit and knob. */
VATTN_EXPORT vattn_code vattn_sequence_reserve(vattn_sequence* sequence, int64_t tokens);
/* Frees its blocks. A sequence that sits in a batch is taken out of it first. */
VATTN_EXPORT void vattn_sequence_destroy(vattn_sequence* sequence);
/* A second sequence with the same tokens. Blocks are shared, the first write to a shared block
 * copies it. Random numbers of the copy differ (id as in vattn_sequence_options, 0: next). FULL
 * only if the first has a reservation. */
VATTN_EXPORT vattn_code vattn_sequence_fork(const vattn_sequence* sequence, uint64_t id,
                                            vattn_sequence** out);
/* Keeps the first `tokens` tokens of every layer; layers that have fewer are left alone. FULL
 * only if the sequence has a reservation and cuts blocks that others share. */
VATTN_EXPORT vattn_code vattn_sequence_truncate(vattn_sequence* sequence, int64_t tokens);
/* Tokens held by one layer. */
VATTN_EXPORT vattn_code vattn_sequence_length(const vattn_sequence* sequence, int32_t layer,
                                              int64_t* tokens);

/* A stride of no elements, which 0 cannot say. */
#define VATTN_STRIDE_ZERO INT64_MIN

/* Prompt tokens of one layer. */
typedef struct vattn_append_params {
  size_t struct_size;  /* bytes of the struct that the caller knows */
  int32_t layer;       /* 0 to num_layers - 1 */
  int32_t num_queries; /* tokens in q, 0 to num_tokens: the last ones of k */
  int64_t num_tokens;  /* 1 or more */
  /* [num_tokens, kv_heads, head_dim] in the runtime's dtype, post-RoPE, v NULL with shared_kv. */
  const void* k;
  const void* v; /* as k, with the values' head_dim */
  /* Optional: queries of the last num_queries tokens, [num_queries, q_heads, head_dim_k],
   * post-RoPE and unscaled. They calibrate the index (kernels/METHOD.md, "Index"): pass those of
   * all prompt tokens where they are at hand. Of each call 512, spread evenly over its tokens
   * and heads, are used. */
  const void* q;
  /* Strides in elements; 0: contiguous as above; VATTN_STRIDE_ZERO: 0, every token or head reads
   * the same row, as of a broadcast array. The head dimension itself is contiguous. */
  int64_t k_token_stride; /* from a token of k to the next */
  int64_t k_head_stride;  /* from a head of k to the next */
  int64_t v_token_stride; /* from a token of v to the next */
  int64_t v_head_stride;  /* from a head of v to the next */
  int64_t q_token_stride; /* from a token of q to the next */
  int64_t q_head_stride;  /* from a head of q to the next */
} vattn_append_params;

/* Prompt tokens of one layer that are answered as they are added. */
typedef struct vattn_prefill_params {
  size_t struct_size; /* bytes of the struct that the caller knows */
  int32_t layer;      /* 0 to num_layers - 1 */
  int32_t out_dtype;  /* vattn_dtype of out */
  int64_t num_tokens; /* 1 to 65536 */
  const void* q;      /* [num_tokens, q_heads, head_dim_k], unscaled; these three and the strides */
  const void* k;      /* [num_tokens, kv_heads, head_dim_k] are as in vattn_append_params */
  const void* v;      /* [num_tokens, kv_heads, head_dim_v]; NULL with shared_kv */
  int64_t q_token_stride; /* from a token of q to the next */
  int64_t q_head_stride;  /* from a head of q to the next */
  int64_t k_token_stride; /* from a token of k to the next */
  int64_t k_head_stride;  /* from a head of k to the next */
  int64_t v_token_stride; /* from a token of v to the next */
  int64_t v_head_stride;  /* from a head of v to the next */
  void* out;              /* [num_tokens, q_heads, head_dim_v] in out_dtype */
  float* lse;             /* [num_tokens, q_heads] ln(sum exp(s)); may be NULL */
} vattn_prefill_params;

/* Fills *params with defaults; struct_size is sizeof(*params). */
VATTN_EXPORT void vattn_prefill_params_init(vattn_prefill_params* params, size_t struct_size);

/* Fills *params with defaults; struct_size is sizeof(*params). */
VATTN_EXPORT void vattn_append_params_init(vattn_append_params* params, size_t struct_size);

/* Adds prompt tokens to one layer, in chunks of any size. Blocks until copied. On CUDA k and v,
 * and q apart from them, may be device memory; what writes it must have ended. FULL, or
 * OUT_OF_MEMORY where the device has no room for the codes of its tokens: nothing was added and
 * the sequence goes on as before. */
VATTN_EXPORT vattn_code vattn_append(vattn_sequence* sequence, const vattn_append_params* params);

/* Adds prompt tokens to one layer as vattn_append, with all their queries, and attends: each token
 * exactly to those that the layer had before and to the new ones up to its own (FlashAttention's
 * order of sums, arXiv 2307.08691). A prompt in chunks of any size gets the answers of one in one
 * piece, but for rounding. Blocks until answered. On CUDA rows come from the host pool through device
 * memory, 64 MiB and what sums and arrays of the host need, which the runtime keeps for the next
 * call until codes need it; the arrays may be device memory or the host's, and products are those
 * of tensor cores, with weights rounded to the rows' type. Errors as vattn_append,
 * and nothing was added; NOT_SUPPORTED on CUDA with f32 rows or head dimensions over 256. */
VATTN_EXPORT vattn_code vattn_prefill(vattn_sequence* sequence, const vattn_prefill_params* params);

/* Codes every token that has left the window, fixing the index of layers that have none yet. The
 * first step after an append does the same; call this to choose the moment. */
VATTN_EXPORT vattn_code vattn_sequence_build_index(vattn_sequence* sequence);

/* Writes rows, codes and tables to a file that appears whole or not at all (temporary name,
 * fdatasync, rename, fsync of the directory), with checksums of all of it. An older file is
 * replaced, its mode kept; a link is followed; a path to a device, pipe, socket or directory is
 * INVALID_ARGUMENT. A process that is killed leaves nothing, but on file systems without
 * O_TMPFILE a ".vattn-*.tmp". IO_ERROR leaves the sequence and any older file as they were; if
 * only the last fsync failed, the new file is in place (the text says so). */
VATTN_EXPORT vattn_code vattn_sequence_save(const vattn_sequence* sequence, const char* path);
/* Reads a saved sequence back: attention on it is bit-identical. NOT_FOUND: no such file.
 * DATA_LOSS: truncated, changed, or of another layout; nothing is created.
 * FULL: see vattn_sequence_create. */
VATTN_EXPORT vattn_code vattn_sequence_restore(vattn_runtime* runtime, const char* path,
                                               vattn_sequence** out);
/* The same for a tenant and with a reservation, all or nothing; options.id 0: the saved one.
   options may be NULL. */
VATTN_EXPORT vattn_code vattn_sequence_restore_as(vattn_runtime* runtime, const char* path,
                                                  const vattn_sequence_options* options,
                                                  vattn_sequence** out);
/* Saves, then frees the host blocks; the sequence stays known, and any use of it but
 * vattn_sequence_length wakes it first, from the file that path named then (the current
 * directory may change), and from no other that was put in its place (DATA_LOSS). Refused while
 * it sits in a batch. Errors as save. */
VATTN_EXPORT vattn_code vattn_sequence_hibernate(vattn_sequence* sequence, const char* path);
/* Brings a hibernated sequence back from its file, which is left in place (that of a spilled one
 * is removed). Errors as restore, after which it is still hibernated; a call that would have
 * woken it answers the same. No-op on a sequence that is awake. */
VATTN_EXPORT vattn_code vattn_sequence_wake(vattn_sequence* sequence);

/* ---- Stored prefixes ------------------------------------------------------------------------ */

/* What a stored prefix is found by. Only calls with the same salt find it: let the salt name the
 * model with its weights and position encoding, and the tenant. It is kept with the prefix, also
 * in its file. */
typedef struct vattn_prefix {
  size_t struct_size;    /* bytes of the struct that the caller knows */
  const void* salt;      /* [salt_bytes] bytes */
  uint64_t salt_bytes;   /* 1 to 4096 */
  const int32_t* tokens; /* [num_tokens] ids, from the first token of the sequence on */
  int64_t num_tokens;    /* 1 or more */
  /* vattn_prefix_restore: of the new sequence, as in vattn_sequence_options. */
  int64_t reserve_tokens;
  uint64_t tenant;   /* whose blocks it takes count for */
  int32_t tier;      /* vattn_tier */
  int32_t reserved0; /* 0 */
} vattn_prefix;

/* Fills *prefix with defaults; struct_size is sizeof(*prefix). */
VATTN_EXPORT void vattn_prefix_init(vattn_prefix* prefix, size_t struct_size);

/* Stores the first num_tokens tokens of a sequence, whose ids the caller vouches for. Nothing is
 * done if that prefix is there already. INVALID_ARGUMENT if a layer has fewer tokens, or tier is
 * disk without disk_path. Disk: FULL if disk_bytes has no room; IO_ERROR. Memory: the sequence's
 * blocks are shared, and stay in the host pool when it is gone, counted for its tenant. Fewer
 * than 256 tokens are not stored, nor is a prefix of a stored one, which serves for both. Builds
 * the index first, so that codes are shared too. FULL where vattn_sequence_build_index is, and
 * if the sequence has a reservation without room for copies of what is then shared. When the
 * pool or the tenant's quota is full, prefixes in memory go, the tenant's own first, those
 * unused for longest first, before anything is spilled or FULL; at the quota only those of the
 * tenant's blocks. */
VATTN_EXPORT vattn_code vattn_prefix_save(const vattn_sequence* sequence,
                                          const vattn_prefix* prefix);
/* A new sequence (id as in vattn_sequence_options) that begins with as many of the given tokens
 * as one stored prefix has in common with them, 256 at least: *tokens. Ids are compared, not
 * only their digests. The rows are those that were saved; index and codes are, too. From memory
 * it shares the blocks: nothing is read or copied; the disk is asked where it has at least 256
 * tokens more. To keep the last token for a step, pass one less. NOT_FOUND: no stored prefix
 * serves; one that fails its check or cannot be read is logged, counted and passed over. FULL:
 * see vattn_sequence_create. *out is NULL and *tokens 0 after a failure. */
VATTN_EXPORT vattn_code vattn_prefix_restore(vattn_runtime* runtime, const vattn_prefix* prefix,
                                             uint64_t id, int64_t* tokens, vattn_sequence** out);
/* Removes all prefixes stored under a salt, in memory and on the disk; *prefixes, unless NULL,
 * says how many. IO_ERROR: those removed so far are gone. */
VATTN_EXPORT vattn_code vattn_prefix_forget(vattn_runtime* runtime, const void* salt,
                                            uint64_t salt_bytes, int64_t* prefixes);

/* ---- Tenants -------------------------------------------------------------------------------- */

/* A limit of a tenant's own in place of vattn_options.tenant_bytes: most bytes of the host pool
 * that it may use and reserve, rounded down to whole blocks; 0: tenant_bytes again. Takes no
 * block away: a tenant above its limit is FULL until it is below. The limits of all tenants may
 * add up to more than the pool. INVALID_ARGUMENT if tenant is 0. */
VATTN_EXPORT vattn_code vattn_tenant_limit(vattn_runtime* runtime, uint64_t tenant,
                                           uint64_t host_bytes);

/* What a tenant holds of the host pool. */
typedef struct vattn_tenant_use {
  size_t struct_size;        /* bytes of the struct that the caller knows */
  uint64_t host_bytes_limit; /* 0: none */
  /* In blocks that its sequences took or have reserved; over all tenants, 0 included, the sum is
   * vattn_stats.host_bytes_used. */
  uint64_t host_bytes_used;
  uint64_t host_bytes_reserved; /* of them, reserved and not yet in use */
  uint64_t sequences;           /* alive */
  /* Calls answered FULL, and of them those for its quota, as long as the tenant is known: it has
   * a limit of its own, a sequence, a prefix in memory or a block. */
  uint64_t full_refusals;
  uint64_t quota_refusals; /* of full_refusals: for its quota */
} vattn_tenant_use;

/* What a tenant holds now; a tenant never heard of holds nothing. */
VATTN_EXPORT vattn_code vattn_tenant_stats(const vattn_runtime* runtime, uint64_t tenant,
                                           vattn_tenant_use* use, size_t struct_size);

/* ---- Decode steps --------------------------------------------------------------------------- */

/* A batch with room for `slots` sequences, 1 to 4096. */
VATTN_EXPORT vattn_code vattn_batch_create(vattn_runtime* runtime, int32_t slots,
                                           vattn_batch** out);
/* Takes its sequences out of their slots; they stay. */
VATTN_EXPORT void vattn_batch_destroy(vattn_batch* batch);
/* Puts a sequence into a slot (its former one is taken out). A sequence sits in one slot at
   most. */
VATTN_EXPORT vattn_code vattn_batch_set(vattn_batch* batch, int32_t slot, vattn_sequence* sequence);
/* Takes the sequence out of a slot; an empty one stays so. */
VATTN_EXPORT vattn_code vattn_batch_clear(vattn_batch* batch, int32_t slot);

/* Opens a step: makes room for new_tokens (0 to 16) tokens in every layer of every sequence, which
 * are the step's query tokens (with 0 the last token that is there asks again, or another query in
 * its place). With several, as when a draft model's tokens are checked, each sees the tokens up to
 * its own; vattn_sequence_truncate takes those back that are rejected. NOT_SUPPORTED if the query
 * heads per KV head of all new tokens are more than 1024, or 128 on CUDA. Copies shared tails, codes what has left the window. Every layer must have been attended in
 * the step before, or that step given up (vattn_batch_abandon). FULL, or OUT_OF_MEMORY of the
 * host or the device: nothing changed, no step is open, and the sequences stay usable. On CUDA
 * the step's tables are enqueued on stream; the calls of the step must follow in its order, on
 * it or on streams that wait for it. NULL: a stream of the library, also for calls without one.
 * With another stream than that of the batch's last step, or of the last step of one of its
 * sequences, the call waits for the device first. The new tokens count from here on. A CUDA
 * graph that holds calls of one step answers any later step when it is launched after that
 * step's begin, with the same arrays: lengths, tables and new blocks are read on the device. Launched
 * in a step of another new_tokens it answers nothing: its arrays stay as they were. */
VATTN_EXPORT vattn_code vattn_batch_begin_step(vattn_batch* batch, int32_t new_tokens,
                                               struct CUstream_st* stream);

/* Gives the open step up, as after an error or an interrupt between two layers: whatever its
 * layers did, each sequence has the tokens, random numbers and, on the CPU, the controller state
 * again that it had before vattn_batch_begin_step, so that the same step answers the same when
 * it is begun anew. What stays: an index that the step fixed, codes that it made (both are of
 * tokens from before), the hot set and the counters. On CUDA it waits for the device, the
 * controller state (which decides how many rows are read, not what is promised) is that of the
 * layers attended, and a graph that is launched before the next begin answers nothing. A step is
 * open from its begin until the next one, or until a call changes one of its sequences; all
 * layers may have been attended. No-op without an open step. A step left half attended in any
 * other way (vattn_batch_clear, destroy of the sequence or the batch) is given up for the
 * sequences that leave; append, truncate, build_index, fork, save and vattn_prefix_save of a
 * sequence in the middle of a step, and vattn_batch_set and vattn_batch_begin_step, are
 * INVALID_ARGUMENT. (On CUDA none of that is checked: a replayed graph attends without a call.) */
VATTN_EXPORT vattn_code vattn_batch_abandon(vattn_batch* batch);

/* One layer's call of a step, and where its answers go. */
typedef struct vattn_attend_params {
  size_t struct_size; /* bytes of the struct that the caller knows */
  int32_t layer;      /* 0 to num_layers - 1 */
  int32_t num_tokens; /* query tokens per slot: new_tokens of the step, or 1 if that was 0 */
  int32_t out_dtype;  /* vattn_dtype of out */
  /* Heads of scores: num_q_heads, or the layer's KV heads, whose query heads then share them; 0: KV
   * heads. */
  int32_t score_heads;
  const void* q;     /* [slots, num_tokens, q_heads, head_dim_k] runtime dtype, unscaled */
  const void* k_new; /* [slots, num_tokens, kv_heads, head_dim_k]; NULL iff new_tokens was 0 */
  const void* v_new; /* [slots, num_tokens, kv_heads, head_dim_v]; NULL also with shared_kv */
  /* With VATTN_INDEX_EXTERNAL, which needs it but for policy dense; else NULL. Predicted scores
   * of the tokens, in units of softmax_scale * q.k (their natural logarithm weights a token),
   * [slots, num_tokens, score_heads, scores_stride] in scores_dtype: an engine's own indexer, or a
   * former step's scores. Better ones save rows; any are valid, but NaN and +infinity leave a head
   * unverified, and come first where tokens are ranked. Read for tokens of the middle only. */
  const void* scores;
  /* Elements from one head's scores to the next one's: at least the end of the middle. A graph that
   * is replayed when the middle has outgrown it takes the tokens behind it for NaN. */
  int64_t scores_stride;
  void* out;  /* [slots, num_tokens, q_heads, head_dim_v] in out_dtype */
  float* lse; /* [slots, num_tokens, q_heads] ln(sum exp(s)); may be NULL */
  /* Report, each may be NULL. Rows of empty slots are not written. */
  int32_t* verdict; /* [slots, num_tokens, q_heads] vattn_verdict */
  float* error;     /* [slots, num_tokens, q_heads] bound on the relative error; 0 when exact */
  /* Of all query tokens together, which share one scan and one draw: */
  int32_t* selected; /* [slots, kv_heads] middle rows read */
  int32_t* fetched;  /* [slots, kv_heads] of them not in the hot set */
  int32_t* looks;    /* [slots, kv_heads] draws made */
  int64_t* middle;   /* [slots, kv_heads] tokens in the middle: it ends with the first one's */
  /* [VATTN_TIMELINE_MARKS] nanoseconds of the device's clock when stages ended for the first filled
   * slot's KV head 0, in the order of vattn_timeline; may be NULL. CUDA only, on the CPU nothing is
   * written; stages that a policy does not have are not written either. */
  uint64_t* timeline;
  int32_t scores_dtype; /* vattn_dtype of scores: VATTN_F32, the default, VATTN_F16 or VATTN_BF16 */
  /* 0: the runtime's. VATTN_POLICY_DENSE: every row, in this call alone, as when tokens that a
   * cheaper answer has drafted are checked (examples/speculative.py); no other policy is taken, and
   * vattn_attend_selected does not look at it. */
  int32_t policy;
  /* A slice of a context, "One context over several devices"; NULL: the sequences have all of
   * theirs. */
  float* partial; /* [slots, q_heads, VATTN_PARTIAL_SCALARS + 2 head_dim_v] this rank's records */
  /* [ranks, slots, q_heads, VATTN_PARTIAL_SCALARS + 2 head_dim_v] those of all ranks, in their
   * order, as the calls before left them in partial; for vattn_attend_more alone */
  const float* gathered;
  /* [1] KV heads, over slots, that have yet to be answered: 0 when the answers are there, the same
   * number on every rank; negative if gathered, in device memory, is not of one version and round: the
   * step is to be given up then (vattn_batch_abandon); may be NULL. For
   * vattn_attend_more alone. */
  int32_t* again;
  int32_t rank;  /* with partial: which slice the sequences hold, 0 to ranks - 1 */
  int32_t ranks; /* slices of each context, 1 to 64 */
} vattn_attend_params;

/* Places in vattn_attend_params.timeline: when a stage of the call ended. */
typedef enum vattn_timeline {
  VATTN_TIMELINE_START = 0,
  VATTN_TIMELINE_PREPARED = 1, /* new rows written, queries packed */
  VATTN_TIMELINE_SCANNED = 2,  /* every code of the call */
  VATTN_TIMELINE_PLANNED = 3,  /* multipliers found; top-k policies: the last score that counts */
  VATTN_TIMELINE_DRAWN = 4,    /* the first look's, or the best, rows chosen */
  VATTN_TIMELINE_ATTENDED = 5, /* ... fetched and attended */
  /* ... and certified; topk-uniform: base sample read, budgets known */
  VATTN_TIMELINE_JUDGED = 6,
  VATTN_TIMELINE_DONE = 7, /* further looks or the sample, output */
  VATTN_TIMELINE_MARKS = 8
} vattn_timeline;

/* Fills *params with defaults; struct_size is sizeof(*params). */
VATTN_EXPORT void vattn_attend_params_init(vattn_attend_params* params, size_t struct_size);

/* Writes the new tokens' rows and attends, for every filled slot. Each layer once per step. With
 * partial it writes that alone, and vattn_attend_more follows. On
 * CUDA the arrays are device memory (or pinned host memory), the call enqueues on stream,
 * allocates nothing and waits for nothing, and may be captured into a graph. With q in plain
 * host memory every array is taken to be there; then, and without a stream, the call blocks
 * until they are filled. */
VATTN_EXPORT vattn_code vattn_attend(vattn_batch* batch, const vattn_attend_params* params,
                                     struct CUstream_st* stream);

/* ---- One context over several devices -------------------------------------------------------
 *
 * Each of `ranks` runtimes holds a slice of every context as a sequence of its own, in the order of
 * the tokens: the last rank takes the new tokens of a step, the others begin it with new_tokens 0.
 * All have the same options and are asked the same queries. A step of one layer is
 *
 *   vattn_attend(..., partial)                                       rank's forecast -> partial
 *   do { all-gather partial -> gathered;
 *        vattn_attend_more(..., partial, gathered, again) } while (again > 0);
 *
 * after which out, lse, verdict and error are those of the whole context on every rank, with one joint
 * certificate. All ranks decide the same from the same records, and take the calls together. A
 * record is one query head's; its floats are in vattn_partial. Policies verified and dense,
 * value_bits 0 and one query token a step, else NOT_SUPPORTED. */

/* Places in a record of vattn_attend_params.partial. Sums are over the rank's slice, and "the output"
 * is that of attention over the slice alone, estimated. A term c_i |v_i - output|^2 is what drawn
 * token i adds to the variance of the output, relative to the unit. */
typedef enum vattn_partial {
  VATTN_PARTIAL_IS_VERSION = 0, /* VATTN_PARTIAL_VERSION */
  VATTN_PARTIAL_RANK = 1,       /* whose record it is */
  VATTN_PARTIAL_ROUND = 2,      /* calls of vattn_attend_more so far */
  VATTN_PARTIAL_FLAGS = 3,      /* sum of vattn_partial_flag */
  VATTN_PARTIAL_TOKENS = 4,     /* tokens in the middle */
  VATTN_PARTIAL_COUNT = 5,      /* ... of them read */
  VATTN_PARTIAL_TAIL = 6,       /* ... of those, with a probability below 1 */
  VATTN_PARTIAL_LSE = 7,        /* ln(sum exp(s)), of a forecast as predicted */
  VATTN_PARTIAL_NORM2 = 8,      /* mean |v|^2, weighted by attention */
  VATTN_PARTIAL_MIDDLE = 9,     /* forecast: share of exp(lse) that is the middle's */
  VATTN_PARTIAL_LIGHT = 10,     /* ... without the largest token of each block of 256 */
  VATTN_PARTIAL_LOG_UNIT = 11,  /* natural logarithm of the unit of the sums below */
  VATTN_PARTIAL_VARIANCE = 12,  /* sum of the terms */
  VATTN_PARTIAL_SQUARES = 13,   /* sum of their squares */
  VATTN_PARTIAL_OWN = 14,       /* ... times the probability of each */
  VATTN_PARTIAL_MASS = 15,      /* share of exp(lse) that the tail stands for */
  VATTN_PARTIAL_SPREAD = 16,    /* ... times |v - output|^2 */
  VATTN_PARTIAL_WEIGHT = 17,    /* sum of c_i */
  VATTN_PARTIAL_COS2 = 18,      /* mean squared cosine of two residuals, -1: there are no two */
  VATTN_PARTIAL_PREDICTED = 19, /* variance that was planned */
  VATTN_PARTIAL_MEMORY = 20,    /* mean squared cosine of the steps before, -1: none */
  VATTN_PARTIAL_LOOK = 21,      /* looks taken, 0: a forecast */
  /* [12] sum of the terms once all probabilities grow, in even ratios, by 1.05 to 64 */
  VATTN_PARTIAL_GROWTH = 24,
  /* from here on: the output [head_dim_v], sum of c_i (v_i - output) [head_dim_v] */
  VATTN_PARTIAL_SCALARS = 40
} vattn_partial;
#define VATTN_PARTIAL_VERSION 1 /* of the records: goes up when a place gets another meaning */

/* VATTN_PARTIAL_FLAGS is a sum of these. */
typedef enum vattn_partial_flag {
  VATTN_PARTIAL_WHOLE = 1,   /* the slice was read whole: its part is exact */
  VATTN_PARTIAL_NOTHING = 2, /* ... by policy, or because it is too short for a middle */
  VATTN_PARTIAL_STUCK = 4,   /* the rank cannot draw more */
  VATTN_PARTIAL_UNSURE = 8   /* nothing can be verified with this slice */
} vattn_partial_flag;

/* Goes on with the layer that vattn_attend, with partial, was the last call for: takes a look at more
 * rows, and when every head has passed, or has been read whole, writes the answers. Of params layer,
 * num_tokens, out_dtype, partial, gathered, again, rank, ranks, out and the report are used. partial is
 * that of the call before, of which records that do not change stay; it must not lie in gathered. INVALID_ARGUMENT if the records of a rank are missing,
 * of another version or another round: nothing changed. A rank that is lost ends the step of the
 * others: vattn_batch_abandon. */
VATTN_EXPORT vattn_code vattn_attend_more(vattn_batch* batch, const vattn_attend_params* params,
                                          struct CUstream_st* stream);

/* What the records of all ranks say together. */
typedef struct vattn_merge_params {
  size_t struct_size; /* bytes of the struct that the caller knows */
  int64_t heads;      /* records of each rank, at least 1 */
  /* [ranks, heads, VATTN_PARTIAL_SCALARS + 2 head_dim_v], as gathered */
  const float* records;
  void* out;         /* [heads, head_dim_v] in out_dtype */
  float* lse;        /* [heads] ln(sum exp(s)); may be NULL, as the next three */
  int32_t* verdict;  /* [heads] vattn_verdict; BEST_EFFORT also where another look can follow */
  float* error;      /* [heads] bound on the relative error; 0 when exact */
  int32_t* again;    /* [1] heads that are BEST_EFFORT or forecasts; negative: records do not fit */
  int32_t ranks;     /* 1 to 64 */
  int32_t out_dtype; /* vattn_dtype of out */
} vattn_merge_params;

/* Fills *params with defaults; struct_size is sizeof(*params). */
VATTN_EXPORT void vattn_merge_params_init(vattn_merge_params* params, size_t struct_size);

/* Merges records by the options of `runtime`: output, lse, verdict and error as vattn_attend_more
 * would judge them, for who exchanges records in another way. Changes nothing. On CUDA as
 * vattn_attend: arrays of the device, or all of the host; with a stream it enqueues. */
VATTN_EXPORT vattn_code vattn_merge(const vattn_runtime* runtime, const vattn_merge_params* params,
                                    struct CUstream_st* stream);

/* ---- Other ways to attend ------------------------------------------------------------------- */

/* As vattn_attend, over the caller's tokens in place of ours: DSA-like indexers, MLA top-k. */
typedef struct vattn_selection {
  size_t struct_size; /* bytes of the struct that the caller knows */
  int64_t capacity;   /* entries per (slot, KV head) in the arrays below */
  int32_t* tokens;    /* [slots, kv_heads, capacity] ascending token numbers */
  /* [slots, kv_heads, capacity] added to the logits: -ln pi; may be NULL */
  float* log_weights;
  int32_t* counts; /* [slots, kv_heads] entries in use */
} vattn_selection;

/* Fills *selection with defaults; struct_size is sizeof(*selection). */
VATTN_EXPORT void vattn_selection_init(vattn_selection* selection, size_t struct_size);

/* Attends exactly the listed tokens (sinks and window included only if listed); with several query
 * tokens each leaves out what comes after it. Tokens that are out of range or do not ascend are
 * INVALID_ARGUMENT, and nothing is written. Verdict is BEST_EFFORT. */
VATTN_EXPORT vattn_code vattn_attend_selected(vattn_batch* batch, const vattn_attend_params* params,
                                              const vattn_selection* selection,
                                              struct CUstream_st* stream);
/* For engines with their own attention kernel: fills selection with sinks, window and the first
 * look's draw, log-weights included; with several query tokens up to the last one's window, and the
 * caller's kernel hides from each what comes after it. Reads no row of the middle but for VATTN_INDEX_EXACT. Of
 * params layer, num_tokens, q, k_new, v_new, selected and middle are used. FULL if capacity is
 * too small: counts then hold the need. */
VATTN_EXPORT vattn_code vattn_select(vattn_batch* batch, const vattn_attend_params* params,
                                     vattn_selection* selection, struct CUstream_st* stream);

/* ---- An engine's paged KV ------------------------------------------------------------------- */

/* Attention over rows in a pool of blocks that the caller allocated in host memory and fills by its
 * own rules, as inference engines do: block tables, lengths and slot mappings are the caller's arrays,
 * blocks may be shared by requests and used again for others at any time. A slot is a token's place in
 * the pool: block id * block_tokens + the number of tokens before it in the block.
 *
 * Codes belong to slots. They are made by vattn_paged_write when a row is written, by tables that were
 * learnt from a text of the same model before (vattn_tables_save), so that they depend on nothing but
 * the row: blocks may be shared by prefixes of requests. A slot that is written again is coded again,
 * and leaves the hot set.
 *
 * On CUDA the arrays of vattn_paged_write, vattn_paged_begin_step and vattn_paged_attend are read on the
 * device when their turn comes, from device or pinned host memory. The calls then allocate nothing, wait
 * for nothing, and may be captured into a CUDA graph, which serves other requests when the arrays have
 * other contents. Arrays in plain host memory travel with the call, which takes memory for them and
 * blocks until it is done. A request whose length, starts, row or block ids are
 * out of range reads nothing: its outputs, lse and error are NaN, its verdicts BEST_EFFORT, and
 * vattn_stats.requests_refused counts it. On the CPU such a step is INVALID_ARGUMENT. */
typedef struct vattn_paged vattn_paged;

/* Learns tables from the rows and queries of a sequence (which are those of a text, the longer the
 * better; pass its queries with vattn_append) and writes them to a file, which appears whole or not at
 * all. model: what the caller calls the model, say a fingerprint of its weights and position encoding;
 * vattn_paged_create compares it; may be NULL. INVALID_ARGUMENT if a layer has fewer than 1024 tokens
 * in its middle; NOT_SUPPORTED for an index that has no tables; IO_ERROR. */
VATTN_EXPORT vattn_code vattn_tables_save(const vattn_sequence* sequence, const char* path,
                                          const char* model);

/* A pool, and what is set aside for the steps over it. */
typedef struct vattn_paged_options {
  size_t struct_size; /* bytes of the struct that the caller knows */
  /* File of vattn_tables_save for a model of this shape, softmax_scale and index; with first_kv_head
   * that of all of the model's heads. NULL with an index
   * external or policy dense, which need none. */
  const char* tables;
  const char* model; /* INVALID_ARGUMENT if the file was saved for another one; NULL: any */
  /* [num_layers] host memory: where block 0, slot 0, KV head 0 of each layer has its K, and its V.
   * NULL entries for layers without KV heads; v NULL with shared_kv. Rows are in the runtime's dtype,
   * a head dimension is contiguous. K and V may lie in one array or in two. */
  void* const* k;
  void* const* v;       /* as k */
  int64_t num_blocks;   /* 1 or more, of block_tokens tokens each */
  int64_t block_stride; /* elements from a block to the next one, for K and V alike; ... */
  int64_t token_stride; /* ... from a token to the next one */
  int64_t head_stride;  /* ... from a KV head to the next one. On CUDA multiples of 16 bytes. */
  /* [num_layers] memory for codes, on CUDA of the device; NULL: the library takes it. Per block
   * code_block_stride bytes, of which kv_heads * block_tokens * index_bytes are used; contents need
   * not be set. */
  void* const* codes;
  int64_t code_block_stride; /* bytes; 0: those used */
  int64_t max_tokens;        /* most tokens of a request, 1 to 2^31 - 1 */
  /* Most tokens of all requests of a step together, for which working memory is taken; 0: max_requests
   * times max_tokens. A step with more of them: as lengths that are out of range. */
  int64_t max_step_tokens;
  uint64_t hot_bytes;       /* device memory for rows that are kept there; 0: none. CUDA only */
  int32_t block_tokens;     /* tokens of a block, a multiple of 16 */
  int32_t max_requests;     /* of a step, and rows of controller state; 1 to 4096 */
  int32_t max_query_tokens; /* of a request in a step, 1 to 16 */
  /* CUDA: 1 if the pool is page-locked and mapped already; 0: that is done here, until
   * vattn_paged_destroy, and no two pools may share a page. */
  int32_t pinned;
} vattn_paged_options;

/* Fills *options with defaults; struct_size is sizeof(*options). */
VATTN_EXPORT void vattn_paged_options_init(vattn_paged_options* options, size_t struct_size);

/* The pool and the arrays in options must outlive it; options and their lists need not. Errors name
 * the option. NOT_FOUND, IO_ERROR, DATA_LOSS: the file of tables. OUT_OF_MEMORY. NOT_SUPPORTED: value
 * codes, and an index other than balanced and external. */
VATTN_EXPORT vattn_code vattn_paged_create(vattn_runtime* runtime,
                                           const vattn_paged_options* options, vattn_paged** out);
/* On CUDA it waits for the device; captured calls must not be replayed any more. */
VATTN_EXPORT void vattn_paged_destroy(vattn_paged* paged);

/* Rows that are written, or were. */
typedef struct vattn_paged_rows {
  size_t struct_size; /* bytes of the struct that the caller knows */
  int32_t layer;      /* 0 to num_layers - 1 */
  int32_t reserved0;  /* 0 */
  int64_t num_tokens; /* 0 or more */
  /* [num_tokens] slot of each; others than those of the pool, as -1 for padding, are left out. No slot
   * twice in a call. */
  const int64_t* slots;
  const void* k;          /* [num_tokens, kv_heads, head_dim_k]; NULL: the rows are in the pool */
  const void* v;          /* [num_tokens, kv_heads, head_dim_v]; NULL with k NULL or shared_kv */
  int64_t k_token_stride; /* elements from a token of k to the next; 0: contiguous */
  int64_t k_head_stride;  /* from a head of k to the next */
  int64_t v_token_stride; /* from a token of v to the next */
  int64_t v_head_stride;  /* from a head of v to the next */
} vattn_paged_rows;

/* Fills *rows with defaults; struct_size is sizeof(*rows). */
VATTN_EXPORT void vattn_paged_rows_init(vattn_paged_rows* rows, size_t struct_size);

/* Writes rows to their slots, codes them, and takes the slots out of the hot set: before the attention
 * that is to see them, and after any write to the pool by others (k NULL). */
VATTN_EXPORT vattn_code vattn_paged_write(vattn_paged* paged, const vattn_paged_rows* rows,
                                          struct CUstream_st* stream);

/* What a step attends for. */
typedef struct vattn_paged_step {
  size_t struct_size;   /* bytes of the struct that the caller knows */
  int32_t num_requests; /* 0 to max_requests: rows of the arrays below */
  int32_t
      max_query_tokens; /* most query tokens of a request in this step, 1 to that of the options */
  /* Query tokens that q, out and the other arrays of the calls have room for: starts beyond are out of
   * range. In a CUDA graph the padded number. */
  int64_t num_query_tokens;
  /* [num_requests, block_table_stride] block ids of each request; those behind its length are not
   * looked at. */
  const int32_t* block_table;
  int64_t block_table_stride; /* entries from a request to the next; at least
                               * ceil(max_tokens / block_tokens) */
  const int32_t* lengths;     /* [num_requests] tokens, the new ones included; 0: no request here */
  /* [num_requests + 1] where each one's query tokens begin among those of the step, ascending from 0;
   * they are its last tokens. A request without query tokens, or with length 0, is passed over: what
   * the other arrays have of it is not looked at. */
  const int32_t* query_starts;
  /* [num_requests] each another number of 0 to max_requests - 1, the same in all steps of a request:
   * where its controller state is kept. */
  const int32_t* request_rows;
  /* [num_requests] 1 in a request's first step in its row, also when it comes back to another row, else
   * 0; NULL: all 0. */
  const int32_t* resets;
} vattn_paged_step;

/* Fills *step with defaults; struct_size is sizeof(*step). */
VATTN_EXPORT void vattn_paged_step_init(vattn_paged_step* step, size_t struct_size);

/* Opens a step, whose layers vattn_paged_attend then answers. The arrays must keep their contents until
 * the last of them has. A step may be opened before the one before has attended every layer. */
VATTN_EXPORT vattn_code vattn_paged_begin_step(vattn_paged* paged, const vattn_paged_step* step,
                                               struct CUstream_st* stream);
/* Attends in a layer for all requests of the open step, whose rows have been written. Of params, k_new
 * and v_new are NULL and num_tokens is the step's max_query_tokens. Where vattn_attend_params says
 * [slots, num_tokens, ...], arrays are [query tokens of the step, ...], and where it says [slots, ...],
 * [num_requests, ...]; rows of requests that were passed over are not written. Query tokens of one
 * request share scan and draw; on CUDA a request with fewer of them than max_query_tokens costs as much
 * as one with all. */
VATTN_EXPORT vattn_code vattn_paged_attend(vattn_paged* paged, const vattn_attend_params* params,
                                           struct CUstream_st* stream);

/* Many query tokens of one request in one layer. */
typedef struct vattn_paged_prefill_params {
  size_t struct_size;     /* bytes of the struct that the caller knows */
  int32_t layer;          /* 0 to num_layers - 1 */
  int32_t out_dtype;      /* vattn_dtype of out */
  int64_t num_tokens;     /* 1 to 65536: the request's last tokens, which are the queries */
  int64_t length;         /* tokens of the request, with these; num_tokens to max_tokens */
  const int32_t* blocks;  /* [ceil(length / block_tokens)] block ids */
  const void* q;          /* [num_tokens, q_heads, head_dim_k], unscaled */
  int64_t q_token_stride; /* elements from a token of q to the next; 0: contiguous */
  int64_t q_head_stride;  /* from a head of q to the next */
  void* out;              /* [num_tokens, q_heads, head_dim_v] in out_dtype */
  float* lse;             /* [num_tokens, q_heads] ln(sum exp(s)); may be NULL */
} vattn_paged_prefill_params;

/* Fills *params with defaults; struct_size is sizeof(*params). */
VATTN_EXPORT void vattn_paged_prefill_params_init(vattn_paged_prefill_params* params,
                                                  size_t struct_size);

/* Exact attention of a chunk of a prompt, each token to those up to its own, over rows that
 * vattn_paged_write has written. Blocks until answered; needs no open step. On CUDA what wrote the rows
 * must have ended, and arrays may be device memory or the host's. NOT_SUPPORTED as vattn_prefill. */
VATTN_EXPORT vattn_code vattn_paged_prefill(vattn_paged* paged,
                                            const vattn_paged_prefill_params* params);

/* ---- Counters ------------------------------------------------------------------------------- */

typedef struct vattn_stats {
  size_t struct_size; /* bytes of the struct that the caller knows */

  /* Host memory. */
  uint64_t host_bytes_limit;    /* host pool */
  uint64_t host_bytes_used;     /* in blocks that a sequence holds or has reserved */
  uint64_t host_bytes_reserved; /* of them: reserved and not yet in use */
  uint64_t table_bytes;         /* block tables, index tables, controller state */
  uint64_t full_refusals;       /* calls answered VATTN_FULL for want of host memory */
  uint64_t quota_refusals;      /* of them: for a tenant's quota */
  uint64_t blocks_copied;       /* shared blocks copied on write */

  /* On CUDA, of what grows with the tokens held: addresses set aside for codes and hot set tables
   * of the whole host pool, device memory taken for them so far, how often more was taken, and how
   * long that took. */
  uint64_t device_bytes_reserved;
  uint64_t device_bytes_mapped; /* device memory taken for them so far */
  uint64_t device_growths;      /* how often more was taken */
  uint64_t device_growth_ns;    /* how long that took */

  /* Steps. */
  uint64_t sequences;         /* alive */
  uint64_t tokens;            /* held, over sequences and layers */
  uint64_t steps;             /* vattn_attend calls x filled slots */
  uint64_t heads_exact;       /* query heads by verdict */
  uint64_t heads_verified;    /* verdict VERIFIED */
  uint64_t heads_dense;       /* verdict DENSE */
  uint64_t heads_best_effort; /* verdict BEST_EFFORT */
  uint64_t heads_noisy;   /* of heads_dense and heads_best_effort: codes too coarse for the query */
  uint64_t rows_middle;   /* rows that dense attention would have read from the middle */
  uint64_t rows_selected; /* rows read */
  uint64_t rows_fetched;  /* of them: not in the hot set */
  uint64_t bytes_fetched; /* bytes of rows_fetched */
  uint64_t looks;         /* draws, over KV heads */

  /* Index. */
  uint64_t segments_learnt;  /* parts of indices learnt from their tokens, over layers */
  uint64_t index_floods;     /* of them: early, because new tokens were unlike those before */
  uint64_t segments_recoded; /* parts whose tokens were coded again by new tables */
  /* parts that were due where an index had too many, over layers: each time that tokens were coded
   * by the tables of the part before theirs instead, which makes more outliers and dense heads */
  uint64_t segments_refused;
  /* tokens coded as outliers, each time that they are coded: they are read in every step */
  uint64_t outliers;

  /* Files. */
  uint64_t disk_bytes_used; /* files in disk_path, written or promised */
  uint64_t saves;           /* sequence files written: saved, hibernated, spilled, prefixes */
  uint64_t bytes_saved;     /* written to them */
  uint64_t restores;        /* sequences read from such files */
  uint64_t bytes_restored;  /* in their blocks */
  uint64_t spills;          /* sequences moved to the disk for room */
  uint64_t spill_failures;  /* sequences that could not be moved */
  uint64_t files_refused;   /* files to restore that failed their check */
  uint64_t io_errors;       /* file operations that the system refused */

  /* Stored prefixes: calls of vattn_prefix_restore, then the tier memory, then the tier disk. */
  uint64_t prefix_hits;             /* calls that found one */
  uint64_t prefix_tokens;           /* tokens that those began with */
  uint64_t prefix_misses;           /* calls answered NOT_FOUND */
  uint64_t prefix_mismatches;       /* digests that led to other tokens, in either tier */
  uint64_t memory_prefixes;         /* in the host pool now */
  uint64_t memory_prefix_hits;      /* of prefix_hits: from the host pool */
  uint64_t memory_prefixes_saved;   /* put into the host pool */
  uint64_t memory_prefixes_evicted; /* let go for room */
  uint64_t disk_prefixes_saved;     /* written to disk_path */
  uint64_t disk_prefixes_evicted;   /* removed for room */
  uint64_t disk_prefixes_damaged;   /* failed their check and were removed */
  uint64_t disk_prefixes_unread;    /* could not be read by the system when wanted */

  /* vattn_paged: requests of a step on CUDA whose arrays were out of range. */
  uint64_t requests_refused;
} vattn_stats;

/* The counters since the runtime was made, and what is held now. */
VATTN_EXPORT vattn_code vattn_runtime_stats(const vattn_runtime* runtime, vattn_stats* stats,
                                            size_t struct_size);
/* The same as Prometheus text, and vattn_tenant_stats of each tenant that is known; buffer, size
   and needed as in vattn_doctor. */
VATTN_EXPORT vattn_code vattn_stats_prometheus(const vattn_runtime* runtime, char* buffer,
                                               size_t size, size_t* needed);

#ifdef __cplusplus
}
#endif

#endif /* VATTN_H_ */
