// Operator new that refuses on demand. A program that links this has it in place of the standard
// one.
#ifndef VATTN_TESTS_API_REFUSED_MEMORY_H_
#define VATTN_TESTS_API_REFUSED_MEMORY_H_

#include <cstdint>

namespace vattn::test {

// Allocations are counted and refused while armed, of all threads together: let no other run then.
struct MemoryFaults {
  bool armed = false, for_ever = false;  // for_ever: also every one after fail_at
  int64_t fail_at = 0;                   // the allocation to refuse, from 1
  int64_t calls = 0, failed = 0;
};
extern MemoryFaults memory_faults;

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_REFUSED_MEMORY_H_
