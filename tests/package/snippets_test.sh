#!/usr/bin/env bash
# snippets.py finds what does not compile, does not run or does not exist in a page, and passes what does.
#   snippets_test.sh BUILD SOURCE
set -euo pipefail
build=$1 source=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bad=0
# page LANGUAGE TEXT: what snippets.py says of a page with this block.
page() {
  printf '# Page\n\n```%s\n%s\n```\n' "$1" "$2" >"$work/page.md"
  python3 "$source/tests/package/snippets.py" "$build" "$source" "$work/page.md" 2>&1
}
right() { found=$(page "$@") || { echo "found in what is right: $2: $found"; bad=1; }; }
plant() {
  if found=$(page "$1" "$2"); then
    echo "not found: $2"; bad=1
  elif ! grep -qF "page.md:3: $3" <<<"$found"; then
    echo "found, but not as 'page.md:3: $3': $2: $found"; bad=1
  fi
}
program='#include <vattn.h>
int main(void) { vattn_options o; vattn_options_init(&o, sizeof(o)); return o.num_layers != 1; }'
right c "$program"
right '' 'cmake -S . -B build -DVATTN_CUDA=OFF && bash tests/run.sh  # --nothing'
plant c "${program/o;/o; int unused;}" 'does not compile'
plant c "${program/!=/==}" 'exit 1'
plant cpp '#include <vattn.hpp>
int main() { return vattn::None(); }' 'does not compile'
plant cmake 'find_package(vattn 9 REQUIRED)' ''
plant python 'import vattn
vattn.Runtime(head_dim_k=100)' 'exit 1'
plant '' 'cmake -S . -B build -DVATTN_NONE=ON' 'CMake has no option VATTN_NONE'
plant '' 'bash tests/none.sh' 'tests/none.sh does not exist'
if [ -x "$build/vattn" ]; then
  right '' 'build/vattn replay --trace T --epsilon .1'
  plant '' 'build/vattn replay --trace T --none 1' 'vattn replay has no option --none'
  plant '' 'build/vattn none' 'vattn has no command none'
fi
exit $bad
