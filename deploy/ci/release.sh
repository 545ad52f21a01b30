# shellcheck shell=bash
# What deploy.sh and rollback.sh share: the releases of one environment on this host, which of them were verified, putting one live.
#
#   $AI4THAI_STATE_DIR/ENVIRONMENT/       /var/lib/team10/production, for one
#     releases/ID/                        a release: compose.yaml, deploy/, and release.env (settings, and images by what they are;
#                                         also as .env)
#     secrets/                            passwords and tokens, the same for all releases
#     secrets.live                        the checksums of those that the containers were started with
#     verified                            the ids of releases that passed deploy/verify.sh here, the newest last
#     running                             the id of the release that was put live last, good or not
#     current                             a link to its folder
#     log                                 what was done when, by whom
#
# An ID is the tag; a tag that is deployed again with other settings or images gets +2, +3 … (no tag has a +)

readonly RESTARTS_TOO_MANY=3

say() { printf '%s\n' "$*"; }
die() { local code=$1; shift; printf '%s\n' "$@" >&2; exit "$code"; }

# put FILE: standard input becomes its content, whole or not at all: a full disk must not leave it empty.
put() {
  if ! { cat >"$1.new" && mv "$1.new" "$1"; }; then
    rm -f "$1.new"
    say "✗ $1 could not be written; it is as it was. Is the disk full? df -h $home" >&2
    return 1
  fi
}

# Names an environment: its folder, its containers, its ports.
enter() {
  local program
  for program in docker curl python3 base64 flock; do # verify.sh's too: nothing is replaced that cannot be verified
    command -v $program >/dev/null || die 2 "$program is missing on this machine."
  done
  environment=$1
  [[ $environment =~ ^[a-z][a-z0-9-]*$ ]] || die 2 "An environment is called production or staging, not '$environment'."
  home=${AI4THAI_STATE_DIR:-/var/lib/team10}/$environment
  if ! (umask 077 && mkdir -p "$home") 2>/dev/null || [ ! -w "$home" ]; then
    local owner
    if [ -d "${home%/*}" ]; then # somebody has deployed here: what they have must stay theirs, it holds passwords
      owner=$(stat -c %U "${home%/*}")
      die 2 "$home cannot be written by $(id -un). ${home%/*} is there and belongs to $owner; run it as $owner: sudo -i -u $owner"
    fi
    die 2 "$home cannot be written by $(id -un). Once, as root: install -d -o $(id -un) -m 700 ${home%/*}"
  fi
  if ! mkdir -p "$home/releases" || ! touch "$home/verified"; then die 2 "$home cannot be written: is the disk full? df -h $home"; fi
  # One host may have both: production has the plain names and ports.
  if [ "$environment" = production ]; then
    project=team10
    export VISION_SERVICE_PORT=${VISION_SERVICE_PORT:-2001} QUEUE_WORKER_PORT=${QUEUE_WORKER_PORT:-2003}
  else
    project=team10-$environment
    export VISION_SERVICE_PORT=${VISION_SERVICE_PORT:-3001} QUEUE_WORKER_PORT=${QUEUE_WORKER_PORT:-3003}
  fi
  export CONTAINER_PREFIX=$project
}

# Keeps others out of the environment until this script ends.
lock() {
  exec 9>"$home/lock"
  flock -n 9 || die 2 "Somebody else deploys or rolls back $environment at this moment (see $home/log). Wait for them, then try again."
}

# A release publishes the servers' ports, which the edge (deploy/envoy) holds: both would be down, and no rollback could help.
refuse_edge() {
  [ -z "$(docker ps --quiet --filter "name=^$project-edge\$")" ] || die 2 \
    "The edge runs before this platform, on the ports that a release publishes; nothing was changed. Take it away, and start it again afterwards:" \
    "  docker rm --force $project-edge" \
    "  (this command again)" \
    "  cd $home/current && EDGE_TLS_DIR=/the/folder docker compose -f compose.yaml -f deploy/envoy/compose.yaml up -d --no-build" \
    "In between, the servers are reached without TLS, where PUBLISH_ADDRESS says."
}

