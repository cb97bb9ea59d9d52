// Which process a thing belongs to. fork() copies handles, descriptors and counters, so that a
// child holds what looks like its parent's directories and files.
#ifndef VATTN_MEMORY_PROCESS_H_
#define VATTN_MEMORY_PROCESS_H_

#include <sys/types.h>
#include <unistd.h>

namespace vattn {

// The process that made it.
class HomeProcess {
 public:
  pid_t id() const { return id_; }
  // False in a child of it, made by fork.
  bool IsHere() const { return getpid() == id_; }

 private:
  const pid_t id_ = getpid();
};

}  // namespace vattn

#endif  // VATTN_MEMORY_PROCESS_H_
