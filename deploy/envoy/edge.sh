#!/usr/bin/env bash
# Runs Envoy as the edge: writes its files with what the environment says, starts it, ends it gracefully.
#
#   edge.sh run      until SIGTERM or SIGINT, then: not ready, connections are told to move on, running calls end, exit
#   edge.sh render   only writes the files, and says where
#   edge.sh check    writes them and has Envoy read them
#
# Needs bash, sed and envoy: what the image envoyproxy/envoy has.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

ENVOY="${ENVOY:-envoy}"                             # the binary
EDGE_VISION="${EDGE_VISION:-vision:2001}"           # vision servers: host:port, several with commas; each address of a name counts
EDGE_QUEUE="${EDGE_QUEUE:-queue:2003}"              # queue servers, the same way
EDGE_HOST="${EDGE_HOST:-0.0.0.0}"                   # where to listen
EDGE_VISION_PORT="${EDGE_VISION_PORT:-2001}"        # TLS
EDGE_QUEUE_PORT="${EDGE_QUEUE_PORT:-2003}"          # TLS
EDGE_INSIDE_PORT="${EDGE_INSIDE_PORT:-9902}"        # plain: /ready and /metrics; not to be published
EDGE_ADMIN_PORT="${EDGE_ADMIN_PORT:-9901}"          # on 127.0.0.1 alone
EDGE_TLS_DIR="${EDGE_TLS_DIR:-/etc/envoy/tls}"      # tls.crt (the chain) and tls.key; clients.crt, if there: the authorities whose callers alone may call
EDGE_MAX_HEAP_BYTES="${EDGE_MAX_HEAP_BYTES:-1073741824}"  # below the container's limit; calls are given up at 95 % of it
EDGE_MAX_CONNECTIONS="${EDGE_MAX_CONNECTIONS:-8192}"
EDGE_UNREADY_SECONDS="${EDGE_UNREADY_SECONDS:-5}"   # after SIGTERM: /ready says 503 so long before callers are told to move on
EDGE_DRAIN_SECONDS="${EDGE_DRAIN_SECONDS:-60}"      # what running calls may take then, new ones are still taken; a Python client's watch of its server's health counts as one
EDGE_LOG_LEVEL="${EDGE_LOG_LEVEL:-warning}"
EDGE_THREADS="${EDGE_THREADS:-0}"                   # 0: one for each core
EDGE_RUN_DIR="${EDGE_RUN_DIR:-${TMPDIR:-/tmp}/ai4thai-edge}"  # where the files are written

