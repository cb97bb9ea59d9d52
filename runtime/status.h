// The errors of the runtime as the C API sees them: api/ includes nothing below runtime/.
#ifndef VATTN_RUNTIME_STATUS_H_
#define VATTN_RUNTIME_STATUS_H_

#include "memory/status.h"  // IWYU pragma: export

#endif  // VATTN_RUNTIME_STATUS_H_
