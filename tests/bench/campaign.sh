#!/usr/bin/env bash
# campaign.sh: a whole set of measurements beyond `make bench`; each step writes results/TAG.jsonl and results/TAG.md.
# ONLY="tag tag" runs just those; N repetitions (default 5). Peers named zt-* join in if ZT names an Istio ztunnel.
B=$(cd "$(dirname "$0")" && pwd) ROOT=$(cd "$(dirname "$0")/../.." && pwd)
export BENCH_WORK=${BENCH_WORK:-$ROOT/target/bench}
N=${N:-5}
step() {
  local tag=$1
  shift
  [ -n "${ONLY:-}" ] && [[ " $ONLY " != *" $tag "* ]] && return
  date +"%T $tag start load=$(cut -d' ' -f1 /proc/loadavg)"
  "$B/run.sh" -t "$tag" "$@" >"$BENCH_WORK/results/$tag.md" 2>&1
  date +"%T $tag end"
}
L4=(direct envoy-tcp envoy-hbone-l4 cairn-ztunnel)
[ -z "${ZT:-}" ] || L4+=(zt-tcp zt-in zt-both)
L7=(envoy-l7 envoy-l7-auth envoy-waypoint envoy-waypoint-rbac envoy-waypoint-auth cairn-waypoint cairn-waypoint-log)
WASM=(envoy-waypoint-rbac envoy-waypoint-rbac-hdr1 cairn-waypoint cairn-waypoint-hdr1 cairn-waypoint-tag1
  envoy-l7 envoy-l7-noop1 envoy-l7-noop3 envoy-l7-hdr1 envoy-l7-hdr3)
step load-c16 -m load -n "$N" -d 2.5 -w 0.5 -c 16 "${L4[@]}" "${L7[@]}" envoy-l7-rbac envoy-l7-jwtcache envoy-waypoint-jwtcache
step wasm-c16 -m load -n "$N" -d 2.5 -w 0.5 -c 16 "${WASM[@]}"
step bulk-up-c1 -m bulk -n "$N" -d 2.5 -w 0.5 -c 1 -D up "${L4[@]}"
step bulk-down-c1 -m bulk -n "$N" -d 2.5 -w 0.5 -c 1 -D down "${L4[@]}"
step load-c1 -m load -n "$N" -d 2 -w 0.5 -c 1 "${L4[@]}" "${L7[@]}"
step load-c64 -m load -n "$N" -d 2 -w 0.5 -c 64 "${L4[@]}" "${L7[@]}"
step rate2000-c16 -m load -n "$N" -d 2.5 -w 0.5 -c 16 -r 2000 "${L4[@]}" "${L7[@]}"
step connrate-c8 -m connrate -n "$N" -d 2 -w 0.5 -c 8 "${L4[@]}"
step connfull-c8 -m connrate -T hbone-full -n "$N" -d 2 -w 0.5 -c 8 envoy-hbone-l4 cairn-ztunnel
step bulk-up-c8 -m bulk -n "$N" -d 2 -w 0.5 -c 8 -D up "${L4[@]}"
