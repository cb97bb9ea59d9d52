/* Batches and attention with bad arguments. */
#include "tests/api/c_api_check.h"

/* A call with one field changed, in an open step; refused, it writes nothing and leaves the step
   open. `call` reads `params`. */
#define CHECK_FIELD(call, field, value_, text)  \
  do {                                          \
    vattn_attend_params params = MakeAttend(0); \
    params.field = (value_);                    \
    CHECK_INVALID(call, text);                  \
  } while (0)

static void FinishStep(vattn_batch* batch, int32_t new_tokens) {
  for (int32_t layer = 0; layer < kLeftOut; ++layer) {
    vattn_attend_params params = MakeAttend(layer);
    if (new_tokens == 0) params.k_new = params.v_new = NULL;
    CHECK_OK(vattn_attend(batch, &params, NULL));
  }
}

static void TestSlots(vattn_runtime* runtime, vattn_batch* batch, vattn_sequence* sequence) {
  vattn_batch* other = batch;
  CHECK_INVALID(vattn_batch_create(NULL, 1, &other), "runtime is NULL, must be given");
  CHECK(other == NULL);
  CHECK_INVALID(vattn_batch_create(runtime, 1, NULL), "out is NULL, must be given");
  other = batch;
  CHECK_INVALID(vattn_batch_create(runtime, 0, &other), "slots is 0, must be 1 to 4096");
  CHECK(other == NULL);
  CHECK_INVALID(vattn_batch_create(runtime, 4097, &other), "slots is 4097, must be 1 to 4096");
  CHECK_INVALID(vattn_batch_set(NULL, 0, sequence), "batch is NULL, must be given");
  CHECK_INVALID(vattn_batch_set(batch, 0, NULL), "sequence is NULL, must be given");
  CHECK_INVALID(vattn_batch_set(batch, -1, sequence), "slot is -1, must be 0 to 1");
  CHECK_INVALID(vattn_batch_set(batch, 2, sequence), "slot is 2, must be 0 to 1");
  CHECK_INVALID(vattn_batch_clear(NULL, 0), "batch is NULL, must be given");
  CHECK_INVALID(vattn_batch_clear(batch, -1), "slot is -1, must be 0 to 1");
  CHECK_INVALID(vattn_batch_clear(batch, 2), "slot is 2, must be 0 to 1");
  CHECK_OK(vattn_batch_clear(batch, 1)); /* empty already */
  CHECK_OK(vattn_batch_set(batch, 0, sequence));
  CHECK_OK(vattn_batch_set(batch, 0, sequence)); /* there already */
  CHECK_INVALID(vattn_batch_set(batch, 1, sequence),
                "sequence already sits in slot 0 of this batch");
  CHECK_OK(vattn_batch_create(runtime, 1, &other));
  CHECK_INVALID(vattn_batch_set(other, 0, sequence),
                "sequence already sits in slot 0 of another batch");
  vattn_batch_destroy(other);
  vattn_runtime* stranger = MakeRuntime();
  vattn_sequence* foreign = MakeSequence(stranger);
  CHECK_INVALID(vattn_batch_set(batch, 1, foreign),
                "sequence is of another runtime than the batch");
  vattn_sequence_destroy(foreign);
  vattn_runtime_destroy(stranger);
  vattn_batch_destroy(NULL);
}

static const char kHalf[] =
    "the batch has an open step that has yet to attend layer 1, must attend every layer first";

static void TestSteps(vattn_runtime* runtime, vattn_batch* batch, vattn_sequence* sequence) {
  vattn_attend_params attend = MakeAttend(0);
  vattn_append_params append = MakeAppend(0, 1);
  vattn_sequence *empty = NULL, *fork = NULL;
  const int32_t ids[] = {1, 2, 3};
  vattn_prefix prefix;
  vattn_prefix_init(&prefix, sizeof(prefix));
  prefix.salt = "salt", prefix.salt_bytes = 4, prefix.tokens = ids, prefix.num_tokens = 3;
  CHECK_INVALID(vattn_batch_abandon(NULL), "batch is NULL, must be given");
  CHECK_OK(vattn_batch_abandon(batch)); /* no step is open */
  CHECK_INVALID(vattn_batch_begin_step(NULL, 1, NULL), "batch is NULL, must be given");
  CHECK_INVALID(vattn_batch_begin_step(batch, -1, NULL), "new_tokens is -1, must be 0 to 16");
  CHECK_INVALID(vattn_batch_begin_step(batch, 17, NULL), "new_tokens is 17, must be 0 to 16");
  CHECK_INVALID(vattn_attend(batch, &attend, NULL),
                "no step is open, vattn_batch_begin_step must come first");
  CHECK_OK(vattn_sequence_create(runtime, NULL, &empty));
  CHECK_OK(vattn_batch_set(batch, 1, empty));
  CHECK_INVALID(vattn_batch_begin_step(batch, 0, NULL),
                "sequence in slot 1 is empty, must have a token to attend to");
  CHECK_OK(vattn_append(empty, &append));
  CHECK_INVALID(vattn_batch_begin_step(batch, 1, NULL),
                "sequence in slot 1 has 0 tokens in layer 1, must have as many");
  vattn_sequence_destroy(empty); /* leaves its slot */

  CHECK_OK(vattn_batch_begin_step(batch, 1, NULL));
  CHECK_OK(vattn_attend(batch, &attend, NULL));
  if (!OnCuda()) { /* there a replayed graph may attend, of which no call knows */
    CHECK_INVALID(vattn_attend(batch, &attend, NULL),
                  "layer is 0, which was attended in this step, must be");
    CHECK_INVALID(vattn_batch_begin_step(batch, 1, NULL),
                  "layer 1 was not attended in the step before, must be");
    /* The sequence belongs to the step until every layer is done. */
    CHECK_INVALID(vattn_append(sequence, &append), kHalf);
    CHECK_INVALID(vattn_sequence_truncate(sequence, 1), kHalf);
    CHECK_INVALID(vattn_sequence_build_index(sequence), kHalf);
    CHECK_INVALID(vattn_sequence_fork(sequence, 0, &fork), kHalf);
    CHECK(fork == NULL);
    CHECK_INVALID(vattn_sequence_save(sequence, "never"), kHalf);
    CHECK_INVALID(vattn_prefix_save(sequence, &prefix), kHalf);
    CHECK_OK(vattn_sequence_create(runtime, NULL, &empty));
    CHECK_INVALID(vattn_batch_set(batch, 1, empty), kHalf);
    vattn_sequence_destroy(empty);
  }
  CHECK_INVALID(vattn_batch_set(batch, 1, sequence),
                "sequence already sits in slot 0 of this batch");
  attend.layer = 1;
  CHECK_OK(vattn_attend(batch, &attend, NULL));
  CHECK_OK(vattn_append(sequence, &append));
  CHECK_OK(vattn_sequence_truncate(sequence, kPrompt));
  /* A step without a token ends when its sequence changes: its tables are of the old length. */
  CHECK_OK(vattn_batch_begin_step(batch, 0, NULL));
  CHECK_OK(vattn_sequence_truncate(sequence, kPrompt - 1));
  attend.k_new = attend.v_new = NULL;
  CHECK_INVALID(vattn_attend(batch, &attend, NULL),
                "no step is open, vattn_batch_begin_step must come first");
}

