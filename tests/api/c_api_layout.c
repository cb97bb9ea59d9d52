/* The bytes of the public structs: sizes and places that compiled callers rely on. */
#include <stddef.h>

/* No implicit padding. */
#pragma GCC diagnostic push
#pragma GCC diagnostic error "-Wpadded"
#include "api/vattn.h"
#pragma GCC diagnostic pop

#include "tests/api/c_api_check.h"

#define STATIC_ASSERT(name, condition) typedef char name[(condition) ? 1 : -1]
/* The last field of each struct ends the struct, at this offset, on machines of 64 bits. A new
   field moves the end: then the new one is listed here beside the old one, whose place stays. */
#define STATIC_ASSERT_PLACE(type, field, offset) \
  STATIC_ASSERT(type##_##field##_place, sizeof(void*) != 8 || offsetof(type, field) == offset)
#define STATIC_ASSERT_LAST(type, field, offset) \
  STATIC_ASSERT_PLACE(type, field, offset);     \
  STATIC_ASSERT(type##_##field##_end,           \
                offsetof(type, field) + sizeof(((type*)0)->field) == sizeof(type))

STATIC_ASSERT_PLACE(vattn_options, backend, 48);
STATIC_ASSERT_PLACE(vattn_options, host_bytes, 64);
STATIC_ASSERT_PLACE(vattn_options, sinks, 96);
STATIC_ASSERT_PLACE(vattn_options, sign_maps, 120);
STATIC_ASSERT_PLACE(vattn_options, policy, 136);
STATIC_ASSERT_PLACE(vattn_options, seed, 168);
STATIC_ASSERT_PLACE(vattn_options, hot_share, 204);
STATIC_ASSERT_PLACE(vattn_options, disk_path, 208);
STATIC_ASSERT_PLACE(vattn_options, log_user, 256);
STATIC_ASSERT_LAST(vattn_options, first_kv_head, 264);
STATIC_ASSERT_PLACE(vattn_prefix, num_tokens, 32);
STATIC_ASSERT_LAST(vattn_prefix, reserved0, 60);
STATIC_ASSERT_PLACE(vattn_sequence_options, reserve_tokens, 16);
STATIC_ASSERT_LAST(vattn_sequence_options, tenant, 24);
STATIC_ASSERT_LAST(vattn_append_params, q_head_stride, 88);
STATIC_ASSERT_PLACE(vattn_prefill_params, q_token_stride, 48);
STATIC_ASSERT_LAST(vattn_prefill_params, lse, 104);
STATIC_ASSERT_PLACE(vattn_attend_params, score_heads, 20);
STATIC_ASSERT_PLACE(vattn_attend_params, scores, 48);
STATIC_ASSERT_PLACE(vattn_attend_params, timeline, 128);
STATIC_ASSERT_PLACE(vattn_attend_params, policy, 140);
STATIC_ASSERT_PLACE(vattn_attend_params, partial, 144);
STATIC_ASSERT_LAST(vattn_attend_params, ranks, 172);
STATIC_ASSERT_PLACE(vattn_merge_params, records, 16);
STATIC_ASSERT_LAST(vattn_merge_params, out_dtype, 68);
STATIC_ASSERT_LAST(vattn_selection, counts, 32);
STATIC_ASSERT_PLACE(vattn_paged_options, num_blocks, 40);
STATIC_ASSERT_PLACE(vattn_paged_options, max_tokens, 88);
STATIC_ASSERT_LAST(vattn_paged_options, pinned, 124);
STATIC_ASSERT_PLACE(vattn_paged_rows, slots, 24);
STATIC_ASSERT_LAST(vattn_paged_rows, v_head_stride, 72);
STATIC_ASSERT_PLACE(vattn_paged_step, num_query_tokens, 16);
STATIC_ASSERT_LAST(vattn_paged_step, resets, 64);
STATIC_ASSERT_PLACE(vattn_paged_prefill_params, blocks, 32);
STATIC_ASSERT_LAST(vattn_paged_prefill_params, lse, 72);
STATIC_ASSERT_PLACE(vattn_stats, blocks_copied, 56);
STATIC_ASSERT_PLACE(vattn_stats, device_growth_ns, 88);
STATIC_ASSERT_PLACE(vattn_stats, looks, 192);
STATIC_ASSERT_PLACE(vattn_stats, outliers, 232);
STATIC_ASSERT_PLACE(vattn_stats, io_errors, 304);
STATIC_ASSERT_PLACE(vattn_stats, disk_prefixes_unread, 400);
STATIC_ASSERT_LAST(vattn_stats, requests_refused, 408);
STATIC_ASSERT_LAST(vattn_tenant_use, quota_refusals, 48);

STATIC_ASSERT(prefix_start, offsetof(vattn_prefix, struct_size) == 0);
STATIC_ASSERT(options_start, offsetof(vattn_options, struct_size) == 0);
STATIC_ASSERT(sequence_options_start, offsetof(vattn_sequence_options, struct_size) == 0);
STATIC_ASSERT(append_params_start, offsetof(vattn_append_params, struct_size) == 0);
STATIC_ASSERT(prefill_params_start, offsetof(vattn_prefill_params, struct_size) == 0);
STATIC_ASSERT(attend_params_start, offsetof(vattn_attend_params, struct_size) == 0);
STATIC_ASSERT(merge_params_start, offsetof(vattn_merge_params, struct_size) == 0);
STATIC_ASSERT(selection_start, offsetof(vattn_selection, struct_size) == 0);
STATIC_ASSERT(paged_options_start, offsetof(vattn_paged_options, struct_size) == 0);
STATIC_ASSERT(paged_rows_start, offsetof(vattn_paged_rows, struct_size) == 0);
STATIC_ASSERT(paged_step_start, offsetof(vattn_paged_step, struct_size) == 0);
STATIC_ASSERT(paged_prefill_params_start, offsetof(vattn_paged_prefill_params, struct_size) == 0);
STATIC_ASSERT(stats_start, offsetof(vattn_stats, struct_size) == 0);
STATIC_ASSERT(tenant_use_start, offsetof(vattn_tenant_use, struct_size) == 0);

/* Numbers of enumerators never change. */
STATIC_ASSERT(last_code, VATTN_NOT_FOUND == 10);
STATIC_ASSERT(last_dtype, VATTN_BF16 == 2);
STATIC_ASSERT(last_backend, VATTN_BACKEND_CUDA == 2);
STATIC_ASSERT(last_policy, VATTN_POLICY_DENSE == 3);
STATIC_ASSERT(last_index, VATTN_INDEX_EXTERNAL == 7);
STATIC_ASSERT(last_norm, VATTN_NORM_OUTPUT == 1);
STATIC_ASSERT(last_on_unverified, VATTN_ON_UNVERIFIED_BEST_EFFORT == 1);
STATIC_ASSERT(last_bound, VATTN_BOUND_SAFE == 1);
STATIC_ASSERT(last_io, VATTN_IO_PREAD == 2);
STATIC_ASSERT(last_admission, VATTN_ADMISSION_RESERVED == 1);
STATIC_ASSERT(last_tier, VATTN_TIER_DISK == 2);
STATIC_ASSERT(last_target, VATTN_TARGET_DENOMINATOR == 2);
STATIC_ASSERT(last_verdict, VATTN_VERDICT_BEST_EFFORT == 3);
STATIC_ASSERT(partial_scalars, VATTN_PARTIAL_SCALARS == 40);
STATIC_ASSERT(last_partial_flag, VATTN_PARTIAL_UNSURE == 8);
STATIC_ASSERT(last_log_level, VATTN_LOG_DEBUG == 3);

/* _init writes no byte past the size it is given, and fills those of a caller newer than us with 0.
 */
#define CHECK_INIT(type, init)                                               \
  do {                                                                       \
    union {                                                                  \
      type value;                                                            \
      unsigned char bytes[sizeof(type) + 24];                                \
    } at;                                                                    \
    for (size_t size = 8; size <= sizeof(type) + 16; size += 8) {            \
      for (size_t i = 0; i < sizeof(at); ++i) at.bytes[i] = 0xa5;            \
      init(&at.value, size);                                                 \
      CHECK(at.value.struct_size == size);                                   \
      for (size_t i = size; i < sizeof(at); ++i) CHECK(at.bytes[i] == 0xa5); \
      for (size_t i = sizeof(type); i < size; ++i) CHECK(at.bytes[i] == 0);  \
    }                                                                        \
    init(NULL, sizeof(type));                                                \
  } while (0)

void TestLayout(void) {
  CHECK_INIT(vattn_options, vattn_options_init);
  CHECK_INIT(vattn_sequence_options, vattn_sequence_options_init);
  CHECK_INIT(vattn_append_params, vattn_append_params_init);
  CHECK_INIT(vattn_prefill_params, vattn_prefill_params_init);
  CHECK_INIT(vattn_attend_params, vattn_attend_params_init);
  CHECK_INIT(vattn_merge_params, vattn_merge_params_init);
  CHECK_INIT(vattn_selection, vattn_selection_init);
  CHECK_INIT(vattn_prefix, vattn_prefix_init);
  CHECK_INIT(vattn_paged_options, vattn_paged_options_init);
  CHECK_INIT(vattn_paged_rows, vattn_paged_rows_init);
  CHECK_INIT(vattn_paged_step, vattn_paged_step_init);
  CHECK_INIT(vattn_paged_prefill_params, vattn_paged_prefill_params_init);
}
