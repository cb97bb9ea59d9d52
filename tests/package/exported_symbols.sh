#!/usr/bin/env bash
# The library exports what vattn.h declares and nothing else.
#   exported_symbols.sh LIBRARY HEADER
set -euo pipefail
declared=$(tr '\n' ' ' <"$2" | grep -oE 'VATTN_EXPORT [^;(]*\(' | grep -oE 'vattn_[a-z_]+ *\($' | tr -d ' (' | sort)
exported=$(nm -D --defined-only "$1" | awk '$2 != "A" { print $3 }' | sed 's/@.*//' | sort)
[ -n "$declared" ] || { echo "no declarations found in $2"; exit 1; }
diff <(echo "$declared") <(echo "$exported") || { echo "above: < declared only, > exported only"; exit 1; }