servers() { # host:port,host:port → Envoy's endpoints
  local one list=() IFS=,
  for one in $1; do
    [[ "$one" =~ ^[A-Za-z0-9._-]+:[0-9]+$ ]] || { echo "edge.sh: '$one' is not host:port" >&2; exit 2; }
    list+=("{endpoint: {address: {socket_address: {address: \"${one%:*}\", port_value: ${one##*:}}}}}")
  done
  [ ${#list[@]} -gt 0 ] || { echo "edge.sh: no server is named" >&2; exit 2; }
  echo "[${list[*]}]"
}

render() {
  local vision queue name rules=() signed=false
  vision="$(servers "$EDGE_VISION")" || exit
  queue="$(servers "$EDGE_QUEUE")" || exit
  for name in EDGE_HOST EDGE_VISION_PORT EDGE_QUEUE_PORT EDGE_INSIDE_PORT EDGE_ADMIN_PORT EDGE_MAX_HEAP_BYTES EDGE_MAX_CONNECTIONS; do
    [[ "${!name}" =~ ^[0-9A-Za-z.:]+$ ]] || { echo "edge.sh: $name is '${!name}'" >&2; exit 2; }
    rules+=(-e "s|: [^ ]* # $name\$|: ${!name}|")
  done
  # A link to nothing counts: it is meant, and Envoy refuses it.
  if [ -e "$EDGE_TLS_DIR/clients.crt" ] || [ -L "$EDGE_TLS_DIR/clients.crt" ]; then signed=true; else echo "edge.sh: whoever reaches it may call: there is no $EDGE_TLS_DIR/clients.crt" >&2; fi
  mkdir -p "$EDGE_RUN_DIR"
  sed "${rules[@]}" -e "s|: \[.* # EDGE_VISION\$|: $vision|" -e "s|: \[.* # EDGE_QUEUE\$|: $queue|" \
    -e "s|: [^ ]* # EDGE_CERTIFICATE_FILE\$|: $EDGE_RUN_DIR/certificate.yaml|" -e "s|: [^ ]* # EDGE_CLIENTS_FILE\$|: $EDGE_RUN_DIR/clients.yaml|" \
    -e "s|: [^ ]* # EDGE_CLIENT_CERTIFICATES\$|: $signed|" "$here/envoy.yaml" >"$EDGE_RUN_DIR/envoy.yaml"
  sed "s|/etc/envoy/tls|$EDGE_TLS_DIR|" "$here/certificate.yaml" >"$EDGE_RUN_DIR/certificate.yaml"
  if $signed; then sed "s|/etc/envoy/tls|$EDGE_TLS_DIR|g" "$here/clients.yaml"; else sed 's|: {.* # EDGE_CLIENTS$|: {}|' "$here/clients.yaml"; fi >"$EDGE_RUN_DIR/clients.yaml"
  if grep -n '# EDGE_' "$EDGE_RUN_DIR/envoy.yaml" >&2; then echo "edge.sh: the lines above have a mark that it does not know" >&2; exit 2; fi
}

ask_admin() { # METHOD PATH → the answer; bash's own sockets, since the image has no curl
  exec 3<>"/dev/tcp/127.0.0.1/$EDGE_ADMIN_PORT" || return 1
  printf '%s %s HTTP/1.1\r\nHost: admin\r\nConnection: close\r\nContent-Length: 0\r\n\r\n' "$1" "$2" >&3
  cat <&3
  exec 3>&-
}

calls() { # how many calls are running through the two doors
  local count sum=0
  for count in $(ask_admin GET '/stats?filter=%5Ehttp%5C.(vision%7Cqueue)%5C.downstream_rq_active$' | sed -n 's/.*rq_active: \([0-9]*\).*/\1/p'); do
    sum=$((sum + count))
  done
  echo $sum
}

drain() {
  echo "edge.sh: draining, at most $EDGE_DRAIN_SECONDS s" >&2
  ask_admin POST '/runtime_modify?edge.leaving=100' >/dev/null 2>&1 || return 0
  sleep "$EDGE_UNREADY_SECONDS"
  # GOAWAY and Connection: close with every answer. The listeners go when --drain-time-s has passed, or with Envoy.
  ask_admin POST '/drain_listeners?graceful' >/dev/null 2>&1 || return 0
  local until=$((SECONDS + EDGE_DRAIN_SECONDS)) left
  while left="$(calls 2>/dev/null)" && [ "$left" -gt 0 ] && [ $SECONDS -lt $until ]; do sleep 0.2; done
  echo "edge.sh: drained, $left calls are cut" >&2
}

run() {
  render
  local threads=()
  [ "$EDGE_THREADS" = 0 ] || threads=(--concurrency "$EDGE_THREADS")
  "$ENVOY" -c "$EDGE_RUN_DIR/envoy.yaml" --log-level "$EDGE_LOG_LEVEL" --drain-time-s "$EDGE_DRAIN_SECONDS" \
    --drain-strategy immediate --disable-hot-restart ${threads[@]+"${threads[@]}"} &
  local envoy=$! code=0
  # Once draining, a second signal ends it at once.
  trap 'trap "kill -KILL $envoy" TERM INT; drain; kill -TERM $envoy 2>/dev/null || true' TERM INT
  while kill -0 $envoy 2>/dev/null; do code=0; wait $envoy || code=$?; done
  exit $code
}

case "${1:-run}" in
  run) run ;;
  render) render && echo "$EDGE_RUN_DIR/envoy.yaml" ;;
  check) render && "$ENVOY" --mode validate -c "$EDGE_RUN_DIR/envoy.yaml" --log-level warning ;;
  *) echo "edge.sh run | render | check" >&2; exit 2 ;;
esac
