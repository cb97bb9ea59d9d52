#include "bench/cli/standard_output.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iostream>

#include "bench/cli/failure.h"

namespace vattn::bench {

void RequireStandardOutput() {
  bool open_there[3];
  for (int fd = 0; fd < 3; ++fd) {
    open_there[fd] = fcntl(fd, F_GETFD) >= 0;
    if (!open_there[fd]) (void)!open("/dev/null", fd == STDERR_FILENO ? O_WRONLY : O_RDONLY);
  }
  if (!open_there[STDOUT_FILENO])
    throw Failure("standard output is closed: there is nowhere to write the result to");
}

int FinishStandardOutput(int exit_code) {
  errno = 0;
  std::cout.flush();
  const bool lost = std::fflush(stdout) != 0 || std::ferror(stdout) != 0 || !std::cout.good();
  if (!lost) return exit_code;
  std::fprintf(stderr, "vattn: cannot write to standard output%s%s\n", errno == 0 ? "" : ": ",
               errno == 0 ? "" : std::strerror(errno));
  return exit_code == 0 ? 1 : exit_code;
}

}  // namespace vattn::bench