running() { cat "$home/running" 2>/dev/null || true; }
is_verified() { grep -qxF -- "$1" "$home/verified"; }
record() {
  printf '%s  %-9s %-24s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$1" "$2" "${CI_JOB_URL:-by $(id -un)}" >>"$home/log" || true
}

# The release to go back to: the verified one before what runs; the newest verified one when what runs never was. Empty: none.
earlier() {
  local now
  now=$(running)
  awk -v now="$now" '{ ids[NR] = $0 } $0 == now { at = NR } END { n = (at ? at : NR + 1); if (n > 1) print ids[n - 1] }' "$home/verified"
}

# The releases that were verified here and are still on this host, but were gone back from, the newest last.
taken_back() {
  [ ! -e "$home/log" ] || awk '$2 == "verified" { print $3 }' "$home/log" | while read -r one; do
    is_verified "$one" || [ ! -d "$home/releases/$one" ] || say "$one"
  done
}

# Every variable that the release's compose files can be told.
variables() {
  find -L "$1/compose.yaml" "$1/deploy" -name '*.yaml' -exec cat {} + | grep -oE '\$\{[A-Z][A-Z0-9_]*' | cut -c3- | sort -u
}

# value_in RELEASE NAME: what release.env says.
value_in() { sed -n "s/^$2='\(.*\)'\$/\1/p" "$home/releases/$1/release.env"; }

# compose ID ARGUMENTS…: of that release alone: what this shell has in its environment is not to get into an older release.
compose() {
  local folder=$home/releases/$1 name unset=()
  shift
  for name in $(variables "$folder"); do unset+=(-u "$name"); done
  env "${unset[@]}" -u HF_TOKEN docker compose --project-name "$project" --project-directory "$folder" \
    --file "$folder/compose.yaml" --env-file "$folder/release.env" "$@"
}

# How often Docker has started the environment's containers again, all together.
restarts() {
  docker inspect --format '{{.RestartCount}}' "$project"-{redis,vision,queue,worker} 2>/dev/null | awk '{ n += $1 } END { print n + 0 }'
}

# The checksums of the secrets that are kept.
secrets_now() { (cd "$home/secrets" && sha256sum -- *) 2>/dev/null || true; }

pid= # of verify.sh, while it runs
# What a signal leaves (Ctrl-C, a job that is cancelled or takes too long) is a version that nobody has verified.
cut_off() {
  local now cure
  trap '' INT TERM HUP
  [ -z "$pid" ] || kill "$pid" 2>/dev/null || true # it does not hear Ctrl-C: it runs in the background
  now=$(running)
  record cut-off "$now"
  cure="deploy/rollback.sh --environment $environment"
  if is_verified "$now"; then cure+=" $now puts it live anew"; else cure+=" goes back, or deploy it again"; fi
  die 3 "Cut off while $now was put live in $environment: it is not verified. $cure."
}

# put_live ID [forward]: starts a release in place of what runs; returns before its models are loaded.
put_live() {
  local recreate=()
  trap cut_off INT TERM HUP
  # Said before it is done: whatever interrupts this, a rollback does not take the new release for the good one.
  say "$1" | put "$home/running" || return 1
  ln -sfn "releases/$1" "$home/current" || return 1
  # Forward, the new queue server takes kinds of work that the old worker would fail: it gives its jobs back, and they wait for the
  # new one. Back, the old queue server takes none that the newer worker does not know.
  [ "${2:-}" != forward ] || compose "$1" stop worker || true
  # Compose does not see that a secret's content has changed: Redis would be left running with its old password.
  [ "$(secrets_now)" = "$(cat "$home/secrets.live" 2>/dev/null)" ] || recreate=(--force-recreate)
  # Without --remove-orphans: monitoring and the edge are of this project too, from files that no release has.
  compose "$1" up --detach --no-build "${recreate[@]}" redis vision queue || return 1
  # Not along with the others: compose would start it, and return, only when all models are loaded. It waits for them by itself.
  compose "$1" up --detach --no-build --no-deps "${recreate[@]}" worker
}

