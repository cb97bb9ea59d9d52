#!/usr/bin/env bash
# The vattn program as people use it: outputs that are inputs, lost output, wrong lists, a stop in the middle.
#   program_test.sh PROGRAM RECORDING
set -u
vattn=$1 recording=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
bad=0
fail() { echo "FAILED: $*"; bad=1; }
# expect CODE TEXT COMMAND...: the exit code, and what stderr has to say.
expect() {
  local code=$1 text=$2; shift 2
  "$@" >"$work/out" 2>"$work/err"
  local got=$?
  [ $got = "$code" ] || fail "exit code $got, must be $code: ${*//$work\//}: $(head -c 300 "$work/err")"
  grep -qF -- "$text" "$work/err" || fail "stderr does not say \"$text\": ${*//$work\//}: $(head -c 300 "$work/err")"
}

# No command overwrites what it reads, under any name of it.
mkdir folder
cp "$recording" trace
ln -s trace link && ln trace hard
cp "$recording" profile
for name in trace link hard ./trace folder/../trace "$work/trace"; do
  for command in "calibrate --trace trace --out $name" "calibrate --trace trace --out p --json $name" \
    "replay --trace trace --seeds 1 --steps 1 --json $name" "replay --trace link --seeds 1 --steps 1 --plot $name" \
    "replay --trace trace --certify --json $name" "compare --trace trace --json $name" \
    "growth --trace trace --json $name" "zoo --trace trace --json $name" "tails --trace trace --json $name" \
    "step --trace trace --json $name" "disk --trace trace --json $name"; do
    expect 2 "which would be overwritten" "$vattn" $command
  done
done
expect 2 "is the file of --profile" "$vattn" replay --trace trace --calibration profile --profile profile --json profile
expect 2 "is the file of --sign-maps" "$vattn" zoo --trace trace --sign-maps profile --json ./profile
cmp -s trace "$recording" && cmp -s profile "$recording" || fail "a recording was changed"
expect 2 "is also the file of" "$vattn" replay --trace trace --json new --plot ./new
[ ! -e new ] || fail "a file was left by a command that was refused"

# What cannot be written is said before the work: nothing is printed.
for command in "doctor" "replay --trace trace" "growth --trace trace" "step --tokens 1024 --steps 1" "disk --size 1"; do
  for target in no/such folder; do
    expect 1 "cannot write $target" "$vattn" $command --json $target
    [ ! -s out ] || fail "printed before the target was tried: $command"
  done
  expect 2 "the path is empty" "$vattn" $command --json ""
done
expect 1 "cannot make a folder in no/such" "$vattn" disk --size 1 --directory no/such

# Lost output is a failure, whoever printed it; a file of results is not where it goes instead.
if [ -e /dev/full ]; then
  for command in doctor --help --version "step --help" "calibrate --trace trace --out p"; do
    "$vattn" $command >/dev/full 2>err && fail "exit code 0 with a full standard output: $command"
    grep -q "standard output" err || fail "no word of a full standard output: $command"
  done
  expect 1 "cannot write /dev/full" "$vattn" doctor --json /dev/full
fi
for command in "doctor --json j" --help; do
  "$vattn" $command >&- 2>err && fail "exit code 0 without a standard output: $command"
  grep -q "standard output" err || fail "no word of a closed standard output: $command"
done
"$vattn" doctor --json j <&- >out 2>&- || fail "needs more than a standard output"
head -c 1 j | grep -q '{' || fail "the file of results has something else before them"

# Lists and numbers: refused by name, with what would be right.
expect 2 '--layers: "" has an entry that is empty' "$vattn" replay --trace trace --layers ""
expect 2 '--layers: "0,,1" has an entry that is empty' "$vattn" replay --trace trace --layers 0,,1
expect 2 "--layers: 0 is given twice" "$vattn" replay --trace trace --layers 0,0
expect 2 "--layers: \"x\" is no whole number from 0 to" "$vattn" replay --trace trace --layers x
expect 2 "counted from 0" "$vattn" replay --trace trace --layers 99
expect 2 '--tokens: "4096,,1" has an entry that is empty' "$vattn" step --tokens 4096,,1
expect 2 '--tokens: "4096," has an entry that is empty' "$vattn" step --tokens 4096,
expect 2 '--tokens: "-5" is no whole number from 1 to' "$vattn" step --tokens=-5
expect 2 '--batch: "0" is no whole number from 1 to' "$vattn" step --batch 0
expect 2 '--depth: "" has an entry that is empty' "$vattn" disk --depth ""
expect 2 '--block: 64 is given twice' "$vattn" disk --block 64,64
for seed in -1 0x10 010 1.5 18446744073709551616; do
  expect 2 "is no whole number from 0 to 18446744073709551615" "$vattn" replay --trace trace "--seed=$seed"
done
expect 2 '"-1" is no whole number from 0 to 4096' "$vattn" step --threads=-1
expect 2 "--only: other is none of exact, balanced-32" "$vattn" zoo --trace trace --only other
expect 2 "--only: \"\" has an entry that is empty" "$vattn" zoo --trace trace --only ""
expect 2 "--tokens: 99999999, must be from 17 to the recording's" "$vattn" growth --trace trace --tokens 99999999
"$vattn" calibrate --trace trace --out p --layers 0 >/dev/null 2>err || fail "a right list is refused: $(cat err)"

# Without --tokens: the lengths that the recording has.
"$vattn" growth --trace trace --verified-only --steps 1 --layers 0 >out 2>err || fail "growth: $(cat err)"
grep -q "^| exponent" out || fail "growth has no last line"

# A stop in the middle leaves nothing.
mkdir disk
for signal in TERM HUP; do  # what a shell starts in the background ignores INT
  "$vattn" disk --directory disk --size 4 --repetitions 1000 --json after >/dev/null 2>&1 &
  pid=$!
  for _ in $(seq 200); do ls -A disk | grep -q . && break; sleep .05; done
  ls -A disk | grep -q . || fail "disk made nothing to leave behind"
  kill -$signal $pid
  wait $pid && fail "disk ended well though it was stopped by $signal"
  [ -z "$(ls -A disk)" ] || fail "disk left after $signal: $(ls -A disk)"
done
[ ! -e after ] || fail "a stopped command left an empty file of results"
touch disk/vattn-disk-sequence
"$vattn" disk --directory disk --trace trace >/dev/null 2>err || fail "disk --trace: $(cat err)"
[ "$(ls -A disk)" = vattn-disk-sequence ] && [ ! -s disk/vattn-disk-sequence ] || fail "disk touched a file that is not its own"
exit $bad
