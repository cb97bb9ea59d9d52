#!/usr/bin/env bash
# Which sources clang-format would change; with --fix it changes them. Run from the top of the tree. Exit 1 if any,
# 77 (skipped) without clang-format 14, the version of Debian 12: others wrap some lines in another way.
set -euo pipefail
format=
for name in clang-format-14 clang-format; do
  if command -v "$name" >/dev/null && "$name" --version | grep -q ' version 14\.'; then format=$name; break; fi
done
if [ -z "$format" ]; then
  echo "skipped: clang-format 14 is not installed (Debian package clang-format)"
  exit 77
fi
files() {
  find api bench examples kernels memory runtime tests -regextype posix-extended -regex '.*\.(h|hpp|c|cc|cu|cuh)' -print0
}
if [ "${1:-}" = --fix ]; then
  files | xargs -0 -P "$(nproc)" -n 16 "$format" -i
  exit 0
fi
changed=$(files | xargs -0 "$format" --dry-run 2>&1 | sed -nE 's/^([^ :]+):[0-9]+:[0-9]+: warning: .*/\1/p' |
  sort | uniq -c | sort -rn)
[ -z "$changed" ] && exit 0
echo "places that clang-format would change (bash tests/package/format.sh --fix does):"
echo "$changed"
exit 1
