#!/usr/bin/env bash
# clang-tidy 14 (Debian 12) with the checks of .clang-tidy, over what a CPU build compiles: everything, or the sources whose
# paths begin with an argument. It takes about 20 s a source and core, too long for ctest: it is run by hand and by
# .github/workflows/ci.yml. Exit 1 if there is a finding, 77 (skipped) without clang-tidy 14.
#   bash tests/package/tidy.sh [PATH...]          JOBS=2: sources at a time (all cores)
set -euo pipefail
cd "$(dirname "$0")/../.."
tidy=
for name in clang-tidy-14 clang-tidy; do
  if command -v "$name" >/dev/null && "$name" --version | grep -q 'version 14\.'; then tidy=$name; break; fi
done
if [ -z "$tidy" ]; then
  echo "skipped: clang-tidy 14 is not installed (Debian packages clang and clang-tidy)"
  exit 77
fi
cmake -S . -B build-tidy -G Ninja -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ -DVATTN_CUDA=OFF \
  -DCMAKE_EXPORT_COMPILE_COMMANDS=ON >/dev/null
sources() { # those of the tree that have a command, once each
  python3 - "$PWD" "$@" <<'PYTHON'
import json, sys
top, *wanted = sys.argv[1:]
paths = {entry["file"].removeprefix(top + "/") for entry in json.load(open("build-tidy/compile_commands.json"))}
print("\n".join(path for path in sorted(paths) if path[0] != "/" and path.startswith(tuple(wanted) or "")))
PYTHON
}
sources "$@" | xargs -r -P "${JOBS:-$(nproc)}" -n 1 "$tidy" -p build-tidy --quiet 2>/dev/null
