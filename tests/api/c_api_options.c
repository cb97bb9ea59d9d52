/* Options, runtimes, counters and texts with bad arguments. */
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/api/c_api_check.h"

/* Creates a runtime with one field of the options changed; it must be refused with `text`. */
#define CHECK_OPTION(field, value_, text)                       \
  do {                                                          \
    vattn_options options = MakeOptions();                      \
    vattn_runtime* made = (vattn_runtime*)&options;             \
    options.field = (value_);                                   \
    CHECK_INVALID(vattn_runtime_create(&options, &made), text); \
    CHECK(made == NULL);                                        \
  } while (0)

static void TestRanges(void) {
  static const int32_t too_many[kLayers] = {2, 1025, 0}, negative[kLayers] = {-1, 2, 0};
  static const int32_t odd[kLayers] = {2, 3, 0};
  CHECK_OPTION(num_layers, 0, "num_layers is 0, must be 1 to 1024");
  CHECK_OPTION(num_layers, 1025, "num_layers is 1025, must be 1 to 1024");
  CHECK_OPTION(num_q_heads, 0, "num_q_heads is 0, must be 1 to 1024");
  CHECK_OPTION(num_q_heads, 1025, "num_q_heads is 1025, must be 1 to 1024");
  CHECK_OPTION(num_q_heads, 5, "num_q_heads is 5, must be a multiple of the 2 KV heads of layer 0");
  CHECK_OPTION(num_kv_heads, 0, "num_kv_heads is 0, must be 1 to 1024");
  CHECK_OPTION(layer_kv_heads, too_many, "layer_kv_heads[1] is 1025, must be 0 to 1024");
  CHECK_OPTION(layer_kv_heads, negative, "layer_kv_heads[0] is -1, must be 0 to 1024");
  CHECK_OPTION(layer_kv_heads, odd,
               "num_q_heads is 4, must be a multiple of the 3 KV heads of layer 1");
  CHECK_OPTION(head_dim_k, 8, "head_dim_k is 8, must be 16 to 1024");
  CHECK_OPTION(head_dim_k, 24, "head_dim_k is 24, must be a multiple of 16");
  CHECK_OPTION(head_dim_k, 1040, "head_dim_k is 1040, must be 16 to 1024");
  CHECK_OPTION(head_dim_v, 0, "head_dim_v is 0, must be 16 to 1024");
  CHECK_OPTION(head_dim_v, 40, "head_dim_v is 40, must be a multiple of 16");
  CHECK_OPTION(dtype, 3, "dtype is 3, must be 0 to 2");
  CHECK_OPTION(dtype, -1, "dtype is -1, must be 0 to 2");
  CHECK_OPTION(shared_kv, 2, "shared_kv is 2, must be 0 to 1");
  CHECK_OPTION(softmax_scale, -1, "softmax_scale is -1, must be finite and 0 or more");
  CHECK_OPTION(softmax_scale, (float)NAN, "softmax_scale is nan, must be finite and 0 or more");
  CHECK_OPTION(softmax_scale, (float)INFINITY,
               "softmax_scale is inf, must be finite and 0 or more");
  CHECK_OPTION(backend, 3, "backend is 3, must be 0 to 2");
  CHECK_OPTION(device, -1, "device is -1, must be 0 to");
  CHECK_OPTION(num_threads, -1, "num_threads is -1, must be 0 to 4096");
  CHECK_OPTION(num_threads, 4097, "num_threads is 4097, must be 0 to 4096");
  CHECK_OPTION(numa_node, -2, "numa_node is -2, must be -1 to");
  CHECK_OPTION(huge_pages, 2, "huge_pages is 2, must be 0 to 1");
  CHECK_OPTION(prefault, -1, "prefault is -1, must be 0 to 1");
  CHECK_OPTION(host_bytes, 1, "host_bytes is 1, must be at least one block of");
  CHECK_OPTION(host_bytes, UINT64_MAX, "host_bytes is 18446744073709551615, must be at least");
  CHECK_OPTION(sinks, 8, "sinks is 8, must be a multiple of 16");
  CHECK_OPTION(sinks, 272, "sinks is 272, must be 0 to 256");
  CHECK_OPTION(window, 0, "window is 0, must be 1 to 65536");
  CHECK_OPTION(window, 65537, "window is 65537, must be 1 to 65536");
  CHECK_OPTION(exact_below, 63, "exact_below is 63, must be 64 to");
  CHECK_OPTION(index, 8, "index is 8, must be 0 to 7");
  CHECK_OPTION(sign_maps, "maps", "sign_maps is given, must be NULL with index 0");
  CHECK_OPTION(index_bytes, 24, "index_bytes is 24, must be 16, 32, 48 or 64");
  CHECK_OPTION(value_bits, 3, "value_bits is 3, must be 0, 2 or 4");
  CHECK_OPTION(policy, 4, "policy is 4, must be 0 to 3");
  CHECK_OPTION(norm, 2, "norm is 2, must be 0 to 1");
  CHECK_OPTION(on_unverified, 2, "on_unverified is 2, must be 0 to 1");
  CHECK_OPTION(bound, 2, "bound is 2, must be 0 to 1");
  CHECK_OPTION(target, 3, "target is 3, must be 0 to 2");
  CHECK_OPTION(epsilon, 0, "epsilon is 0, must be over 0 and at most 10");
  CHECK_OPTION(epsilon, 11, "epsilon is 11, must be over 0 and at most 10");
  CHECK_OPTION(epsilon, (float)NAN, "epsilon is nan, must be over 0 and at most 10");
  CHECK_OPTION(delta, 0, "delta is 0, must be over 0 and at most 0.215");
  CHECK_OPTION(delta, .25f, "delta is 0.25, must be over 0 and at most 0.215");
  CHECK_OPTION(norm_floor, 1.5f, "norm_floor is 1.5, must be 0 to 1");
  CHECK_OPTION(max_looks, 0, "max_looks is 0, must be 1 to 8");
  CHECK_OPTION(max_looks, 9, "max_looks is 9, must be 1 to 8");
  CHECK_OPTION(refresh, 0, "refresh is 0, must be 1 to 4096");
  CHECK_OPTION(min_selected, -1, "min_selected is -1, must be 0 to 65536");
  CHECK_OPTION(max_selected_share, 0, "max_selected_share is 0, must be over 0 and at most 1");
  CHECK_OPTION(max_selected_share, 2, "max_selected_share is 2, must be over 0 and at most 1");
  CHECK_OPTION(topk_share, -.5f, "topk_share is -0.5, must be 0 to 1");
  CHECK_OPTION(base_share, 1.5f, "base_share is 1.5, must be 0 to 1");
  CHECK_OPTION(hot_share, 2, "hot_share is 2, must be 0 to 1");
  CHECK_OPTION(hot_share, (float)NAN, "hot_share is nan, must be 0 to 1");
  CHECK_OPTION(zero_on_free, 2, "zero_on_free is 2, must be 0 to 1");
  CHECK_OPTION(pilot, 2, "pilot is 2, must be 0 to 1");
  CHECK_OPTION(admission, 2, "admission is 2, must be 0 to 1");
  CHECK_OPTION(spill, 2, "spill is 2, must be 0 to 1");
  CHECK_OPTION(spill, 1, "disk_path is not given, must be with spill = 1");
  CHECK_OPTION(io_engine, 3, "io_engine is 3, must be 0 to 2");
  CHECK_OPTION(io_depth, 257, "io_depth is 257, must be 1 to 256");
  CHECK_OPTION(io_depth, -1, "io_depth is -1, must be 1 to 256");
  CHECK_OPTION(io_block_bytes, 4095, "io_block_bytes is 4095, must be 4096 to 268435456");
  CHECK_OPTION(io_block_bytes, 5000, "io_block_bytes is 5000, must be a multiple of 4096");
  CHECK_OPTION(io_buffered, 2, "io_buffered is 2, must be 0 to 1");
  CHECK_OPTION(io_timeout_ms, -1, "io_timeout_ms is -1, must be 1 to 1073741824");
}

