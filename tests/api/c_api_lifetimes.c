/* Handles that outlive their runtime. */
#include <string.h>

#include "tests/api/c_api_check.h"

static void CountLine(void* user, int32_t level, const char* message) {
  CHECK(level == VATTN_LOG_ERROR);
  CHECK(strstr(message, "1 of its sequences and 1 of its batches") != NULL);
  ++*(int*)user;
}

void TestLifetimes(void) {
  int lines = 0;
  vattn_options options = MakeOptions(), in_force;
  vattn_runtime* runtime = NULL;
  vattn_batch* batch = NULL;
  options.log = CountLine;
  options.log_user = &lines;
  CHECK_OK(vattn_runtime_create(&options, &runtime));
  vattn_options_init(&in_force, sizeof(in_force));
  CHECK_OK(vattn_runtime_options(runtime, &in_force));
  CHECK(in_force.log == CountLine && in_force.log_user == &lines);
  vattn_sequence* sequence = MakeSequence(runtime);
  CHECK_OK(vattn_batch_create(runtime, 1, &batch));
  CHECK_OK(vattn_batch_set(batch, 0, sequence));
  CHECK_OK(vattn_batch_begin_step(batch, 1, NULL));
  vattn_runtime_destroy(runtime);
  CHECK(lines == 1);

  /* The handles that are left may only be destroyed. */
  const char* const orphan = "sequence outlived its runtime, may only be destroyed";
  const char* const orphans = "batch outlived its runtime, may only be destroyed";
  vattn_append_params append = MakeAppend(0, 1);
  vattn_attend_params attend = MakeAttend(0);
  vattn_selection selection;
  vattn_sequence* fork = sequence;
  int64_t length = 0;
  vattn_selection_init(&selection, sizeof(selection));
  CHECK_INVALID(vattn_append(sequence, &append), orphan);
  CHECK_INVALID(vattn_sequence_fork(sequence, 0, &fork), orphan);
  CHECK(fork == NULL);
  CHECK_INVALID(vattn_sequence_truncate(sequence, 0), orphan);
  CHECK_INVALID(vattn_sequence_length(sequence, 0, &length), orphan);
  CHECK_INVALID(vattn_sequence_build_index(sequence), orphan);
  CHECK_INVALID(vattn_sequence_save(sequence, "unused"), orphan);
  CHECK_INVALID(vattn_sequence_hibernate(sequence, "unused"), orphan);
  CHECK_INVALID(vattn_sequence_wake(sequence), orphan);
  CHECK_INVALID(vattn_batch_set(batch, 0, sequence), orphans);
  CHECK_INVALID(vattn_batch_clear(batch, 0), orphans);
  CHECK_INVALID(vattn_batch_begin_step(batch, 1, NULL), orphans);
  CHECK_INVALID(vattn_attend(batch, &attend, NULL), orphans);
  CHECK_INVALID(vattn_attend_selected(batch, &attend, &selection, NULL), orphans);
  CHECK_INVALID(vattn_select(batch, &attend, &selection, NULL), orphans);
  vattn_batch_destroy(batch);
  vattn_sequence_destroy(sequence);
  CHECK(lines == 1);
}
