#!/usr/bin/env bash
# twin_names.py finds a CUDA file without a twin, and rows of its list that are wrong.
#   twin_names_test.sh SOURCE
set -euo pipefail
source=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/kernels"
cp -r "$source/kernels/cpu" "$source/kernels/cuda" "$source/kernels/METHOD.md" "$work/kernels"
check() { python3 "$source/tests/package/twin_names.py" "$work"; }
check || { echo "above: faults found in a tree that is right"; exit 1; }

bad=0
# expect TEXT: the check fails and says this.
expect() {
  if found=$(check); then
    echo "not found: $1"; bad=1
  elif ! grep -qF "$1" <<<"$found"; then
    echo "found, but not as '$1': $found"; bad=1
  fi
}
page=$work/kernels/METHOD.md
# row LINE: the list with one more line.
row() { sed "/^### CUDA files without a twin/,\$ s/^| --- .*/&\n$1/" "$source/kernels/METHOD.md" >"$page"; }

touch "$work/kernels/cuda/planted.cu"
expect 'kernels/cuda/planted.cu: no kernels/cpu/planted.cc or .h'
row '| `planted.cu` | planted |'
check || { echo "above: a file that is in the list"; bad=1; }
row '| `planted.cu` |  |'
expect 'planted.cu has no reason'
touch "$work/kernels/cpu/planted.h"
row '| `planted.cu` | planted |'
expect 'planted.cu has a twin and needs no row'
rm "$work/kernels/cuda/planted.cu" "$work/kernels/cpu/planted.h"
expect 'kernels/cuda/planted.cu is not there'
cp "$source/kernels/METHOD.md" "$page"
mv "$work/kernels/cpu/plan.cc" "$work/kernels/cpu/plans.cc"
mv "$work/kernels/cpu/plan.h" "$work/kernels/cpu/plans.h"
expect 'kernels/cuda/plan.cu: no kernels/cpu/plan.cc or .h'
exit $bad
