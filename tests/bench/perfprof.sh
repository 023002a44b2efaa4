#!/usr/bin/env bash
# perfprof.sh peer[:bulk]...: where the time of a proxy goes under 16 connections: by library, then the top symbols.
# Needs perf (Debian: linux-perf). TOP (default 22) symbols; GRAPH=1 adds the callers.
B=$(cd "$(dirname "$0")" && pwd) ROOT=$(cd "$(dirname "$0")/../.." && pwd)
WORK=${BENCH_WORK:-$ROOT/target/bench}
if [ -z "${BENCH_NS:-}" ]; then exec env BENCH_NS=1 BENCH_WORK="$WORK" unshare --net -- bash "$0" "$@"; fi
echo -15 >/proc/$$/autogroup 2>/dev/null
ip link set lo up
PIDS=() CCPU=0
trap 'kill "${PIDS[@]}" 2>/dev/null; wait' EXIT
. "$B/peers/_lib.sh"
taskset -c 0 "$WORK/bin/lb" backend --http 0.0.0.0:9000 --bulk 0.0.0.0:9001 >/dev/null 2>&1 &
PIDS+=($!)
for P in "$@"; do
  MODE=load X=(-c 16)
  [[ $P == *:bulk ]] && MODE=bulk X=(-c 1)
  load_peer "${P%:bulk}"
  start_helper
  taskset -c 1 "${CMD[@]}" >/dev/null 2>&1 &
  PROXY=$!
  PIDS+=("$PROXY")
  wait_ready "$READY" || exit 1
  A=("${LOAD[@]}")
  [ $MODE = bulk ] && A=("${BULK[@]}")
  taskset -c 0 "$WORK/bin/lb" $MODE "${A[@]}" "${X[@]}" --duration 3.5 --warmup 0.5 --pid "$PROXY" >/dev/null &
  LOADING=$!
  sleep 0.7 # past the warm-up
  perf record -q -F 1999 -e cpu-clock ${GRAPH:+--call-graph dwarf,16384} -o "$WORK/run/perf.data" -p "$PROXY" -- sleep 2.5 >/dev/null 2>&1
  echo "### $P"
  perf report -q -i "$WORK/run/perf.data" --no-children -g none --sort dso --stdio 2>/dev/null | grep -v '^$' | head -4
  perf report -q -i "$WORK/run/perf.data" --no-children ${GRAPH:+-g caller,0.5,callee --max-stack 12} --sort dso,symbol --stdio 2>/dev/null |
    grep -v '^$' | cut -c1-130 | head -n "${TOP:-22}"
  wait "$LOADING"
  kill "$PROXY"
done