static void TestFields(vattn_batch* batch) {
  struct {
    vattn_attend_params params;
    int64_t newer;
  } longer = {MakeAttend(0), 1};
  vattn_attend_params good = MakeAttend(0);
  struct CUstream_st* stream = (struct CUstream_st*)(void*)&good;
  CHECK_OK(vattn_batch_begin_step(batch, 1, NULL));
  CHECK_INVALID(vattn_attend(NULL, &good, NULL), "batch is NULL, must be given");
  CHECK_INVALID(vattn_attend(batch, NULL, NULL), "params is NULL, must be given");
  if (!OnCuda()) {
    CHECK_INVALID(vattn_attend(batch, &good, stream),
                  "stream is given, must be NULL on the CPU backend");
  }
  longer.params.struct_size = sizeof(longer);
  CHECK_INVALID(vattn_attend(batch, &longer.params, NULL),
                "params.struct_size is 184 with byte 176 set");
#define CHECK_ATTEND(field, value_, text) \
  CHECK_FIELD(vattn_attend(batch, &params, NULL), field, value_, text)
  CHECK_ATTEND(struct_size, 1, "params.struct_size is 1, must be 8 to 4096");
  CHECK_ATTEND(layer, -1, "layer is -1, must be 0 to 2");
  CHECK_ATTEND(layer, kLayers, "layer is 3, must be 0 to 2");
  CHECK_ATTEND(layer, kLeftOut, "layer is 2, which layer_kv_heads leaves out");
  CHECK_ATTEND(num_tokens, 0, "num_tokens is 0, must be 1 to 16");
  CHECK_ATTEND(num_tokens, 17, "num_tokens is 17, must be 1 to 16");
  CHECK_ATTEND(num_tokens, 2, "num_tokens is 2, must be 1 in a step with new_tokens = 1");
  CHECK_ATTEND(out_dtype, -1, "out_dtype is -1, must be 0 to 2");
  CHECK_ATTEND(out_dtype, 3, "out_dtype is 3, must be 0 to 2");
  CHECK_ATTEND(q, NULL, "q is NULL, must be given");
  CHECK_ATTEND(out, NULL, "out is NULL, must be given");
  CHECK_ATTEND(k_new, NULL, "k_new is NULL, must be given in a step with new_tokens = 1");
  CHECK_ATTEND(v_new, NULL, "v_new is NULL, must be given with new_tokens = 1 and shared_kv = 0");
  FinishStep(batch, 1);
  CHECK_OK(vattn_batch_begin_step(batch, 0, NULL));
  CHECK_ATTEND(v_new, NULL, "k_new is given, must be NULL in a step with new_tokens = 0");
  CHECK_ATTEND(k_new, NULL, "v_new is given, must be NULL with new_tokens = 0 and shared_kv = 0");
  FinishStep(batch, 0);
}

void TestBatch(void) {
  vattn_runtime* runtime = MakeRuntime();
  vattn_sequence* sequence = MakeSequence(runtime);
  vattn_batch* batch = NULL;
  CHECK_OK(vattn_batch_create(runtime, 2, &batch));
  TestSlots(runtime, batch, sequence);
  TestSteps(runtime, batch, sequence);
  vattn_batch_destroy(batch);
  vattn_sequence_destroy(sequence);
  vattn_runtime_destroy(runtime);
}

void TestAttend(void) {
  vattn_runtime* runtime = MakeRuntime();
  vattn_sequence* sequence = MakeSequence(runtime);
  vattn_batch* batch = NULL;
  CHECK_OK(vattn_batch_create(runtime, 1, &batch));
  CHECK_OK(vattn_batch_set(batch, 0, sequence));
  TestFields(batch);
  vattn_batch_destroy(batch);
  vattn_sequence_destroy(sequence);
  vattn_runtime_destroy(runtime);
}
