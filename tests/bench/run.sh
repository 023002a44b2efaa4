#!/usr/bin/env bash
# run.sh [-m load|bulk|connrate|hold] [-n reps] [-d secs] [-w warmup] [-c conns] [-r rate] [-t tag] [-D up|down] [-T transport] peer...
# Interleaved runs; BODY: bytes of an answer (default 128); the first peer that runs a proxy is the reference of the ratio columns. Own peer: see peers/_lib.sh.
# Runs in a private network namespace (only lo), so no packet can leave the machine. Proxy on CPU 1, client and backend on CPU 0.
B=$(cd "$(dirname "$0")" && pwd) ROOT=$(cd "$(dirname "$0")/../.." && pwd)
WORK=${BENCH_WORK:-$ROOT/target/bench}
if [ -z "${BENCH_NS:-}" ]; then
  [ "$(id -u)" = 0 ] && map=() || map=(--map-root-user)
  exec env BENCH_NS=1 BENCH_WORK="$WORK" unshare --net "${map[@]}" -- bash "$0" "$@"
fi
ip link set lo up
MODE=load N=5 D=3 W=1 C=16 R=0 TAG= DIR=up TR= X=()
while getopts m:n:d:w:c:r:t:D:T:X: o; do
  case $o in
    m) MODE=$OPTARG ;; n) N=$OPTARG ;; d) D=$OPTARG ;; w) W=$OPTARG ;; c) C=$OPTARG ;; r) R=$OPTARG ;;
    t) TAG=$OPTARG ;; D) DIR=$OPTARG ;; T) TR=$OPTARG ;; X) read -ra X <<<"$OPTARG" ;; *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
TAG=${TAG:-$MODE-c$C}
LB=${LB:-$WORK/bin/lb} PCPU=${PCPU-1} CCPU=${CCPU-0}
mkdir -p "$WORK/run" "$WORK/results"
ulimit -n "$(ulimit -Hn)"
sysctl -qw net.ipv4.ip_local_port_range="10240 65000" net.ipv4.tcp_tw_reuse=1 net.core.somaxconn=8192 2>/dev/null
# Children inherit the priority: other work on this machine disturbs the tails less.
if [ "${SCHED:-}" = fifo ]; then
  chrt -f -p 10 $$
else
  echo "${PRIO:--15}" >/proc/$$/autogroup 2>/dev/null
  renice -n "${PRIO:--15}" -p $$ >/dev/null 2>&1
fi
PIDS=()
trap 'kill "${PIDS[@]}" 2>/dev/null; wait' EXIT
. "$B/peers/_lib.sh"
taskset -c "${CCPU:-0-1}" "$LB" backend --http 0.0.0.0:9000 --bulk 0.0.0.0:9001 --body "${BODY:-128}" >/dev/null 2>&1 &
PIDS+=($!)
wait_ready 127.0.0.1:9000 || exit 1

declare -A PID SHARED
for P in "$@"; do
  load_peer "$P"
  [ ${#CMD[@]} -gt 0 ] || continue
  if [ -z "${SHARED[$SHARE]:-}" ]; then
    start_helper
    taskset -c "${PCPU:-0-1}" "${CMD[@]}" >"$WORK/run/$SHARE.log" 2>&1 &
    SHARED[$SHARE]=$!
    PIDS+=($!)
    wait_ready "$READY" || { tail -5 "$WORK/run/$SHARE.log" >&2; exit 1; }
  fi
  PID[$P]=${SHARED[$SHARE]}
done
sleep 0.5 # what start-up left behind is not measured
OUT=$WORK/results/$TAG.jsonl
: >"$OUT"
for _ in $(seq "$N"); do
  for P in "$@"; do
    load_peer "$P"
    A=("${LOAD[@]}")
    if [ "$MODE" = bulk ]; then
      [ ${#BULK[@]} -gt 0 ] || continue
      A=("${BULK[@]}" --dir "$DIR")
    fi
    [ -n "$TR" ] && [ "${A[1]}" = hbone ] && A[1]=$TR
    [ "$MODE" = load ] && A+=(--rate "$R")
    [ -n "${PID[$P]:-}" ] && A+=(--pid "${PID[$P]}")
    timeout $((${D%.*} + ${W%.*} + 60)) taskset -c "${CCPU:-0-1}" "$LB" "$MODE" "${A[@]}" \
      --label "$P" -c "$C" --duration "$D" --warmup "$W" "${X[@]}" >>"$OUT"
  done
done
python3 "$B/table.py" "$OUT"
