#!/usr/bin/env bash
# Installs the wheel into a clean virtual environment and runs the tests over numpy against it.
#   wheel_test.sh LIBRARY SOURCE     exit 77 (skipped) where PyPI cannot be reached
set -euo pipefail
library=$1 source=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python=$work/venv/bin/python
pip="$python -m pip -q --disable-pip-version-check"
if ! $pip install --retries 2 numpy "scikit-build-core>=0.10" 2>"$work/reason"; then
  echo "skipped: packages cannot be installed: $(tail -1 "$work/reason")"
  exit 77
fi
unset PYTHONPATH
VATTN_LIBRARY=$library $pip install --no-build-isolation "$source/api/python" -C build-dir="$work/build"
unset VATTN_LIBRARY
cd "$work"
"$python" -c 'import pathlib, vattn._library as l; assert pathlib.Path(l._find()).parent == pathlib.Path(l.__file__).parent'
"$python" -m unittest discover -s "$source/tests/python" -p "api_*_test.py"