static void TestStructSizes(void) {
  struct {
    vattn_options options;
    char newer[16];
  } longer;
  vattn_runtime* runtime = NULL;
  CHECK_OPTION(struct_size, 0, "options.struct_size is 0, must be 8 to 4096");
  CHECK_OPTION(struct_size, 4097, "options.struct_size is 4097, must be 8 to 4096");
  memset(&longer, 0, sizeof(longer));
  longer.options = MakeOptions();
  longer.options.struct_size = sizeof(longer);
  CHECK_OK(vattn_runtime_create(&longer.options, &runtime)); /* newer, but uses nothing new */
  vattn_runtime_destroy(runtime);
  longer.newer[9] = 1;
  CHECK_INVALID(vattn_runtime_create(&longer.options, &runtime),
                "options.struct_size is 288 with byte 281 set");
  CHECK(runtime == NULL);
  /* An older caller: what it does not know keeps its default. */
  vattn_options older = MakeOptions();
  older.struct_size = offsetof(vattn_options, policy);
  older.policy = 99;
  CHECK_OK(vattn_runtime_create(&older, &runtime));
  vattn_options in_force;
  vattn_options_init(&in_force, sizeof(in_force));
  CHECK_OK(vattn_runtime_options(runtime, &in_force));
  CHECK(in_force.policy == VATTN_POLICY_VERIFIED);
  CHECK(in_force.softmax_scale == .25f);
  CHECK(in_force.layer_kv_heads != NULL && in_force.layer_kv_heads[kLeftOut] == 0);
  vattn_runtime_destroy(runtime);
}

