#!/usr/bin/env bash
# A question about a file of some 30,000 tokens, answered by llama.cpp with vattn's attention. From nothing:
#
#   bash examples/llama_cpp.sh build                              # llama.cpp from PyPI's source archive, and the backend
#   bash examples/llama_cpp.sh ask MODEL.gguf FILE "QUESTION"     # GGML_VATTN=0 in front: llama.cpp alone
#
# VATTN_LLAMA_CPP_HOME is where it is built, by default ~/.cache/vattn-llama.cpp. Needs cmake, ninja, a C++20 compiler and
# the packages that vattn is built with (tests/install_packages.sh), and Python with pip.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
home=${VATTN_LLAMA_CPP_HOME:-$HOME/.cache/vattn-llama.cpp}
version=0.3.36  # of llama-cpp-python, whose archive has the llama.cpp that this was written for
tree=$home/llama_cpp_python-$version/vendor/llama.cpp

build() {
  mkdir -p "$home"
  if [ ! -d "$tree" ]; then
    python3 -m venv "$home/venv"
    "$home/venv/bin/pip" -q install scikit-build-core
    "$home/venv/bin/pip" -q download --no-deps --no-binary :all: --no-build-isolation -d "$home" "llama-cpp-python==$version"
    tar -xzf "$home/llama_cpp_python-$version.tar.gz" -C "$home"
  fi
  cmake -S "$tree" -B "$home/llama" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_BACKEND_DL=ON \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
  cmake --build "$home/llama" --target llama-completion llama-bench llama-perplexity ggml-cpu
  cmake -S "$top" -B "$home/vattn" -G Ninja -DVATTN_CUDA=OFF -DVATTN_TESTS=OFF -DVATTN_BENCH=OFF -DVATTN_LLAMA_CPP="$tree"
  cmake --build "$home/vattn" --target ggml_vattn
}

ask() {
  local model=$1 file=$2 question=$3 prompt
  prompt=$(mktemp)
  trap 'rm -f "$prompt"' EXIT
  { printf '<|im_start|>user\n'; cat "$file"; printf '\n\n%s<|im_end|>\n<|im_start|>assistant\n' "$question"; } > "$prompt"
  GGML_BACKEND_PATH=$home/vattn/libggml-vattn.so GGML_VATTN=${GGML_VATTN:-1} GGML_VATTN_STATS=${GGML_VATTN_STATS:-1} \
    "$home/llama/bin/llama-completion" -m "$model" -f "$prompt" -c "${CONTEXT:-32768}" -n "${TOKENS:-200}" -no-cnv \
    --no-display-prompt --temp 0 -fa on
}

case ${1:-} in
  build) build ;;
  ask) [ $# = 4 ] || { sed -n 2,8p "$0"; exit 1; }; ask "$2" "$3" "$4" ;;
  *) sed -n 2,8p "$0"; exit 1 ;;
esac