# Runs the release's own verify.sh against it, and ends as that does (2: it could not be tried); gives up early when a container
# starts again and again.
verify_live() {
  local folder=$home/releases/$1 before again code=0 pause=0.1 picture=()
  before=$(restarts)
  [ ! -e "$folder/verify-image" ] || picture=(--image "$folder/verify-image")
  "$folder/deploy/verify.sh" --vision "${DEPLOY_HOST:-localhost}:$(value_in "$1" VISION_SERVICE_PORT)" \
    --queue "${DEPLOY_HOST:-localhost}:$(value_in "$1" QUEUE_WORKER_PORT)" --wait "${DEPLOY_WAIT:-900}" "${picture[@]}" 9>&- &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    again=$(($(restarts) - before))
    if [ $again -ge $RESTARTS_TOO_MANY ]; then
      kill "$pid" 2>/dev/null
      wait "$pid"
      pid=
      say "✗ containers have ended and been started again $again times; their last words:"
      compose "$1" logs --tail 10 2>&1 | sed 's/^/    /'
      return 1
    fi
    sleep $pause
    pause=1
  done
  wait "$pid" || code=$?
  pid=
  return $code
}

# go_live ID [forward]: puts a release live and verifies it. 1: it is not good; 2: that could not be tried.
go_live() {
  local code=0
  put_live "$@" || return 1
  verify_live "$1" || code=$?
  [ $code -ne 2 ] || record untried "$1"
  [ $code -eq 0 ] || return $code
  trap - INT TERM HUP
  # Not earlier: when it has to go back, or is cut off, nobody knows which containers have the new secrets.
  secrets_now | put "$home/secrets.live" || true
}

# can_come_back ID: whether this host has all that it needs to be put live again; says what is missing.
can_come_back() {
  local name image
  if [ ! -f "$home/releases/$1/compose.yaml" ]; then
    say "$home/releases/$1 is gone: $1 cannot be brought back. deploy/rollback.sh --environment $environment --list tells others." >&2
    return 1
  fi
  for name in VISION_IMAGE QUEUE_IMAGE; do
    image=$(value_in "$1" $name)
    if ! docker image inspect "$image" >/dev/null 2>&1 && ! docker pull --quiet "$image" >/dev/null; then
      say "An image of $1 is no longer on this host: docker login; docker pull $image; then deploy/rollback.sh --environment $environment $1" >&2
      return 1
    fi
  done
}

# bring_back ID: puts a release that was verified live again and verifies it, as go_live; what was verified after it counts no more.
bring_back() {
  local id=$1 code=0
  record back-to "$id"
  go_live "$id" || code=$?
  [ $code -eq 0 ] || return $code
  awk -v id="$id" '{ ids[NR] = $0 } $0 == id { at = NR }
    END { for (n = 1; n <= (at ? at : NR); n++) print ids[n]; if (!at) print id }' "$home/verified" | put "$home/verified" || true
  record verified "$id"
}

# forget ID: removes a release that one cannot go back to, and its images, unless another release of this host or a container has them.
forget() {
  local name image file names=() others mounted
  # Compose leaves a container alone that has not changed (Redis, for one): it goes on with the files of the release that made it, and
  # could not be started again without them.
  # (docker fails when one of them is not there, and tells of the others.)
  mounted=$(docker inspect --format '{{range .Mounts}}{{println .Source}}{{end}}' \
    "$project"-{redis,vision,queue,worker,edge,prometheus,grafana} 2>/dev/null || true)
  ! grep -qF "$home/releases/$1/" <<<"$mounted" || return 0
  others=$(for file in "${home%/*}"/*/releases/*/release.env; do
    [ "$file" = "$home/releases/$1/release.env" ] || cat "$file"
  done)
  for name in VISION_IMAGE QUEUE_IMAGE; do
    image=$(value_in "$1" $name)
    # By all its names: as long as one is left (the tag that was pulled), Docker keeps the image.
    mapfile -t names < <(docker image inspect "$image" 2>/dev/null \
      --format '{{range .RepoTags}}{{println .}}{{end}}{{range .RepoDigests}}{{println .}}{{end}}' | grep .)
    ! grep -qF -f <(printf "='%s'\n" "$image" "${names[@]}") <<<"$others" || continue
    [ ${#names[@]} -gt 0 ] && [ -z "$(docker ps --all --quiet --filter "ancestor=$image")" ] || continue
    docker image rm "${names[@]}" >/dev/null 2>&1 || true
  done
  rm -rf "$home/releases/$1"
}
