#!/usr/bin/env bash
# Installs what is missing (for Python into build/python), builds, and runs every test: a release build with everything, then the
# library's tests (not those of the vattn program) under AddressSanitizer + UBSan, and those with threads
# under ThreadSanitizer. Where clang is to be had, the sanitizers are its own, so that both compilers see library and
# tests, and the fuzzers of tests/fuzz start from their kept corpora, ten seconds each. VATTN_QUICK=1 runs the first
# alone. VATTN_VLLM=1 also runs the tests that need vLLM (tests/vllm.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
bash tests/install_packages.sh
jobs=$(nproc)
build() { # build DIR TARGET OPTIONS...
  local dir=$1 target=$2; shift 2
  cmake -S . -B "$dir" -G Ninja "$@" >/dev/null
  cmake --build "$dir" -j "$jobs" --target "$target" -- --quiet
}
bash tests/python/install.sh "$PWD/build/python" &  # the network's time beside the compiler's
# CUDA code is compiled for the GPU of this machine. Without a GPU it is still compiled, for compute capability 9.0
# alone and hardly optimised, which takes two thirds of the time, to show that it builds. What only calls the library
# and prints is not optimised. (At -O1, GCC 12 sees overruns in std::string that are not there.)
architectures=90 cuda_flags='-Xcicc -O1 -Xptxas -O1'
nvidia-smi -L 2>/dev/null | grep -q GPU && architectures=native cuda_flags=
build build all -DVATTN_TESTS=ON -DVATTN_CUDA=AUTO -DCMAKE_CUDA_ARCHITECTURES=$architectures \
  "-DCMAKE_CUDA_FLAGS=$cuda_flags" -DVATTN_HARNESS_OPTIONS=-O0
wait
ctest --test-dir build --output-on-failure -j "$jobs"
[ "${VATTN_VLLM:-0}" = 1 ] && bash tests/vllm.sh build
[ "${VATTN_QUICK:-0}" = 1 ] && exit 0
sanitized=(-DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" -DVATTN_HARNESS_OPTIONS=-O0
  -DVATTN_BENCH=OFF -DVATTN_CUDA=OFF)
fuzzers=()
if command -v clang++ >/dev/null; then
  sanitized+=(-DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++)
  fuzzers=(calls options snapshot)
fi
build build-asan all "${sanitized[@]}" -DVATTN_SANITIZE=address,undefined -DVATTN_FUZZ=$((${#fuzzers[@]} > 0))
found=$(mktemp -d)
for fuzzer in "${fuzzers[@]}"; do
  mkdir "$found/$fuzzer"
  build-asan/tests/fuzz/fuzz_$fuzzer -max_total_time=10 -timeout=300 -verbosity=0 -print_final_stats=1 \
    -artifact_prefix="$PWD/build-asan/$fuzzer-" "$found/$fuzzer" tests/fuzz/corpus/$fuzzer
done
rm -r "$found"
ctest --test-dir build-asan --output-on-failure -j "$jobs"
build build-tsan thread_tests "${sanitized[@]}" -DVATTN_SANITIZE=thread
ctest --test-dir build-tsan --output-on-failure -j "$jobs" -L threads
