/* One sequence, one layer: 8192 random prompt tokens, then a few decode steps.
 * Build: cc -std=c99 minimal.c -lvattn */
#include <stdio.h>
#include <stdlib.h>

#include "vattn.h"

enum { kPrompt = 8192, kQHeads = 8, kKvHeads = 2, kDim = 64, kRow = kKvHeads * kDim };

static const char* const kVerdicts[] = {"exact", "verified", "dense", "best effort"};
static float k[kPrompt * kRow], v[kPrompt * kRow], q[kQHeads * kDim], out[kQHeads * kDim];

static void Check(vattn_code code) {
  if (code == VATTN_OK) return;
  fprintf(stderr, "%s: %s\n", vattn_code_name(code), vattn_last_error());
  exit(1);
}

static void FillRandom(float* values, int count, float scale) {
  for (int i = 0; i < count; ++i) values[i] = scale * ((float)rand() / (float)RAND_MAX - .5f);
}

int main(void) {
  const char* options =
      "{\"num_q_heads\": 8, \"num_kv_heads\": 2, \"head_dim_k\": 64,"
      " \"head_dim_v\": 64, \"dtype\": \"f32\"}";
  vattn_runtime* runtime;
  Check(vattn_runtime_create_json(options, &runtime));
  vattn_sequence* sequence;
  Check(vattn_sequence_create(runtime, NULL, &sequence));
  FillRandom(k, kPrompt * kRow, 4);
  FillRandom(v, kPrompt * kRow, 2);
  vattn_append_params prompt;
  vattn_append_params_init(&prompt, sizeof(prompt));
  prompt.num_tokens = kPrompt, prompt.k = k, prompt.v = v;
  Check(vattn_append(sequence, &prompt));

  vattn_batch* batch;
  Check(vattn_batch_create(runtime, 1, &batch));
  Check(vattn_batch_set(batch, 0, sequence));
  for (int step = 0; step < 4; ++step) {
    int32_t verdict[kQHeads], selected[kKvHeads];
    int64_t middle[kKvHeads];
    vattn_attend_params params;
    vattn_attend_params_init(&params, sizeof(params));
    FillRandom(q, kQHeads * kDim, 4); /* k and v serve as those of the new token, too */
    params.q = q, params.k_new = k, params.v_new = v, params.out = out;
    params.verdict = verdict, params.selected = selected, params.middle = middle;
    Check(vattn_batch_begin_step(batch, 1, NULL));
    Check(vattn_attend(batch, &params, NULL));
    printf("step %d: head 0 is %s, read %.1f %% of %d rows in the middle\n", step,
           kVerdicts[verdict[0]], 100. * selected[0] / (double)middle[0], (int)middle[0]);
  }
  vattn_batch_destroy(batch);
  vattn_sequence_destroy(sequence);
  vattn_runtime_destroy(runtime);
  return 0;
}
