/* Checks of the C API tests, and the small runtimes that they run on. C99, no framework. */
#ifndef VATTN_TESTS_API_C_API_CHECK_H_
#define VATTN_TESTS_API_C_API_CHECK_H_

#include "api/vattn.h"

/* One count for the program; main returns it. */
extern int num_failures;
void Fail(const char* file, int line, const char* what);
/* `text` is the argument, its value and its limit as the message must contain them. */
void ExpectError(const char* file, int line, const char* call, vattn_code got, vattn_code want,
                 const char* text);

#define CHECK(condition) ((condition) ? (void)0 : Fail(__FILE__, __LINE__, #condition))
#define CHECK_OK(call) ExpectError(__FILE__, __LINE__, #call, (call), VATTN_OK, "")
#define CHECK_ERROR(call, code, text) ExpectError(__FILE__, __LINE__, #call, (call), (code), (text))
#define CHECK_INVALID(call, text) CHECK_ERROR(call, VATTN_INVALID_ARGUMENT, text)

/* Shapes of MakeOptions. */
enum { kLayers = 3, kLeftOut = 2, kQHeads = 4, kKvHeads = 2, kDim = 16, kPrompt = 40 };
/* Rows for a prompt of kPrompt tokens, and for one decode step of four slots. */
extern float rows[kPrompt * kKvHeads * kDim];

/* Whether VATTN_BACKEND says "cuda"; else tests run on the CPU. */
int OnCuda(void);
/* 3 layers of which the last is left out, fp32, 8 MiB pool, on the backend under test. */
vattn_options MakeOptions(void);
vattn_runtime* MakeRuntime(void);
/* With kPrompt tokens in each of its layers. */
vattn_sequence* MakeSequence(vattn_runtime* runtime);
vattn_append_params MakeAppend(int32_t layer, int64_t tokens);
/* k_new and v_new given, out into a static array, nothing else asked for. */
vattn_attend_params MakeAttend(int32_t layer);

void TestLayout(void);
void TestOptions(void);
void TestRuntime(void);
void TestSequence(void);
void TestFiles(void);
void TestBatch(void);
void TestAttend(void);
void TestSelection(void);
void TestLifetimes(void);

#endif /* VATTN_TESTS_API_C_API_CHECK_H_ */
