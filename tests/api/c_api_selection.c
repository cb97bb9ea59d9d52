/* Selections with bad arguments. */
#include <string.h>

#include "tests/api/c_api_check.h"

static float out[kQHeads * kDim];

enum { kCapacity = 64 };
static int32_t tokens[kKvHeads * kCapacity], counts[kKvHeads];
static float weights[kKvHeads * kCapacity];

static vattn_selection MakeSelection(void) {
  vattn_selection selection;
  vattn_selection_init(&selection, sizeof(selection));
  selection.capacity = kCapacity;
  selection.tokens = tokens;
  selection.log_weights = weights;
  selection.counts = counts;
  return selection;
}

#define CHECK_SELECTION(call, field, value_, text) \
  do {                                             \
    vattn_selection selection = MakeSelection();   \
    selection.field = (value_);                    \
    CHECK_INVALID(call, text);                     \
  } while (0)

/* The list of KV head 1 with entry `at` changed. */
static void CheckToken(vattn_batch* batch, int at, int32_t token, const char* text) {
  const vattn_attend_params params = MakeAttend(0);
  const vattn_selection selection = MakeSelection();
  const int32_t before = tokens[kCapacity + at];
  tokens[kCapacity + at] = token;
  CHECK_INVALID(vattn_attend_selected(batch, &params, &selection, NULL), text);
  tokens[kCapacity + at] = before;
}

static void TestSelectedLists(vattn_batch* batch) {
  vattn_attend_params params = MakeAttend(0);
  vattn_selection good = MakeSelection();
  struct CUstream_st* stream = (struct CUstream_st*)(void*)&good;
  for (int i = 0; i < kKvHeads * kCapacity; ++i) tokens[i] = i % kCapacity;
  counts[0] = counts[1] = 5;
  params.out = memset(out, 0x55, sizeof(out));
  CHECK_INVALID(vattn_attend_selected(NULL, &params, &good, NULL), "batch is NULL, must be given");
  CHECK_INVALID(vattn_attend_selected(batch, NULL, &good, NULL), "params is NULL, must be given");
  CHECK_INVALID(vattn_attend_selected(batch, &params, NULL, NULL),
                "selection is NULL, must be given");
  if (!OnCuda()) {
    CHECK_INVALID(vattn_attend_selected(batch, &params, &good, stream),
                  "stream is given, must be NULL");
  }
#define CHECK_SELECTED(field, value_, text) \
  CHECK_SELECTION(vattn_attend_selected(batch, &params, &selection, NULL), field, value_, text)
  CHECK_SELECTED(struct_size, 0, "selection.struct_size is 0, must be 8 to 4096");
  CHECK_SELECTED(capacity, 0, "capacity is 0, must be 1 to");
  CHECK_SELECTED(capacity, INT64_MAX, "capacity is 9223372036854775807, must be 1 to");
  CHECK_SELECTED(tokens, NULL, "tokens is NULL, must be given");
  CHECK_SELECTED(counts, NULL, "counts is NULL, must be given");
  CHECK_SELECTED(capacity, 4, "counts[0] is 5, must be 1 to 4");
  counts[1] = 0;
  CHECK_INVALID(vattn_attend_selected(batch, &params, &good, NULL),
                "counts[1] is 0, must be 1 to 64");
  counts[1] = -1;
  CHECK_INVALID(vattn_attend_selected(batch, &params, &good, NULL),
                "counts[1] is -1, must be 1 to 64");
  counts[1] = 5;
  CheckToken(batch, 0, -1, "tokens[1][0] is -1, must be 0 to 40");
  CheckToken(batch, 4, kPrompt + 1, "tokens[1][4] is 41, must be 0 to 40");
  CheckToken(batch, 3, 1, "tokens[1][3] is 1, must be over the one before: 2");
  CheckToken(batch, 3, 2, "tokens[1][3] is 2, must be over the one before: 2");
  for (size_t i = 0; i < sizeof(out); ++i)
    CHECK(((unsigned char*)out)[i] == 0x55); /* nothing written */
  CHECK_OK(vattn_attend_selected(batch, &params, &good, NULL));
  if (!OnCuda()) {
    CHECK_INVALID(vattn_attend_selected(batch, &params, &good, NULL),
                  "layer is 0, which was attended in this step");
  }
}

