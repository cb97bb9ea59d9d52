#!/usr/bin/env bash
# Builds and runs examples/minimal.rs against the library: rust_test.sh LIBRARY SOURCE
set -euo pipefail
library=$1 source=$2
export PATH=$PATH:${HOME:-/root}/.cargo/bin
if ! command -v rustc >/dev/null; then
  echo "skipped: rustc is not installed (Debian package rustc)"
  exit 77
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
folder=$(dirname "$library")
rustc --edition 2021 -O -D warnings "$source/examples/minimal.rs" -o "$work/minimal" \
  -L "$folder" -C link-arg=-Wl,-rpath,"$folder"
"$work/minimal" | tee "$work/out"
[ "$(grep -c 'head 0 is' "$work/out")" -eq 4 ]
