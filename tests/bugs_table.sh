#!/usr/bin/env bash
# bugs_table.sh BUILD: BUGS.md has each of its lines once, without a gap in their numbers, each names a test or says why none can
# apply, and the tests named exist and belong to a program that ctest of BUILD runs (those of cuda_ are
# built with CUDA alone; cuda_soak is run by hand). Every *_test.cc of any sub-folder is such a program.
# The lines of kinds, F1 and on, are held to the same. Run in tests/.
set -u
run=$(ctest -N --test-dir "$1" | sed -nE 's/^ *Test +#[0-9]+: //p')
bad=0
fail() { echo "BUGS.md: $*"; bad=1; }
last=$(sed -nE 's/^\| ([0-9]+) \|.*/\1/p' BUGS.md | sort -n | tail -1)
[ "${last:-0}" -ge 49 ] || fail "lines are missing at the end"
for number in $(seq "$last"); do
  line=$(grep -E "^\| $number \|" BUGS.md)
  [ "$(grep -c . <<<"$line")" = 1 ] || fail "line $number is not there once"
  grep -qE '`|Cannot apply' <<<"$line" || fail "line $number names no test"
done
for name in $(grep -E '^\| F?[0-9]' BUGS.md | grep -oE '`[A-Za-z]+\.test_[a-z0-9_]+`' | tr -d '`' | sort -u); do
  # The test may stand in a class that this one derives from.
  grep -qE "^class ${name%.*}\(" python/*_test.py && grep -qE "^    def ${name#*.}\(" python/*_test.py ||
    fail "$name does not exist"
done
for name in $(grep -E '^\| F?[0-9]' BUGS.md | grep -oE '`[A-Za-z_/]+(\.[A-Za-z0-9]+)?[ `]' | tr -d '` ' | sort -u); do
  case $name in
    *.*) files=$(grep -rlE --include='*_test.cc' "^TEST(_F|_P)?\(${name%.*}, *${name#*.}\)" .) ;;
    BlockId) continue ;;
    *) files=$(find . -path "*/$name.cc" -o -path "*/$name.sh") ;;
  esac
  [ -n "$files" ] || fail "$name does not exist"
  for file in $files; do
    program=$(basename "$(basename "$file" .cc)" .sh)
    case $program in cuda_* | fuzz_*) continue ;; esac
    grep -qx "$program" <<<"$run" || fail "$name is in $program, which ctest does not run"
  done
done
# Those of llama_cpp are run where there is a tree of llama.cpp.
for file in $(find . -name '*_test.cc' -not -path './llama_cpp/*'); do
  program=$(basename "$file" .cc)
  case $program in cuda_*) continue ;; esac
  grep -qx "$program" <<<"$run" || { echo "$file is no program that ctest runs"; bad=1; }
done
exit $bad
