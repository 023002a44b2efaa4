#!/usr/bin/env bash
# startup.sh peer...: time from start to ready, then memory, threads and CPU of the idle process. N repetitions (default
# 5), interleaved, in a private network namespace, each time a fresh process on any CPU. What is started is started once
# before it is measured, which fills caches that are meant to be warm. Table and results/TAG.jsonl (TAG: startup).
B=$(cd "$(dirname "$0")" && pwd) ROOT=$(cd "$(dirname "$0")/../.." && pwd)
WORK=${BENCH_WORK:-$ROOT/target/bench}
if [ -z "${BENCH_NS:-}" ]; then
  [ "$(id -u)" = 0 ] && map=() || map=(--map-root-user)
  exec env BENCH_NS=1 BENCH_WORK="$WORK" unshare --net "${map[@]}" -- bash "$0" "$@"
fi
renice -n -15 -p $$ >/dev/null 2>&1
ip link set lo up
OUT=$WORK/results/${TAG:-startup}.jsonl
: >"$OUT"
PIDS=()
trap 'kill "${PIDS[@]}" 2>/dev/null; wait' EXIT
. "$B/peers/_lib.sh"
for round in $(seq 0 "${N:-5}"); do
  [ "$round" = 0 ] && to=/dev/null || to=$OUT
  for P in "$@"; do
    load_peer "$P"
    start_helper
    python3 "$B/idle.py" "$P" "$READY" "${CMD[@]}" >>"$to" || exit 1
  done
done
python3 "$B/idle.py" --table "$OUT"
