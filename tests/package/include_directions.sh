#!/usr/bin/env bash
# Who may include whom: api -> runtime -> {memory, kernels}; each package has one home. Run from the
# top of the tree; prints every line that breaks a rule.
set -u
bad=0
deny() { p=$1; shift; grep -rnE "^ *# *include *[<\"]($p)" "$@" && bad=1; }
deny 'kernels/|runtime/|api/|vattn\.' memory
deny 'memory/|runtime/|api/|vattn\.|absl/' kernels
deny 'api/|vattn\.' runtime
deny 'memory/|kernels/' api
deny 'absl/|memory/|runtime/|kernels/' api/vattn.h api/vattn.hpp
deny '(oneapi/)?tbb' runtime api
deny 'hwloc|liburing' runtime kernels api
deny 'hwloc' $(ls memory/*.cc memory/*.h | grep -v 'memory/host_store_create.cc')
deny 'liburing' $(ls memory/*.cc memory/*.h | grep -v 'memory/ring_uring.cc')
deny '(oneapi/)?tbb' kernels/cuda
deny 'cuda' runtime api $(ls memory/*.cc memory/*.h | grep -vE 'memory/(device|page_ops)_cuda.cc') kernels/cpu
deny '(oneapi/)?tbb' $(ls kernels/cpu/* | grep -v 'kernels/cpu/workers.cc')
# Calls that tests make fail go through their tables.
grep -rnE '(^|[^.>_[:alnum:]])(mmap|munmap|madvise|mlock|mbind) *\(' memory runtime kernels api --include=*.cc |
  grep -v '^memory/memory_ops.cc' | grep -v '"' && bad=1
grep -rnE '(::|[^.>_[:alnum:]:"])(pread|pwrite|fsync|fdatasync|rename|unlink|ftruncate) *\(' memory runtime kernels \
  api --include=*.cc | grep -vE '^memory/file_ops.cc|^[^:]*:[0-9]+: *//' && bad=1
grep -rn '<<<' kernels | grep -v stream && bad=1
exit $bad
