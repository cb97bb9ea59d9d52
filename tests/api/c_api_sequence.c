/* Sequences and their files with bad arguments. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/api/c_api_check.h"

#define CHECK_APPEND(field, value_, text)                 \
  do {                                                    \
    vattn_append_params params = MakeAppend(0, kPrompt);  \
    params.field = (value_);                              \
    CHECK_INVALID(vattn_append(sequence, &params), text); \
  } while (0)

static void TestCreate(vattn_runtime* runtime) {
  vattn_sequence_options options;
  vattn_sequence* sequence = (vattn_sequence*)&options;
  vattn_sequence_options_init(&options, sizeof(options));
  CHECK_INVALID(vattn_sequence_create(NULL, &options, &sequence), "runtime is NULL, must be given");
  CHECK(sequence == NULL);
  CHECK_INVALID(vattn_sequence_create(runtime, &options, NULL), "out is NULL, must be given");
  options.reserve_tokens = -1;
  sequence = (vattn_sequence*)&options;
  CHECK_INVALID(vattn_sequence_create(runtime, &options, &sequence),
                "reserve_tokens is -1, must be 0 to 2147483648");
  CHECK(sequence == NULL);
  options.reserve_tokens = (int64_t)1 << 40;
  CHECK_INVALID(vattn_sequence_create(runtime, &options, &sequence),
                "reserve_tokens is 1099511627776, must be 0 to");
  options.reserve_tokens = 1 << 20;
  sequence = (vattn_sequence*)&options;
  CHECK_ERROR(vattn_sequence_create(runtime, &options, &sequence), VATTN_FULL, "raise host_bytes");
  CHECK(strstr(vattn_last_error(), "need 16384 blocks") != NULL); /* 4096 a KV head and layer */
  CHECK(strstr(vattn_last_error(), "limit ") != NULL);
  CHECK(sequence == NULL);
  sequence = (vattn_sequence*)&options;
  CHECK_INVALID(vattn_sequence_restore_as(runtime, NULL, &options, &sequence), "path is NULL");
  CHECK(sequence == NULL);
  CHECK_INVALID(vattn_sequence_restore_as(runtime, "x", &options, NULL), "out is NULL");
  CHECK_INVALID(vattn_sequence_restore_as(NULL, "x", &options, &sequence), "runtime is NULL");
  options.reserve_tokens = -2;
  CHECK_INVALID(vattn_sequence_restore_as(runtime, "x", &options, &sequence),
                "reserve_tokens is -2, must be 0 to 2147483648");
  options.struct_size = 0;
  CHECK_INVALID(vattn_sequence_create(runtime, &options, &sequence),
                "options.struct_size is 0, must be 8 to 4096");
  vattn_sequence_destroy(NULL);
}

