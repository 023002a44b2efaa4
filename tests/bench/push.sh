#!/usr/bin/env bash
# push.sh [-n reps] [-w workloads] [-d secs] [-r rate] [peer]: what a steady client and the workers notice of so many workloads
# that are pushed at once (default: 3 × 70,000, 20 s, 500 requests/s, cairn-ztunnel). Run `setup` and build with --release first.
#
# Each repetition measures the same without a push and with one, in a fresh process each time: the client's percentiles, and in
# a run of its own, for the probe keeps workers busy, the longest turn of each worker: how long whatever is ready waits for the
# rest at most. A turn holds all that was ready, so it bounds a single poll from above; what the worker itself waited for a
# processor is not in it. The last lines give medians and ratios.
B=$(cd "$(dirname "$0")" && pwd) ROOT=$(cd "$(dirname "$0")/../.." && pwd)
WORK=${BENCH_WORK:-$ROOT/target/bench}
if [ -z "${BENCH_NS:-}" ]; then
  [ "$(id -u)" = 0 ] && map=() || map=(--map-root-user)
  exec env BENCH_NS=1 BENCH_WORK="$WORK" unshare --net "${map[@]}" -- bash "$0" "$@"
fi
ip link set lo up
N=3 COUNT=70000 D=20 R=500
while getopts n:w:d:r: o; do
  case $o in n) N=$OPTARG ;; w) COUNT=$OPTARG ;; d) D=$OPTARG ;; r) R=$OPTARG ;; *) exit 2 ;; esac
done
shift $((OPTIND - 1))
P=${1:-cairn-ztunnel}
LB=${LB:-$WORK/bin/lb} PCPU=${PCPU-1} CCPU=${CCPU-0}
mkdir -p "$WORK/run" "$WORK/results"
ulimit -n "$(ulimit -Hn)"
. "$B/peers/_lib.sh"
OUT=$WORK/results/push.jsonl
: >"$OUT"
PIDS=()
end() { [ ${#PIDS[@]} = 0 ] || { kill "${PIDS[@]}" && wait "${PIDS[@]}"; } 2>/dev/null; PIDS=() HELPERS=(); }
trap 'end; rm -rf "$WORK/conf/cairn-push"' EXIT

# One manifest of all of them, moved into place at once: pods of the mesh on other nodes.
python3 - "$COUNT" "$WORK/run/pushed.yaml" <<'END'
import sys
count, path = int(sys.argv[1]), sys.argv[2]
with open(path, "w") as out:
    for i in range(count):
        ip = f"10.{i // 62500}.{i // 250 % 250}.{i % 250 + 1}"
        out.write(f"---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: p{i}, namespace: default, labels: {{ istio.io/dataplane-mode: ambient }} }}\n"
                  f"spec: {{ nodeName: n{i // 100}, containers: [{{ name: a, image: a }}] }}\nstatus: {{ podIP: {ip} }}\n")
END

ask() { # ask PATH: the body of an answer of the admin port
  exec 3<>/dev/tcp/127.0.0.3/15000 &&
    printf 'GET %s HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n' "$1" >&3 && sed '1,/^\r$/d' <&3
}

once() { # once quiet|push
  rm -rf "$WORK/conf/cairn-push" && cp -r "$WORK/conf/cairn" "$WORK/conf/cairn-push"
  taskset -c "$CCPU" "$LB" backend --http 0.0.0.0:9000 --bulk 0.0.0.0:9001 >/dev/null 2>&1 &
  PIDS+=($!)
  load_peer "$P"
  HELPER=("${HELPER[@]/#$WORK\/conf\/cairn/$WORK/conf/cairn-push}")
  start_helper && wait_ready 127.0.0.1:9000 || exit 1
  taskset -c "$PCPU" "${CMD[@]}" >"$WORK/run/push.log" 2>&1 &
  local pid=$!
  PIDS+=("$pid")
  wait_ready "$READY" || { tail -5 "$WORK/run/push.log" >&2; exit 1; }
  sleep 0.5
  taskset -c "$CCPU" "$LB" load "${LOAD[@]}" --label "$1" -c 16 --rate "$R" --duration "$D" --warmup 1 --pid "$pid" >"$WORK/run/load.json" &
  local load=$!
  sleep 1.5
  [ "$1" = quiet ] || mv "$WORK/run/pushed.yaml" "$WORK/conf/cairn-push/pushed.yaml"
  wait "$load"
  local known
  known=$(ask /config_dump | grep -o '"serviceAccount"' | wc -l)
  python3 -c 'import json,sys; j=json.load(open(sys.argv[1])); j["workloads"]=int(sys.argv[2]); print(json.dumps(j))' \
    "$WORK/run/load.json" "$known" >>"$OUT"
  [ "$1" = quiet ] || mv "$WORK/conf/cairn-push/pushed.yaml" "$WORK/run/pushed.yaml"
  end
}

turns() { # The longest turns of the workers while everything is pushed, without a client.
  rm -rf "$WORK/conf/cairn-push" && cp -r "$WORK/conf/cairn" "$WORK/conf/cairn-push"
  load_peer "$P"
  HELPER=("${HELPER[@]/#$WORK\/conf\/cairn/$WORK/conf/cairn-push}")
  start_helper || exit 1
  "${CMD[@]}" >"$WORK/run/push.log" 2>&1 &
  PIDS+=($!)
  wait_ready "$READY" || { tail -5 "$WORK/run/push.log" >&2; exit 1; }
  [ "$1" = quiet ] || mv "$WORK/run/pushed.yaml" "$WORK/conf/cairn-push/pushed.yaml"
  echo "{\"label\": \"turns-$1\", \"longest_us\": $(ask "/turns?milliseconds=$((D * 1000))")}" >>"$OUT"
  [ "$1" = quiet ] || mv "$WORK/conf/cairn-push/pushed.yaml" "$WORK/run/pushed.yaml"
  end
}

for _ in $(seq "$N"); do
  for kind in quiet push; do once "$kind"; turns "$kind"; done
done
cat "$OUT"
python3 - "$OUT" "$COUNT" <<'END'
import json, statistics, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
of = lambda label, key: [row[key] for row in rows if row.get("label") == label]
errors = sum(row.get("errors", 0) + row.get("non2xx", 0) for row in rows)
missed = [row for row in rows if row["label"] == "push" and row["workloads"] < int(sys.argv[2])]
for key in ("p50_us", "p99_us", "p999_us", "max_us"):
    quiet, push = (statistics.median(of(label, key)) for label in ("quiet", "push"))
    print(f"{key}: quiet {quiet:.0f}, push {push:.0f}, ratio {push / quiet:.2f}")
for label in ("turns-quiet", "turns-push"):
    print(f"{label}: longest {max(max(turns) for turns in of(label, 'longest_us')):.0f} us")
print(f"errors: {errors}; runs that ended before all workloads were known: {len(missed)}")
sys.exit(bool(errors or missed))
END
