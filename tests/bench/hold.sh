#!/usr/bin/env bash
# hold.sh CONNECTIONS REPS peer...: resident memory idle and with that many open connections, each time in a fresh process.
B=$(cd "$(dirname "$0")" && pwd) ROOT=$(cd "$(dirname "$0")/../.." && pwd)
WORK=${BENCH_WORK:-$ROOT/target/bench}
C=$1 R=$2
shift 2
OUT=$WORK/results/hold-c$C.jsonl
: >"$OUT"
for _ in $(seq "$R"); do
  for p in "$@"; do
    "$B/run.sh" -m hold -n 1 -c "$C" -w 0.5 -d 0.5 -t hold1 "$p" >/dev/null
    cat "$WORK/results/hold1.jsonl" >>"$OUT"
  done
done
python3 "$B/table.py" "$OUT"
