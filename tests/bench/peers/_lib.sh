# What peer files share. A peer file sets
#   CMD    how to start the proxy (empty: nothing to start)
#   READY  when it is ready: `ip:port` that accepts, or `http://ip:port/path` that answers 200
#   LOAD   arguments of the load client: transport, target, authority, headers
#   BULK   the same for `-m bulk` (empty: not supported)
#   SHARE  a name, if several peers are one process
#   HELPER a command to be started first, once for all peers that name it, off the proxy's CPU and not measured, and
#   HELPER_READY  when that is ready
# PEER_DIRS (colon-separated) is searched before this folder: keep your own program's peer files in your own tree.
ENVOY=${ENVOY:-$ROOT/target/peers/envoy}
CAIRN_BIN=${CAIRN_BIN:-$ROOT/target/release}
export LB_CERT=$WORK/conf/client.pem LB_KEY=$WORK/conf/client.key
JWT="Authorization: Bearer $(cat "$WORK/conf/jwt.txt")"

peer_file() {
  local d
  IFS=: read -ra dirs <<<"${PEER_DIRS:-}"
  for d in "${dirs[@]}" "$B/peers"; do [ -f "$d/$1.sh" ] && { echo "$d/$1.sh"; return; }; done
  echo "no peer $1" >&2
  exit 2
}

load_peer() { # load_peer NAME: sets the variables above
  CMD=() BULK=() HELPER=() SHARE=$1 READY='' HELPER_READY=''
  local file
  file=$(peer_file "$1") || exit 2
  . "$file"
}

is_ready() { # is_ready ip:port | http://ip:port/path
  local at=${1#http://} path
  path=/${at#*/} at=${at%%/*}
  if [ "$at" = "$1" ]; then
    (exec 3<>"/dev/tcp/${at%:*}/${at#*:}") 2>/dev/null
  else
    (exec 3<>"/dev/tcp/${at%:*}/${at#*:}" && printf 'GET %s HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n' "$path" >&3 &&
      head -1 <&3 | grep -q ' 200 ') 2>/dev/null
  fi
}

wait_ready() { # polls for ten seconds
  local i
  for i in $(seq 400); do is_ready "$1" && return 0; sleep 0.025; done
  echo "not ready: $1" >&2
  return 1
}

declare -A HELPERS
start_helper() { # starts $HELPER unless it runs; appends to PIDS
  [ ${#HELPER[@]} -gt 0 ] || return 0
  local key="${HELPER[*]}"
  [ -z "${HELPERS[$key]:-}" ] || return 0
  taskset -c "${CCPU:-0-1}" "${HELPER[@]}" >"$WORK/run/helper-${HELPER[0]##*/}.log" 2>&1 &
  HELPERS[$key]=$!
  PIDS+=($!)
  wait_ready "$HELPER_READY" || { tail -5 "$WORK/run/helper-${HELPER[0]##*/}.log" >&2; exit 1; }
}

envoy_peer() { # envoy_peer NAME PORT direct|hbone [BULK-PORT]
  CMD=("$ENVOY" -c "$WORK/conf/$1.yaml" --concurrency "${ENVOY_CONC:-1}" --disable-hot-restart -l warn)
  READY=127.0.0.1:$2
  LOAD=(--transport "$3" --target "127.0.0.1:$2" -H "$JWT")
  [ -z "${4:-}" ] || BULK=(--transport "$3" --target "127.0.0.1:$4" --authority 127.0.0.1:9001)
}

zt_peer() { # zt_peer TRANSPORT TARGET DESTINATION-IP: an Istio ztunnel that has its certificates from our control plane
  cairn_mesh
  local home=$WORK/run/zt
  mkdir -p "$home/var/run/secrets/tokens"
  ln -sf "$WORK/cairn/tokens/ztunnel.token" "$home/var/run/secrets/tokens/istio-token"
  CMD=(env -C "$home" CA_ADDRESS=https://127.0.0.1:15012 CA_ROOT_CA="$WORK/cairn/root.pem" XDS_ADDRESS= LOCAL_XDS_PATH="$B/ztunnel.yaml"
    PROXY_MODE=dedicated PROXY_WORKLOAD_INFO=default/local/default NODE_NAME=local UNSTABLE_ENABLE_SOCKS5=true
    ZTUNNEL_WORKER_THREADS="${ZT_WORKERS:-1}" RUST_LOG="${ZT_LOG:-warn}" "${ZT:?set ZT to the path of a ztunnel binary}")
  SHARE=ztunnel READY=127.0.0.1:15080
  LOAD=(--transport "$1" --target "$2" --authority "$3:9000" -H "$JWT")
  BULK=(--transport "$1" --target "$2" --authority "$3:9001")
}

# The mesh of our own proxies: manifests written by gen_cairn.py, addresses as written, the CA that signed the load
# client's certificate.
cairn_mesh() {
  HELPER=("$CAIRN_BIN/cairn" xds "$WORK/conf/cairn" --state "$WORK/cairn" --listen 127.0.0.1:15012
    --ca-cert "$WORK/conf/ca.pem" --ca-key "$WORK/conf/ca.key" --mint ztunnel=ztunnel:node)
  local name
  for name in $(cat "$WORK/conf/waypoints"); do HELPER+=(--mint "$name=waypoint:default/$name"); done
  HELPER_READY=127.0.0.1:15012
  COMMON=(--xds-address https://127.0.0.1:15012 --xds-root "$WORK/cairn/root.pem" --workers "${CAIRN_WORKERS:-1}")
}

cairn_waypoint() { # cairn_waypoint NAME POD-IP SERVICE-IP ACCESS-LOG
  cairn_mesh
  CMD=("$CAIRN_BIN/waypoint" "${COMMON[@]}" --token "$WORK/cairn/tokens/$1.token" --gateway "default/$1"
    --address "$2" --access-log "$4" --log "${CAIRN_LOG:-warn}")
  READY=http://$2:15021/healthz/ready
  LOAD=(--transport hbone --target "$2:15008" --authority "$3:9000" -H "$JWT")
}

# The same with a directory for modules and their code: `cold`, emptied before each start, or `warm`, kept.
cairn_waypoint_kept() { # cairn_waypoint_kept NAME POD-IP SERVICE-IP cold|warm
  cairn_waypoint "$1" "$2" "$3" false
  local directory=$WORK/run/$4-$1 emptied=
  [ "$4" = warm ] || emptied=$directory
  CMD=(sh -c 'rm -rf "$0"; exec "$@"' "$emptied" "${CMD[@]}" --state-directory "$directory" --plugin-wait-seconds 120)
}

cairn_ztunnel() { # HBONE in, TCP out, for the pod at 127.0.0.3
  cairn_mesh
  CMD=("$CAIRN_BIN/ztunnel" "${COMMON[@]}" --token "$WORK/cairn/tokens/ztunnel.token" --node node
    --address 127.0.0.3 --twin-addresses false --access-log false --log "${CAIRN_LOG:-warn}")
  READY=http://127.0.0.3:15021/healthz/ready
  LOAD=(--transport hbone --target 127.0.0.3:15008 --authority 127.0.0.3:9000 -H "$JWT")
  BULK=(--transport hbone --target 127.0.0.3:15008 --authority 127.0.0.3:9001)
}