static void TestAppend(vattn_sequence* sequence) {
  vattn_append_params good = MakeAppend(0, 1);
  CHECK_INVALID(vattn_append(NULL, &good), "sequence is NULL, must be given");
  CHECK_INVALID(vattn_append(sequence, NULL), "params is NULL, must be given");
  CHECK_APPEND(struct_size, 0, "params.struct_size is 0, must be 8 to 4096");
  CHECK_APPEND(layer, -1, "layer is -1, must be 0 to 2");
  CHECK_APPEND(layer, kLayers, "layer is 3, must be 0 to 2");
  CHECK_APPEND(layer, kLeftOut, "layer is 2, which layer_kv_heads leaves out");
  CHECK_APPEND(num_tokens, 0, "num_tokens is 0, must be 1 to");
  CHECK_APPEND(num_tokens, -5, "num_tokens is -5, must be 1 to");
  CHECK_APPEND(num_tokens, INT64_MAX, "num_tokens is 9223372036854775807, must be 1 to 2147483608");
  CHECK_APPEND(num_queries, -1, "num_queries is -1, must be 0 to 40");
  CHECK_APPEND(num_queries, kPrompt + 1, "num_queries is 41, must be 0 to 40");
  CHECK_APPEND(num_queries, 1, "q is NULL, must be given");
  CHECK_APPEND(k, NULL, "k is NULL, must be given");
  CHECK_APPEND(v, NULL, "v is NULL, must be given with shared_kv = 0");
  CHECK_APPEND(
      k_token_stride, -1,
      "k_token_stride is -1, must be 0 (contiguous), 1 to 1099511627776, or VATTN_STRIDE_ZERO");
  CHECK_APPEND(k_head_stride, -1, "k_head_stride is -1, must be 0 (contiguous)");
  CHECK_APPEND(v_token_stride, -1, "v_token_stride is -1, must be 0 (contiguous)");
  CHECK_APPEND(v_head_stride, -1, "v_head_stride is -1, must be 0 (contiguous)");
  CHECK_APPEND(q_token_stride, -1, "q_token_stride is -1, must be 0 (contiguous)");
  /* Far places would wrap where they are computed. */
  CHECK_APPEND(k_token_stride, INT64_C(1) << 40, "k_token_stride is 1099511627776 with ");
  CHECK_APPEND(q_token_stride, (INT64_C(1) << 40) + 1,
               "q_token_stride is 1099511627777, must be 0 to");
  CHECK_APPEND(q_head_stride, INT64_MAX, "q_head_stride is 9223372036854775807, must be 0 to");
  int64_t tokens = 0;
  CHECK_OK(vattn_sequence_length(sequence, 0, &tokens));
  CHECK(tokens == kPrompt);
}

static void TestSharedAppend(void) {
  vattn_options options = MakeOptions();
  vattn_runtime* runtime = NULL;
  vattn_sequence* sequence = NULL;
  options.shared_kv = 1;
  options.head_dim_v = kDim + 16;
  CHECK_INVALID(vattn_runtime_create(&options, &runtime),
                "head_dim_v is 32, must be at most head_dim_k = 16");
  options.head_dim_v = kDim;
  CHECK_OK(vattn_runtime_create(&options, &runtime));
  CHECK_OK(vattn_sequence_create(runtime, NULL, &sequence));
  CHECK_APPEND(v, rows, "v is given, must be NULL with shared_kv = 1");
  vattn_sequence_destroy(sequence);
  vattn_runtime_destroy(runtime);
}

static void TestCalls(vattn_sequence* sequence) {
  int64_t tokens = -7;
  vattn_sequence* fork = sequence;
  CHECK_INVALID(vattn_sequence_fork(NULL, 0, &fork), "sequence is NULL, must be given");
  CHECK(fork == NULL);
  CHECK_INVALID(vattn_sequence_fork(sequence, 0, NULL), "out is NULL, must be given");
  CHECK_INVALID(vattn_sequence_truncate(NULL, 0), "sequence is NULL, must be given");
  CHECK_INVALID(vattn_sequence_truncate(sequence, -1), "tokens is -1, must be 0 to");
  CHECK_INVALID(vattn_sequence_truncate(sequence, INT64_MAX),
                "tokens is 9223372036854775807, must be 0 to");
  CHECK_INVALID(vattn_sequence_length(NULL, 0, &tokens), "sequence is NULL, must be given");
  CHECK_INVALID(vattn_sequence_length(sequence, 0, NULL), "tokens is NULL, must be given");
  CHECK_INVALID(vattn_sequence_length(sequence, kLayers, &tokens), "layer is 3, must be 0 to 2");
  CHECK_INVALID(vattn_sequence_length(sequence, kLeftOut, &tokens),
                "layer is 2, which layer_kv_heads leaves out");
  CHECK(tokens == -7);
  CHECK_INVALID(vattn_sequence_build_index(NULL), "sequence is NULL, must be given");
  CHECK_INVALID(vattn_sequence_reserve(NULL, 1), "sequence is NULL, must be given");
  CHECK_INVALID(vattn_sequence_reserve(sequence, -1), "tokens is -1, must be 0 to 2147483648");
  CHECK_INVALID(vattn_sequence_reserve(sequence, INT64_MAX), "must be 0 to 2147483648");
  CHECK_ERROR(vattn_sequence_reserve(sequence, 1 << 30), VATTN_FULL, "raise host_bytes");
}

