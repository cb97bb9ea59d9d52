// For builds without liburing: no ring, files are moved by pread and pwrite.
#include <cerrno>

#include "memory/ring.h"

namespace vattn {
namespace {

int None() {
  errno = ENOSYS;
  return -1;
}

}  // namespace

int OpenRing(unsigned, Ring**) { return None(); }
void CloseRing(Ring*) {}
int RegisterBuffers(Ring*, std::byte*, size_t, unsigned) { return None(); }
int RegisterFile(Ring*, int) { return None(); }
int SubmitTransfer(Ring*, const RingTransfer&) { return None(); }
int WaitTransfer(Ring*, int, RingDone*) { return None(); }

}  // namespace vattn
