#!/usr/bin/env bash
# cited_headings.py finds a wrong citation of every kind wherever it is planted, and lets right ones pass.
#   cited_headings_test.sh SOURCE
set -euo pipefail
source=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{bench,kernels/cpu}
cd "$work"
printf '%s\n' '# One' '## The second heading' '```' '# not a heading' '```' '### With `code`' >kernels/FIRST.md
printf '%s\n' '# Other' >bench/SAME.md
printf '%s\n' '# Other' >kernels/SAME.md
bad=0
check() { python3 "$source/tests/package/cited_headings.py" .; }
# right FILE TEXT: nothing is found.
right() {
  printf '%s\n' "$2" >"$1"
  if ! found=$(check); then echo "found in what is right: $2: $found"; bad=1; fi
  rm "$1"
}
# plant FILE TEXT SAYS: what is found says this.
plant() {
  printf '%s\n' "$2" >"$1"
  if found=$(check); then
    echo "not found: $2"; bad=1
  elif ! grep -qF "$1:${3}" <<<"$found"; then
    echo "found, but not as '$1:$3': $2: $found"; bad=1
  fi
  rm "$1"
}
check || { echo "above: found in a tree that is right"; exit 1; }
right kernels/cpu/a.h '// As FIRST.md, "The second heading", says, and kernels/FIRST.md, "One" and "With code".'
right kernels/cpu/a.h $'// As FIRST.md, "The second\n// heading", says.'
right kernels/cpu/a.cc $'/* As FIRST.md,\n * "One". */ REQUIRES 4 and ICML 2024 and VERSION 3.25'
right bench/a.md '[it](../kernels/FIRST.md#the-second-heading), [here](SAME.md), [out](https://example.org/none.md)'
right run.sh 'tee "$out/replay.md"; less build/report.md'
plant kernels/cpu/a.h '// MISSING.md' "1: MISSING.md is no page"
plant kernels/cpu/a.h '// SAME.md' "1: SAME.md is no page"
plant kernels/cpu/a.h $'// Two lines.\n// FIRST.md, "One" and "None"' '2: kernels/FIRST.md has no heading "None"'
plant kernels/cpu/a.h '// FIRST.md, "not a heading"' '1: kernels/FIRST.md has no heading "not a heading"'
plant kernels/cpu/a.h $'// FIRST.md, "The third\n// heading"' '1: kernels/FIRST.md has no heading "The third heading"'
plant bench/a.py '# kernels/FIRST.md, "Ones"' '1: kernels/FIRST.md has no heading "Ones"'
plant kernels/cpu/a.cu '/* Sampling (FIRST 4 to 6) */' "1: FIRST is cited by a number"
plant bench/a.md 'as ALGORITHM 3 says' "1: ALGORITHM is cited by a number"
plant bench/a.md '[it](../kernels/FIRST.md#the-third-heading)' "1: kernels/FIRST.md has no heading for #the-third"
plant bench/a.md '[it](../kernels/)  [that](none/)' "1: none/ leads nowhere"
exit $bad