static void TestTenants(vattn_runtime* runtime) {
  vattn_tenant_use use;
  CHECK_INVALID(vattn_tenant_limit(NULL, 1, 1), "runtime is NULL, must be given");
  CHECK_INVALID(vattn_tenant_limit(runtime, 0, 1), "tenant is 0, which has no quota, must be 1");
  CHECK_INVALID(vattn_tenant_stats(NULL, 1, &use, sizeof(use)), "runtime is NULL, must be given");
  CHECK_INVALID(vattn_tenant_stats(runtime, 1, NULL, sizeof(use)), "use is NULL, must be given");
  CHECK_INVALID(vattn_tenant_stats(runtime, 1, &use, 7), "struct_size is 7, must be 8 to 4096");
  CHECK_OK(vattn_tenant_stats(runtime, 1, &use, sizeof(use)));
  CHECK(use.struct_size == sizeof(use) && use.host_bytes_limit == 0 && use.host_bytes_used == 0);
}

void TestSequence(void) {
  vattn_runtime* runtime = MakeRuntime();
  TestCreate(runtime);
  vattn_sequence* sequence = MakeSequence(runtime);
  TestAppend(sequence);
  TestSharedAppend();
  TestCalls(sequence);
  TestTenants(runtime);
  /* FULL: nothing was added, and the sequence goes on. One row serves as every token and head. */
  vattn_append_params params = MakeAppend(0, 1 << 20);
  vattn_stats stats;
  int64_t tokens = 0;
  CHECK_ERROR(vattn_append(sequence, &params), VATTN_FULL, "raise host_bytes");
  CHECK_OK(vattn_sequence_length(sequence, 0, &tokens));
  CHECK(tokens == kPrompt);
  params = MakeAppend(0, 1);
  CHECK_OK(vattn_append(sequence, &params));
  CHECK_OK(vattn_runtime_stats(runtime, &stats, sizeof(stats)));
  CHECK(stats.full_refusals == 3); /* this and the reservations of TestCreate and TestCalls */
  vattn_sequence_destroy(sequence);
  vattn_runtime_destroy(runtime);
}

static void TestHibernated(vattn_runtime* runtime, vattn_sequence* sequence, const char* path) {
  vattn_sequence* fork = sequence;
  vattn_batch* batch = NULL;
  vattn_stats stats;
  int64_t tokens = 0;
  vattn_append_params params = MakeAppend(0, 1);
  CHECK_OK(vattn_batch_create(runtime, 1, &batch));
  CHECK_OK(vattn_batch_set(batch, 0, sequence));
  CHECK_INVALID(vattn_sequence_hibernate(sequence, path),
                "sequence sits in slot 0 of a batch, must be taken out");
  CHECK_OK(vattn_batch_clear(batch, 0));
  CHECK_OK(vattn_sequence_hibernate(sequence, path));
  CHECK_OK(vattn_runtime_stats(runtime, &stats, sizeof(stats)));
  CHECK(stats.host_bytes_used == 0);
  CHECK_OK(vattn_sequence_length(sequence, 0, &tokens));
  CHECK(tokens == kPrompt);
  CHECK_OK(vattn_runtime_stats(runtime, &stats, sizeof(stats)));
  CHECK(stats.host_bytes_used == 0); /* asking for its length does not wake it */
  /* Any other use does. */
  CHECK_OK(vattn_append(sequence, &params));
  CHECK_OK(vattn_sequence_length(sequence, 0, &tokens));
  CHECK(tokens == kPrompt + 1);
  CHECK_OK(vattn_sequence_hibernate(sequence, path));
  CHECK_OK(vattn_sequence_fork(sequence, 0, &fork));
  vattn_sequence_destroy(fork);
  CHECK_OK(vattn_sequence_hibernate(sequence, path));
  CHECK_OK(vattn_sequence_hibernate(sequence, path)); /* wakes and saves again */
  CHECK_OK(vattn_sequence_truncate(sequence, kPrompt));
  CHECK_OK(vattn_sequence_hibernate(sequence, path));
  CHECK_OK(vattn_sequence_build_index(sequence));
  CHECK_OK(vattn_sequence_hibernate(sequence, path));
  CHECK_OK(vattn_sequence_save(sequence, path));
  CHECK_OK(vattn_sequence_hibernate(sequence, path));
  CHECK_OK(vattn_batch_set(batch, 0, sequence));
  CHECK_OK(vattn_batch_clear(batch, 0));
  CHECK_OK(vattn_sequence_hibernate(sequence, path));
  /* Another sequence's file in its place is refused, and so is none. */
  vattn_sequence* other = MakeSequence(runtime);
  CHECK_OK(vattn_sequence_save(other, path));
  CHECK_ERROR(vattn_sequence_wake(sequence), VATTN_DATA_LOSS, "another one was put in its place");
  CHECK(remove(path) == 0);
  CHECK_ERROR(vattn_sequence_wake(sequence), VATTN_NOT_FOUND, path);
  CHECK_ERROR(vattn_append(sequence, &params), VATTN_NOT_FOUND, path);
  fork = sequence;
  CHECK_ERROR(vattn_sequence_fork(sequence, 0, &fork), VATTN_NOT_FOUND, path);
  CHECK(fork == NULL);
  CHECK_ERROR(vattn_batch_set(batch, 0, sequence), VATTN_NOT_FOUND, path);
  CHECK_OK(vattn_sequence_length(sequence, 0, &tokens));
  vattn_sequence_destroy(other);
  vattn_sequence_destroy(sequence);
  vattn_batch_destroy(batch);
}

