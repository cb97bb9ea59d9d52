#!/usr/bin/env bash
# Builds the API reference: C and C++ from the headers with Doxygen, Python from the docstrings with pdoc. A declaration
# without a text, or a warning, is an error. Exit 77 (skipped) where Doxygen, or a Python with pdoc, is not installed.
#   reference.sh SOURCE OUT BUILD LIBRARY      BUILD/python and VATTN_TEST_PYTHON are looked at for pdoc
set -euo pipefail
source=$1 out=$2 build=$3 library=$4
command -v doxygen >/dev/null || { echo "skipped: doxygen is not installed"; exit 77; }
mkdir -p "$out"
cd "$source"
(cat api/Doxyfile; echo "OUTPUT_DIRECTORY = $out") | doxygen -
for python in "${VATTN_TEST_PYTHON:-}" "$build/python/bin/python" python3; do
  [ -n "$python" ] && "$python" -c 'import pdoc, torch, transformers' 2>/dev/null || continue
  # Fields of a TypedDict have no source line of their own.
  VATTN_LIBRARY=$library PYTHONPATH=api/python PYTHONDONTWRITEBYTECODE=1 "$python" -W error::UserWarning \
    -W "ignore:Cannot determine where" -m pdoc -o "$out/python" vattn vattn.transformers vattn.vllm
  exit 0
done
echo "skipped after Doxygen's part: no Python here has pdoc, torch and transformers"
exit 77
