// The backend that a test runs on: the CPU, or CUDA where VATTN_BACKEND is "cuda"
// (tests/api/backend_main.cc).
#ifndef VATTN_TESTS_API_BACKEND_H_
#define VATTN_TESTS_API_BACKEND_H_

#include <string>

#include "api/vattn.h"

namespace vattn::test {

bool OnCuda();
// Why this machine or build has no CUDA device to run on, or "".
std::string NoCuda();
// Why the backend in use lacks these options, or "".
std::string NotServed(const vattn_options& options);

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_BACKEND_H_