#define CHECK_PREFIX(field, value_, text)                                           \
  do {                                                                              \
    vattn_prefix wrong = prefix;                                                    \
    wrong.field = (value_);                                                         \
    CHECK_INVALID(vattn_prefix_save(sequence, &wrong), text);                       \
    began = sequence, tokens = 7;                                                   \
    CHECK_INVALID(vattn_prefix_restore(runtime, &wrong, 0, &tokens, &began), text); \
    CHECK(began == NULL && tokens == 0);                                            \
  } while (0)

static void TestPrefixes(vattn_runtime* runtime, vattn_sequence* sequence) {
  static const int32_t ids[kPrompt + 1] = {5};
  int64_t tokens = 0, files = 0;
  vattn_sequence* began = NULL;
  vattn_prefix prefix;
  vattn_prefix_init(&prefix, sizeof(prefix));
  prefix.salt = "model", prefix.salt_bytes = 5;
  prefix.tokens = ids, prefix.num_tokens = kPrompt;
  CHECK_PREFIX(salt, NULL, "salt is NULL, must be given");
  CHECK_PREFIX(salt_bytes, 0, "salt_bytes is 0, must be 1 to 4096");
  CHECK_PREFIX(salt_bytes, 4097, "salt_bytes is 4097, must be 1 to 4096");
  CHECK_PREFIX(tokens, NULL, "tokens is NULL, must be given");
  CHECK_PREFIX(num_tokens, 0, "num_tokens is 0, must be 1 to");
  CHECK_PREFIX(num_tokens, -1, "num_tokens is -1, must be 1 to");
  CHECK_PREFIX(struct_size, 0, "prefix.struct_size is 0, must be 8 to 4096");
  CHECK_PREFIX(reserve_tokens, -1, "reserve_tokens is -1, must be 0 to 2147483648");
  CHECK_PREFIX(tier, 3, "tier is 3, must be 0 to 2");
  CHECK_PREFIX(tier, -1, "tier is -1, must be 0 to 2");
  CHECK_PREFIX(reserved0, 1, "reserved0 is 1, must be 0 to 0");
  CHECK_PREFIX(tier, VATTN_TIER_DISK, "disk_path is not given, must be for prefixes of tier disk");
  prefix.num_tokens = kPrompt + 1;
  CHECK_INVALID(vattn_prefix_save(sequence, &prefix), "num_tokens is 41, must be at most 40");
  prefix.num_tokens = kPrompt;
  CHECK_OK(vattn_prefix_save(sequence, &prefix)); /* too short to be kept */
  CHECK_ERROR(vattn_prefix_restore(runtime, &prefix, 0, &tokens, &began), VATTN_NOT_FOUND,
              "no stored prefix has 256 tokens or more in common with these 40");
  CHECK_INVALID(vattn_prefix_save(NULL, &prefix), "sequence is NULL, must be given");
  CHECK_INVALID(vattn_prefix_save(sequence, NULL), "prefix is NULL, must be given");
  CHECK_INVALID(vattn_prefix_restore(NULL, &prefix, 0, &tokens, &began), "runtime is NULL");
  CHECK_INVALID(vattn_prefix_restore(runtime, &prefix, 0, NULL, &began), "tokens is NULL");
  CHECK_INVALID(vattn_prefix_restore(runtime, &prefix, 0, &tokens, NULL), "out is NULL");
  CHECK_INVALID(vattn_prefix_forget(NULL, "model", 5, &files), "runtime is NULL");
  CHECK_INVALID(vattn_prefix_forget(runtime, NULL, 5, &files), "salt is NULL");
  CHECK_INVALID(vattn_prefix_forget(runtime, "model", 0, &files), "salt_bytes is 0, must be 1 to");
  CHECK_OK(vattn_prefix_forget(runtime, "model", 5, &files));
  CHECK(files == 0);
}

