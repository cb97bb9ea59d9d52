#!/usr/bin/env bash
# bench/result_tables.py --check finds a figure that is not its file's, and writing makes it right again.
#   result_tables_test.sh SOURCE
set -euo pipefail
source=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/bench"
cp "$source/README.md" "$work"
cp -r "$source/bench/results" "$source"/bench/*.md "$source/bench/result_tables.py" "$work/bench"
cd "$work"
tables() { python3 bench/result_tables.py "$@"; }
tables --check || { echo "above: found in pages that are right"; exit 1; }
row=$(grep -m1 '^| 32K x 1 |' bench/RESULTS.md)
sed -i "s/^| 32K x 1 | [0-9]*/| 32K x 1 | 1/" bench/RESULTS.md
if found=$(tables --check 2>&1) || ! grep -qF bench/RESULTS.md <<<"$found"; then
  echo "not found: a changed figure"; exit 1
fi
tables
[ "$(grep -m1 '^| 32K x 1 |' bench/RESULTS.md)" = "$row" ] || { echo "the figure was not written again"; exit 1; }
