#!/usr/bin/env bash
# Who may include whom: api -> runtime -> {memory, kernels}; each package has one home; the folders of
# bench have an order. Run from the top of the tree; prints every line that breaks a rule. Every rule
# looks into sub-folders, and a folder, a place or a home that a rule does not know or find is an error:
# include_directions_test.sh plants wrong lines and expects each to be found.
set -u
bad=0
fail() { echo "include_directions.sh: $*"; bad=1; }
includes='^ *# *include *[<"]'

# deny PATTERN PLACE...: nothing in these files and folders includes what begins like this.
deny() {
  local pattern=$1 place
  shift
  for place in "$@"; do
    [ -e "$place" ] || fail "$place does not exist"
  done
  grep -rnE "$includes($pattern)" "$@" && bad=1
}

# home PATTERN PLACE...: of the library, these alone include what begins like this, and each does.
home() {
  local pattern=$1 place
  shift
  for place in "$@"; do
    grep -qrsE "$includes($pattern)" "$place" || fail "$place is no home of '$pattern'"
  done
  grep -rnE "$includes($pattern)" api runtime memory kernels | grep -vE "^($(IFS='|'; echo "$*"))[:/]" && bad=1
}

for folder in */; do
  case $folder in
    api/ | runtime/ | memory/ | kernels/ | bench/ | tests/ | examples/ | build*/) ;;
    *) fail "$folder has no rule" ;;
  esac
done

deny 'kernels/|runtime/|api/|vattn\.' memory
deny 'memory/|runtime/|api/|vattn\.|absl/' kernels
deny 'api/|vattn\.' runtime
deny 'memory/|kernels/' api
deny 'absl/|memory/|runtime/|kernels/' api/vattn.h api/vattn.hpp
deny 'bench/' api runtime memory kernels examples
deny 'tests/' api runtime memory kernels examples bench
deny '\.\.?/' api runtime memory kernels bench tests  # paths start at the top of the tree
home 'hwloc' memory/host_store_create.cc
home 'liburing' memory/ring_uring.cc
home '(oneapi/)?tbb' memory/host_store_create.cc kernels/cpu/workers.cc
home 'cuda' memory/device_cuda.cc memory/page_ops_cuda.cc kernels/cuda

# A folder of bench includes itself and those named here.
for folder in bench/*/; do
  [ -n "$(find "$folder" -name '*.cc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')" ] || continue
  case $folder in
    bench/cli/ | bench/llama_cpp/ | bench/ops/) may='' ;;
    bench/cuda/ | bench/trace/) may='cli' ;;
    bench/baselines/ | bench/gather/) may='cli|cuda' ;;
    bench/replay/) may='cli|trace' ;;
    bench/disk/ | bench/inside/) may='cli|trace|replay' ;;
    bench/step/) may='cli|trace|cuda|baselines' ;;
    *) fail "$folder has no rule"; continue ;;
  esac
  grep -rnE "${includes}bench/" "$folder" | grep -vE "[<\"]bench/($(basename "$folder")|$may)/" && bad=1
done

# Calls that tests make fail go through their tables.
grep -rnE '(^|[^.>_[:alnum:]])(mmap|munmap|madvise|mlock|mbind) *\(' memory runtime kernels api --include=*.cc |
  grep -v '^memory/memory_ops.cc' | grep -v '"' && bad=1
grep -rnE '(::|[^.>_[:alnum:]:"])(pread|pwrite|fsync|fdatasync|rename|unlink|ftruncate) *\(' memory runtime kernels \
  api --include=*.cc | grep -vE '^memory/file_ops.cc|^[^:]*:[0-9]+: *//' && bad=1
# A launch names its stream, on the line that opens it or on the one after.
launches=$(grep -rnA1 '<<<' kernels | awk '/^--$/ { next } /<<</ { if (line) print line; line = $0; if (/stream/) line = ""; next }
  { if (/stream/) line = ""; if (line) print line; line = "" } END { if (line) print line }')
[ -z "$launches" ] || { echo "$launches"; bad=1; }
exit $bad
