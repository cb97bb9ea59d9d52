#!/usr/bin/env bash
# include_directions.sh finds a wrong line wherever it is planted, in sub-folders of every depth too.
#   include_directions_test.sh SOURCE
set -euo pipefail
source=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$source"
find api bench examples kernels memory runtime tests -name '*.cc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' \
  -o -name '*.hpp' -o -name '*.c' | tar -cf - -T - | tar -xf - -C "$work"
cd "$work"
check() { bash "$source/tests/package/include_directions.sh"; }
check || { echo "above: lines found in a tree that is right"; exit 1; }

bad=0
# plant FILE LINE [SAYS]: in a file that was not there; what is found names it, or says this.
plant() {
  mkdir -p "$(dirname "$1")"
  echo "$2" >"$1"
  if found=$(check); then
    echo "not found: $2 in $1"; bad=1
  elif ! grep -qF "${3:-$1:1:}" <<<"$found"; then
    echo "found, but not as '${3:-$1:1:}': $2 in $1: $found"; bad=1
  fi
  rm "$1"
  rmdir --ignore-fail-on-non-empty "$(dirname "$1")"
}
for place in memory memory/new; do
  plant $place/planted.cc '#include "runtime/batch.h"'
  plant $place/planted.cc '#include "kernels/params.h"'
  plant $place/planted.h '#include <hwloc.h>'
  plant $place/planted.cc '#include <liburing.h>'
  plant $place/planted.cc '#include <oneapi/tbb/parallel_for.h>'
  plant $place/planted.cc '#include <cuda_runtime_api.h>'
  plant $place/planted.cc 'void* p = mmap(nullptr, 1, 0, 0, -1, 0);'
done
for place in runtime runtime/cuda runtime/new; do
  plant $place/planted.cc '#include "api/calls.h"'
  plant $place/planted.cc '#include <cuda_runtime_api.h>'
  plant $place/planted.cc '#include <tbb/parallel_for.h>'
  plant $place/planted.cc '#include "bench/cli/text.h"'
  plant $place/planted.h '#include "../memory/status.h"'
  plant $place/planted.cc 'int got = ::fsync(3);'
done
for place in kernels/cpu kernels/cuda kernels/cpu/new; do
  plant $place/planted.cc '#include "absl/status/status.h"'
  plant $place/planted.cc '#include <tbb/parallel_for.h>'
  plant $place/planted.h '#include "runtime/layer.h"'
done
plant kernels/cuda/new/planted.cu 'Kernel<<<1, 1>>>();'
plant api/new/planted.cc '#include "memory/status.h"'
plant bench/trace/planted.cc '#include "tests/api/backend.h"'
plant bench/trace/planted.cc '#include "bench/replay/session.h"'
plant bench/trace/planted.cc '#include "bench/handles.h"'
plant bench/cli/new/planted.h '#include "bench/trace/trace.h"'
plant bench/new/planted.cc '' 'bench/new/ has no rule'
plant new/planted.cc '' 'new/ has no rule'

# A home that has moved is no exception for whoever takes its name.
mv memory/ring_uring.cc memory/ring_moved.cc
if found=$(check) || ! grep -q 'memory/ring_uring.cc is no home' <<<"$found"; then
  echo "not found: memory/ring_uring.cc is gone"; bad=1
fi
exit $bad