static void TestSelect(vattn_batch* batch) {
  vattn_attend_params params = MakeAttend(1);
  vattn_selection good = MakeSelection();
  struct CUstream_st* stream = (struct CUstream_st*)(void*)&good;
  params.out = NULL; /* not used */
  CHECK_INVALID(vattn_select(NULL, &params, &good, NULL), "batch is NULL, must be given");
  CHECK_INVALID(vattn_select(batch, NULL, &good, NULL), "params is NULL, must be given");
  CHECK_INVALID(vattn_select(batch, &params, NULL, NULL), "selection is NULL, must be given");
  if (!OnCuda()) {
    CHECK_INVALID(vattn_select(batch, &params, &good, stream), "stream is given, must be NULL");
  }
#define CHECK_SELECT(field, value_, text) \
  CHECK_SELECTION(vattn_select(batch, &params, &selection, NULL), field, value_, text)
  CHECK_SELECT(capacity, -1, "capacity is -1, must be 1 to");
  CHECK_SELECT(tokens, NULL, "tokens is NULL, must be given");
  CHECK_SELECT(log_weights, NULL, "log_weights is NULL, must be given");
  CHECK_SELECT(counts, NULL, "counts is NULL, must be given");
  params.q = NULL;
  CHECK_INVALID(vattn_select(batch, &params, &good, NULL), "q is NULL, must be given");
  params.q = rows;
  good.capacity = 10;
  CHECK_ERROR(vattn_select(batch, &params, &good, NULL), VATTN_FULL,
              "capacity is 10, this selection needs 41");
  CHECK(counts[0] == kPrompt + 1 && counts[1] == kPrompt + 1);
  good.capacity = kCapacity;
  CHECK_OK(vattn_select(batch, &params, &good, NULL)); /* asked again with room */
  if (!OnCuda()) {
    CHECK_INVALID(vattn_select(batch, &params, &good, NULL),
                  "layer is 1, which was attended in this step");
  }
}

void TestSelection(void) {
  vattn_runtime* runtime = MakeRuntime();
  vattn_sequence* sequence = MakeSequence(runtime);
  vattn_batch* batch = NULL;
  vattn_attend_params params = MakeAttend(0);
  vattn_selection selection = MakeSelection();
  CHECK_OK(vattn_batch_create(runtime, 1, &batch));
  CHECK_OK(vattn_batch_set(batch, 0, sequence));
  CHECK_INVALID(vattn_select(batch, &params, &selection, NULL), "no step is open");
  CHECK_INVALID(vattn_attend_selected(batch, &params, &selection, NULL), "no step is open");
  CHECK_OK(vattn_batch_begin_step(batch, 1, NULL));
  TestSelectedLists(batch);
  TestSelect(batch);
  vattn_batch_destroy(batch);
  vattn_sequence_destroy(sequence);
  vattn_runtime_destroy(runtime);

  vattn_options options = MakeOptions();
  options.policy = VATTN_POLICY_DENSE;
  CHECK_OK(vattn_runtime_create(&options, &runtime));
  sequence = MakeSequence(runtime);
  CHECK_OK(vattn_batch_create(runtime, 1, &batch));
  CHECK_OK(vattn_batch_set(batch, 0, sequence));
  CHECK_OK(vattn_batch_begin_step(batch, 1, NULL));
  CHECK_ERROR(vattn_select(batch, &params, &selection, NULL), VATTN_NOT_SUPPORTED, "policy is 3");
  vattn_batch_destroy(batch);
  vattn_sequence_destroy(sequence);
  vattn_runtime_destroy(runtime);
}
