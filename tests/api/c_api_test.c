/* Every function of the C API with every kind of bad argument, compiled as C99. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/api/c_api_check.h"

int num_failures = 0;
float rows[kPrompt * kKvHeads * kDim];
static float out[4 * kQHeads * kDim];

void Fail(const char* file, int line, const char* what) {
  fprintf(stderr, "%s:%d: %s\n", file, line, what);
  ++num_failures;
}

void ExpectError(const char* file, int line, const char* call, vattn_code got, vattn_code want,
                 const char* text) {
  if (got != want) {
    fprintf(stderr, "%s:%d: %s gave %s, not %s (%s)\n", file, line, call, vattn_code_name(got),
            vattn_code_name(want), vattn_last_error());
    ++num_failures;
  } else if (want != VATTN_OK && strstr(vattn_last_error(), text) == NULL) {
    fprintf(stderr, "%s:%d: %s says \"%s\", without \"%s\"\n", file, line, call, vattn_last_error(),
            text);
    ++num_failures;
  }
}

int OnCuda(void) {
  const char* chosen = getenv("VATTN_BACKEND");
  return chosen != NULL && strcmp(chosen, "cuda") == 0;
}

vattn_options MakeOptions(void) {
  static const int32_t heads[kLayers] = {kKvHeads, kKvHeads, 0};
  vattn_options options;
  vattn_options_init(&options, sizeof(options));
  options.num_layers = kLayers;
  options.num_q_heads = kQHeads;
  options.num_kv_heads = kKvHeads;
  options.layer_kv_heads = heads;
  options.head_dim_k = options.head_dim_v = kDim;
  options.dtype = VATTN_F32;
  options.backend = OnCuda() ? VATTN_BACKEND_CUDA : VATTN_BACKEND_CPU;
  options.num_threads = 1;
  options.host_bytes = 8 << 20;
  return options;
}

vattn_runtime* MakeRuntime(void) {
  const vattn_options options = MakeOptions();
  vattn_runtime* runtime = NULL;
  CHECK_OK(vattn_runtime_create(&options, &runtime));
  return runtime;
}

vattn_append_params MakeAppend(int32_t layer, int64_t tokens) {
  vattn_append_params params;
  vattn_append_params_init(&params, sizeof(params));
  params.layer = layer;
  params.num_tokens = tokens;
  params.k = params.v = rows;
  return params;
}

vattn_sequence* MakeSequence(vattn_runtime* runtime) {
  vattn_sequence* sequence = NULL;
  CHECK_OK(vattn_sequence_create(runtime, NULL, &sequence));
  for (int32_t layer = 0; layer < kLeftOut; ++layer) {
    const vattn_append_params params = MakeAppend(layer, kPrompt);
    CHECK_OK(vattn_append(sequence, &params));
  }
  return sequence;
}

vattn_attend_params MakeAttend(int32_t layer) {
  vattn_attend_params params;
  vattn_attend_params_init(&params, sizeof(params));
  params.layer = layer;
  params.q = params.k_new = params.v_new = rows;
  params.out = out;
  return params;
}

static void TestTexts(void) {
  CHECK(strcmp(vattn_last_error(), "") == 0);
  CHECK(strcmp(vattn_code_name(VATTN_OK), "OK") == 0);
  CHECK(strcmp(vattn_code_name(VATTN_INVALID_ARGUMENT), "INVALID_ARGUMENT") == 0);
  CHECK(strcmp(vattn_code_name(VATTN_OUT_OF_MEMORY), "OUT_OF_MEMORY") == 0);
  CHECK(strcmp(vattn_code_name(VATTN_NOT_SUPPORTED), "NOT_SUPPORTED") == 0);
  CHECK(strcmp(vattn_code_name(VATTN_DEVICE_ERROR), "DEVICE_ERROR") == 0);
  CHECK(strcmp(vattn_code_name(VATTN_IO_ERROR), "IO_ERROR") == 0);
  CHECK(strcmp(vattn_code_name(VATTN_INTERNAL), "INTERNAL") == 0);
  CHECK(strcmp(vattn_code_name(VATTN_FULL), "FULL") == 0);
  CHECK(strcmp(vattn_code_name(VATTN_DEVICE_LOST), "DEVICE_LOST") == 0);
  CHECK(strcmp(vattn_code_name(VATTN_DATA_LOSS), "DATA_LOSS") == 0);
  CHECK(strcmp(vattn_code_name(VATTN_NOT_FOUND), "NOT_FOUND") == 0);
  CHECK(strcmp(vattn_code_name(VATTN_NOT_FOUND + 1), "UNKNOWN") == 0);
  CHECK(strcmp(vattn_code_name(-1), "UNKNOWN") == 0);
  char version[32];
  sprintf(version, "%d.%d.%d", VATTN_VERSION_MAJOR, VATTN_VERSION_MINOR, VATTN_VERSION_PATCH);
  CHECK(strcmp(vattn_version(), version) == 0);
  CHECK(strstr(vattn_build_info(), "backends cpu") != NULL);
}

static void FillRows(void) {
  for (int i = 0; i < kPrompt * kKvHeads * kDim; ++i) rows[i] = (float)(i * 7919 % 101) / 101 - .5f;
}

/* Why the backend under test is not there, or NULL. */
static const char* Missing(void) {
  const vattn_options options = MakeOptions();
  vattn_runtime* runtime = NULL;
  if (!OnCuda() || vattn_runtime_create(&options, &runtime) == VATTN_OK) {
    vattn_runtime_destroy(runtime);
    return NULL;
  }
  return vattn_last_error();
}

int main(void) {
  const char* missing = Missing();
  if (missing != NULL) {
    fprintf(stderr, "skipped: %s\n", missing);
    return 77;
  }
  FillRows();
  TestTexts(); /* first: no call has failed yet */
  TestLayout();
  TestOptions();
  TestRuntime();
  TestSequence();
  TestFiles();
  TestBatch();
  TestAttend();
  TestSelection();
  TestLifetimes();
  fprintf(stderr, "%d failures\n", num_failures);
  return num_failures > 0;
}