void TestFiles(void) {
  vattn_runtime* runtime = MakeRuntime();
  vattn_sequence* sequence = MakeSequence(runtime);
  vattn_sequence* restored = sequence;
  const char* folder = getenv("TMPDIR");
  char path[4096];
  snprintf(path, sizeof(path), "%s/c_api_test.%p", folder == NULL ? "/tmp" : folder,
           (void*)runtime);
  CHECK_INVALID(vattn_sequence_save(NULL, path), "sequence is NULL, must be given");
  CHECK_INVALID(vattn_sequence_save(sequence, NULL), "path is NULL, must be given");
  CHECK_ERROR(vattn_sequence_save(sequence, "/nowhere/at/all"), VATTN_IO_ERROR, "/nowhere/at");
  CHECK_ERROR(vattn_sequence_hibernate(sequence, "/nowhere/at/all"), VATTN_IO_ERROR, "/nowhere/at");
  CHECK_INVALID(vattn_sequence_hibernate(NULL, path), "sequence is NULL, must be given");
  CHECK_INVALID(vattn_sequence_hibernate(sequence, NULL), "path is NULL, must be given");
  CHECK_INVALID(vattn_sequence_wake(NULL), "sequence is NULL, must be given");
  CHECK_OK(vattn_sequence_wake(sequence)); /* awake already */
  CHECK_INVALID(vattn_sequence_restore(NULL, path, &restored), "runtime is NULL, must be given");
  CHECK(restored == NULL);
  CHECK_INVALID(vattn_sequence_restore(runtime, NULL, &restored), "path is NULL, must be given");
  CHECK_INVALID(vattn_sequence_restore(runtime, path, NULL), "out is NULL, must be given");
  restored = sequence;
  CHECK_ERROR(vattn_sequence_restore(runtime, path, &restored), VATTN_NOT_FOUND, path);
  CHECK(restored == NULL);
  /* A file of another layout. */
  CHECK_OK(vattn_sequence_save(sequence, path));
  vattn_options options = MakeOptions();
  options.sinks = 32;
  vattn_runtime* other = NULL;
  CHECK_OK(vattn_runtime_create(&options, &other));
  restored = sequence;
  CHECK_ERROR(vattn_sequence_restore(other, path, &restored), VATTN_DATA_LOSS, path);
  CHECK(restored == NULL);
  vattn_runtime_destroy(other);
  TestPrefixes(runtime, sequence);
  TestHibernated(runtime, sequence, path);
  vattn_runtime_destroy(runtime);
}
