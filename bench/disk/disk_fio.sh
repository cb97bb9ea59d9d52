#!/usr/bin/env bash
# Save and restore beside fio on the same file system, at equal size, block size and depth, by turns.
#   bench/disk/disk_fio.sh [DIR [SIZE_MIB [BLOCK_KIB [DEPTH [ROUNDS]]]]]     needs fio and build/vattn
# fio writes a new file past the page cache and syncs it once, as a save does, and reads it again.
set -euo pipefail
cd "$(dirname "$0")/.."
directory=${1:-.} size=${2:-1024} block=${3:-1024} depth=${4:-8} rounds=${5:-5}
file=$directory/vattn-disk-fio.$$
json=$(mktemp)
trap 'rm -f "$file" "$json"' EXIT
fio_gbps() { # fio_gbps write|read: GB/s of one pass
  fio --name=disk --filename="$file" --rw="$1" --bs="${block}k" --iodepth="$depth" --ioengine=io_uring \
    --fixedbufs=1 --registerfiles=1 --direct=1 --size="${size}m" --end_fsync=1 --randrepeat=0 --refill_buffers=1 \
    --output-format=json | python3 -c "
import json, sys
job = json.load(sys.stdin)['jobs'][0]
# The sync at the end is in the job's time, not in the rate of its writes.
print(job['$1']['io_bytes'] / 1e6 / job['job_runtime'])"
}
for ((i = 0; i < rounds; ++i)); do
  rm -f "$file"
  write=$(fio_gbps write)
  read=$(fio_gbps read)
  rm -f "$file"
  build/vattn disk --directory "$directory" --size "$size" --block "$block" --depth "$depth" --repetitions 1 \
    --json "$json" >/dev/null
  python3 - "$json" "$write" "$read" <<'PY'
import json, sys
row = json.load(open(sys.argv[1]))['rows'][0]
print(row['save_gbps']['p50'], sys.argv[2], row['restore_gbps']['p50'], sys.argv[3])
PY
done | python3 -c "
import statistics, sys
save, write, restore, read = (statistics.median(c) for c in zip(*(map(float, line.split()) for line in sys.stdin)))
print(f'{$size} MiB, blocks of $block KiB, depth $depth, medians of $rounds rounds')
print(f'save    {save:6.2f} GB/s  fio write {write:6.2f} GB/s  ratio {save / write:.2f}')
print(f'restore {restore:6.2f} GB/s  fio read  {read:6.2f} GB/s  ratio {restore / read:.2f}')"
