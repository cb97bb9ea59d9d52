#!/usr/bin/env bash
# Runs again what once refuted the promise, or did so where answers are hardest: small deltas on a head with few
# heavy tokens in the middle, short codes, codes calibrated on other text or none, single calls, a loop, values
# with a faint mean, isotropic inputs. Prints off / verified of the worst (layer, query head), or call, with
# one-sided 95 % bounds against delta. Exit code 1 if a lower bound lies above delta.
#
#   bench/replay/growth_refutations.sh TRACES RECORDINGS [PATTERN]
#
# TRACES holds qwen_chat20_l5kv1.safetensors, RECORDINGS what examples/record_growth.sh makes; lines whose
# recording is missing are said to be skipped. PATTERN, a regular expression, picks lines by name. VATTN is the
# program (build/vattn), THREADS its threads (1), JSON a file to keep all results in.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 2 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
traces=$1 recordings=$2 pattern=${3:-.}
vattn=${VATTN:-build/vattn}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: > "$work/lines"

# line NAME FILE ARGUMENTS...: FILE is - for hostile inputs.
line() {
  local name=$1 file=$2
  shift 2
  [[ $name =~ $pattern ]] || return 0
  if [ "$file" != - ] && [ ! -f "$file" ]; then
    printf '%-64s skipped: no %s\n' "$name" "$(basename "$file")"
    return 0
  fi
  local source=(--hostile)
  [ "$file" = - ] || source=(--trace "$file")
  "$vattn" replay --certify "${source[@]}" --threads "${THREADS:-1}" "$@" --json "$work/json" > /dev/null
  python3 - "$name" "$work/json" "$work/lines" << 'PYTHON'
import json, sys
name, path, lines = sys.argv[1:]
with open(path) as file:
    result = json.load(file)
for recording in result["coverage"]:
    for cell in recording["cells"]:
        worst = cell["suspect"]
        bad = worst["lower95"] > cell["delta"]
        verdict = ("nothing verified" if not worst["verified"] else "REFUTED" if bad
                   else "holds" if cell["worst"]["upper95"] <= cell["delta"] else "not shown")
        label = name if len(result["coverage"]) == 1 else f"{name}: {recording['recording']}"
        print(f"{label:64s} {worst['off']:6d} / {worst['verified']:6d}  "
              f"[{worst['lower95']:8.2g}, {worst['upper95']:8.2g}]  delta {cell['delta']:<7g} {verdict:16s} "
              f"{worst['head']:14s} dense {cell['dense'] / cell['answers']:6.1%}, read "
              f"{cell['selected_share'] or 0:6.2%}", flush=True)
        with open(lines, "a") as file:
            # What was run, without the file that only this script reads
            command = result["command"].split(" --json ")[0]
            file.write(json.dumps({"line": label, "command": command, "bad": bad, **cell,
                                   "environment": result["environment"]}) + "\n")
PYTHON
}

chat=$traces/qwen_chat20_l5kv1.safetensors
code=$traces/code16.safetensors
turns=$recordings/qwen_turns16k.safetensors
gemma=$recordings/gemma_turns18k.safetensors
smol=$recordings/smol_turns7k.safetensors
fresh=(--trials fresh --epsilon 0.1)

for delta in 0.1 0.01 0.001 0.0001 0.000001; do
  line "B1 chat, layer 5, delta $delta" "$chat" "${fresh[@]}" --delta $delta --seeds 24
done
for epsilon in 0.5 0.2; do
  line "B1 chat, norm output, epsilon $epsilon, delta 0.01" "$chat" --trials fresh --norm output --epsilon $epsilon \
    --delta 0.01 --seeds 12
done
# The end of the recordings of changing text: the queries before it are of its last kind.
for delta in 0.1 0.01 0.001; do
  line "B1 five turns of Qwen, delta $delta" "$turns" "${fresh[@]}" --delta $delta --prompt-tokens 16256 \
    --queries 512 --steps 120 --seeds 12
  line "B1 five turns of SmolLM2, delta $delta" "$smol" "${fresh[@]}" --delta $delta --prompt-tokens 7552 \
    --queries 512 --steps 120 --seeds 12
  line "B1 code, delta $delta" "$code" "${fresh[@]}" --delta $delta --seeds 12
done
line "B2 chat, 16 bytes, delta 0.1" "$chat" "${fresh[@]}" --delta 0.1 --index-bytes 16 --seeds 24
line "B2 Gemma, 16 bytes, no queries" "$gemma" "${fresh[@]}" --delta 0.1 --index-bytes 16 --calibration identity \
  --prompt-tokens 18304 --steps 120 --seeds 12
line "B2 Gemma, 16 bytes, queries of the German text" "$gemma" "${fresh[@]}" --delta 0.1 --index-bytes 16 \
  --prompt-tokens 18304 --queries 512 --queries-end 5400 --steps 120 --seeds 12
line "B2 Gemma, 16 bytes, queries of its own" "$gemma" "${fresh[@]}" --delta 0.1 --index-bytes 16 \
  --prompt-tokens 18304 --queries 512 --steps 120 --seeds 12
for delta in 0.1 0.05 0.01; do
  line "B2 Gemma, 32 bytes, no queries, delta $delta" "$gemma" "${fresh[@]}" --delta $delta --index-bytes 32 \
    --calibration identity --prompt-tokens 18304 --steps 120 --seeds 12
done
line "B3 single calls of the chat" "$chat" --trials call --epsilon 0.1 --delta 0.1 --seeds 200
line "B3 single calls of five turns of Qwen" "$turns" --trials call --epsilon 0.1 --delta 0.1 \
  --prompt-tokens 16256 --queries 512 --steps 120 --seeds 60
for refresh in 1 64; do
  trials=kept
  [ $refresh = 64 ] || trials=fresh
  line "B4 a loop: step 107 of the chat 200 times, refresh $refresh" "$chat" --trials $trials --epsilon 0.1 \
    --delta 0.1 --refresh $refresh --repeat-step 107 --seeds 40
  line "B4 a loop: five turns of Qwen, refresh $refresh" "$turns" --trials $trials --epsilon 0.1 --delta 0.1 \
    --refresh $refresh --prompt-tokens 16256 --queries 512 --repeat-step 12 --seeds 20
done
line "B5 values with a faint mean, norm output, epsilon 1" - --inputs "values of mean" --trials fresh --norm output \
  --epsilon 1 --delta 0.1 --index-bytes 32 --steps 64 --seeds 16
for bytes in 16 32 48 64; do
  for delta in 0.1 0.01 0.001; do
    line "isotropic, $bytes bytes, delta $delta" - --inputs isotropic "${fresh[@]}" --delta $delta \
      --index-bytes $bytes --steps 128 --seeds 24
  done
done

python3 - "$work/lines" "${JSON:-}" << 'PYTHON'
import json, sys
lines = [json.loads(text) for text in open(sys.argv[1])]
environments = [line.pop("environment") for line in lines]
if sys.argv[2]:
    with open(sys.argv[2], "w") as file:
        file.write('{"environment": ' + json.dumps(environments[-1] if lines else {}) + ',\n"lines": [\n'
                   + ",\n".join(json.dumps(line) for line in lines) + "\n]}\n")
bad = sum(line["bad"] for line in lines)
print(f"\n{bad} of {len(lines)} lines refuted")
sys.exit(bad > 0)
PYTHON