static void TestJson(void) {
  vattn_options options = MakeOptions(), before;
  vattn_runtime* runtime = (vattn_runtime*)&options;
  memcpy(&before, &options, sizeof(options));
  CHECK_INVALID(vattn_options_from_json(NULL, &options), "json is NULL, must be given");
  CHECK_INVALID(vattn_options_from_json("{}", NULL), "options is NULL, must be given");
  CHECK_INVALID(vattn_options_from_json("{", &options), "json is not valid JSON");
  CHECK_INVALID(vattn_options_from_json("[]", &options), "json is array, must be an object");
  CHECK_INVALID(vattn_options_from_json("{\"window\": 5, \"sink\": 16}", &options),
                "unknown key \"sink\"");
  CHECK(memcmp(&before, &options, sizeof(options)) == 0);
  options.struct_size = 4;
  CHECK_INVALID(vattn_options_from_json("{}", &options),
                "options.struct_size is 4, must be 8 to 4096");
  CHECK_INVALID(vattn_runtime_create_json("{\"epsilon\": 11}", &runtime), "epsilon is 11, must be");
  CHECK(runtime == NULL);
  runtime = (vattn_runtime*)&options;
  CHECK_INVALID(vattn_runtime_create_json("{\"epsilon\": true}", &runtime),
                "epsilon is true, must be a number");
  CHECK(runtime == NULL);
  CHECK_INVALID(vattn_runtime_create_json(NULL, &runtime), "json is NULL, must be given");
  CHECK_INVALID(vattn_runtime_create_json("{}", NULL), "out is NULL, must be given");
}

/* Writes a profile with this header, and c_q of MakeOptions with that many zero bytes. */
static void WriteProfile(const char* path, const char* header, size_t data_bytes) {
  FILE* file = fopen(path, "wb");
  const size_t length = strlen(header);
  CHECK(file != NULL);
  if (file == NULL) return;
  for (int i = 0; i < 8; ++i) fputc(i < 2 ? (int)(length >> 8 * i & 255) : 0, file);
  fputs(header, file);
  for (size_t i = 0; i < data_bytes; ++i) fputc(0, file);
  CHECK(fclose(file) == 0);
}

#define PROFILE_HEADER(format, heads)                    \
  "{\"__metadata__\": {\"format\": \"" format            \
  "\", \"softmax_scale\": \"0.25\"},"                    \
  " \"c_q\": {\"dtype\": \"F32\", \"shape\": [3, " heads \
  ", 16, 16], \"data_offsets\": [0, 6144]}}"

#define CHECK_PROFILE(path_, code, text)                            \
  do {                                                              \
    vattn_options options = MakeOptions();                          \
    vattn_runtime* made = (vattn_runtime*)&options;                 \
    options.profile = (path_);                                      \
    CHECK_ERROR(vattn_runtime_create(&options, &made), code, text); \
    CHECK(made == NULL);                                            \
  } while (0)

