#!/usr/bin/env bash
# Builds the API reference: C and C++ from the headers with Doxygen, Python from the docstrings with pdoc. A declaration
# without a text, or a warning, is an error. Exit 77 (skipped) where Doxygen is not installed.
#   reference.sh SOURCE OUT [PYTHON]
set -euo pipefail
source=$1 out=$2 python=${3:-}
command -v doxygen >/dev/null || { echo "skipped: doxygen is not installed"; exit 77; }
mkdir -p "$out"
cd "$source"
(cat api/Doxyfile; echo "OUTPUT_DIRECTORY = $out") | doxygen -
[ -n "$python" ] || exit 0
# Fields of a TypedDict have no source line of their own.
PYTHONPATH=api/python "$python" -W error -W "ignore:Cannot determine where" -m pdoc -o "$out/python" vattn vattn.transformers
