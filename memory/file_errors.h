// Errors of files, which name the file.
#ifndef VATTN_MEMORY_FILE_ERRORS_H_
#define VATTN_MEMORY_FILE_ERRORS_H_

#include <cstring>
#include <string>

#include "memory/status.h"

namespace vattn {

// IO_ERROR "<path>: <call>: <what errno means>".
inline absl::Status SystemError(const char* call, const std::string& path, int error) {
  return IoError(path, ": ", call, ": ", std::strerror(error));
}

// The same error with the path before its text.
inline absl::Status InFile(const std::string& path, const absl::Status& status) {
  return status.ok() ? status
                     : MakeError(CodeOf(status), absl::StrCat(path, ": ", status.message()));
}

}  // namespace vattn

#endif  // VATTN_MEMORY_FILE_ERRORS_H_
