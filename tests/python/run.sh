#!/usr/bin/env bash
# Runs tests of the Python package: run.sh BUILD PATTERN PACKAGE... with the first Python that has the
# packages: the one that VATTN_TEST_PYTHON names, that of BUILD/python (tests/run.sh makes it), python3.
# Exit 77 (skipped) if none has them.
set -uo pipefail
build=$1 pattern=$2
shift 2
export OMP_NUM_THREADS=1  # torch's threads spin while other tests need the processor
find='import importlib.util as u, sys
assert sys.version_info >= (3, 11), "Python 3.11"
missing = [name for name in sys.argv[1:] if u.find_spec(name) is None]
assert not missing, ", ".join(missing)'
for python in "${VATTN_TEST_PYTHON:-}" "$build/python/bin/python" python3; do
  [ -n "$python" ] && command -v "$python" >/dev/null || continue
  if why=$("$python" -c "$find" "$@" 2>&1); then
    exec "$python" -m unittest discover -v -s "$(dirname "$0")" -p "$pattern"
  fi
  echo "$python lacks ${why##*AssertionError: }"
done
echo "skipped: $pattern needs Python 3.11 with $*; VATTN_TEST_PYTHON may name one, tests/run.sh makes one"
[ -s "$build/python/reason" ] && echo "making it failed: $(tail -1 "$build/python/reason")"
exit 77
