#!/usr/bin/env bash
# Installs what is missing (for Python into build/python), builds, and runs every test: a release build with everything, then the
# library's tests (not those of the vattn program) under AddressSanitizer + UBSan, and those with threads
# under ThreadSanitizer. VATTN_QUICK=1 runs the first alone.
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
build build all -DVATTN_TESTS=ON
wait
ctest --test-dir build --output-on-failure -j "$jobs"
[ "${VATTN_QUICK:-0}" = 1 ] && exit 0
build build-asan all -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
  -DVATTN_BENCH=OFF -DVATTN_CUDA=OFF -DVATTN_SANITIZE=address,undefined
ctest --test-dir build-asan --output-on-failure -j "$jobs"
build build-tsan thread_tests -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
  -DVATTN_BENCH=OFF -DVATTN_CUDA=OFF -DVATTN_SANITIZE=thread
ctest --test-dir build-tsan --output-on-failure -j "$jobs" -L threads