static void TestProfile(void) {
  const char* folder = getenv("TMPDIR");
  char path[4096], kept[4096], json[4200];
  vattn_options options = MakeOptions(), in_force;
  vattn_runtime* runtime = NULL;
  if (folder == NULL) folder = "/tmp";
  snprintf(path, sizeof(path), "%s/c_api_test.profile.%p", folder, (void*)&options);
  CHECK_PROFILE(path, VATTN_NOT_FOUND, path);
  CHECK_PROFILE(folder, VATTN_IO_ERROR, "is no plain file");
  WriteProfile(path, PROFILE_HEADER("vattn-profile-1", "2"), 6143);
  CHECK_PROFILE(path, VATTN_DATA_LOSS,
                "c_q.data_offsets is [0,6144], must be 6144 bytes of the 6143");
  WriteProfile(path, "[]", 6144);
  CHECK_PROFILE(path, VATTN_DATA_LOSS, "the header is no JSON object");
  WriteProfile(path, PROFILE_HEADER("vattn-trace-1", "2"), 6144);
  CHECK_PROFILE(path, VATTN_INVALID_ARGUMENT,
                "__metadata__.format is \"vattn-trace-1\", must be \"vattn-profile-1\"");
  WriteProfile(path, PROFILE_HEADER("vattn-profile-1", "1"), 6144);
  CHECK_PROFILE(path, VATTN_INVALID_ARGUMENT, "c_q.shape is [3,1,16,16], must be [3,2,16,16]");
  /* The runtime keeps the name, and what it has read. */
  WriteProfile(path, PROFILE_HEADER("vattn-profile-1", "2"), 6144);
  strcpy(kept, path);
  options.profile = kept;
  CHECK_OK(vattn_runtime_create(&options, &runtime));
  memset(kept, 'x', strlen(kept));
  CHECK(remove(path) == 0);
  vattn_options_init(&in_force, sizeof(in_force));
  CHECK_OK(vattn_runtime_options(runtime, &in_force));
  CHECK(in_force.profile != NULL && in_force.profile != kept &&
        strcmp(in_force.profile, path) == 0);
  vattn_runtime_destroy(runtime);
  snprintf(json, sizeof(json), "{\"profile\": \"%s\"}", path);
  CHECK_ERROR(vattn_runtime_create_json(json, &runtime), VATTN_NOT_FOUND, path);
  /* None. */
  options.profile = "";
  CHECK_OK(vattn_runtime_create(&options, &runtime));
  CHECK_OK(vattn_runtime_options(runtime, &in_force));
  CHECK(in_force.profile == NULL);
  vattn_runtime_destroy(runtime);
}

void TestOptions(void) {
  TestRanges();
  TestProfile();
  TestStructSizes();
  TestJson();
}

static void TestTextBuffers(vattn_runtime* runtime) {
  char buffer[16];
  size_t needed = 0;
  CHECK_INVALID(vattn_doctor(buffer, sizeof(buffer), NULL), "needed is NULL, must be given");
  CHECK_INVALID(vattn_doctor(NULL, 8, &needed), "buffer is NULL with size 8, must be given");
  CHECK_INVALID(vattn_stats_prometheus(NULL, buffer, sizeof(buffer), &needed),
                "runtime is NULL, must be given");
  CHECK_INVALID(vattn_stats_prometheus(runtime, buffer, sizeof(buffer), NULL),
                "needed is NULL, must be given");
  CHECK_INVALID(vattn_stats_prometheus(runtime, NULL, 1, &needed),
                "buffer is NULL with size 1, must be given");
}

void TestRuntime(void) {
  vattn_options options = MakeOptions();
  vattn_stats stats;
  vattn_runtime* runtime = (vattn_runtime*)&options;
  CHECK_INVALID(vattn_runtime_create(NULL, &runtime), "options is NULL, must be given");
  CHECK(runtime == NULL);
  CHECK_INVALID(vattn_runtime_create(&options, NULL), "out is NULL, must be given");
  options.backend = VATTN_BACKEND_CUDA;
  if (strstr(vattn_build_info(), "cuda") == NULL) {
    CHECK_ERROR(vattn_runtime_create(&options, &runtime), VATTN_NOT_SUPPORTED, "no CUDA backend");
    CHECK(runtime == NULL);
  }
  runtime = MakeRuntime();
  CHECK_INVALID(vattn_runtime_options(NULL, &options), "runtime is NULL, must be given");
  CHECK_INVALID(vattn_runtime_options(runtime, NULL), "options is NULL, must be given");
  options.struct_size = 5;
  CHECK_INVALID(vattn_runtime_options(runtime, &options),
                "options.struct_size is 5, must be 8 to 4096");
  CHECK_INVALID(vattn_runtime_stats(NULL, &stats, sizeof(stats)), "runtime is NULL, must be given");
  CHECK_INVALID(vattn_runtime_stats(runtime, NULL, sizeof(stats)), "stats is NULL, must be given");
  CHECK_INVALID(vattn_runtime_stats(runtime, &stats, 7), "struct_size is 7, must be 8 to 4096");
  CHECK_INVALID(vattn_runtime_stats(runtime, &stats, 4097),
                "struct_size is 4097, must be 8 to 4096");
  TestTextBuffers(runtime);
  vattn_runtime_destroy(runtime);
  vattn_runtime_destroy(NULL);
}
