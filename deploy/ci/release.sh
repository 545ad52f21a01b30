# shellcheck shell=bash
# What deploy.sh and rollback.sh share: the releases of one environment on this host, which of them were verified, putting one live.
#
#   $AI4THAI_STATE_DIR/ENVIRONMENT/       /var/lib/team10/production, for one
#     releases/ID/                        a release: compose.yaml, deploy/, and release.env (images by digest, settings; also as .env)
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

# Names an environment: its folder, its containers, its ports. Leaves it locked until this script ends.
enter() {
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
  mkdir -p "$home/releases"
  touch "$home/verified"
  exec 9>"$home/lock"
  flock -n 9 || die 2 "Somebody else deploys or rolls back $environment at this moment (see $home/log). Wait for them, then try again."
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

running() { cat "$home/running" 2>/dev/null || true; }
is_verified() { grep -qxF -- "$1" "$home/verified"; }
record() {
  printf '%s  %-9s %-24s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$1" "$2" "${CI_JOB_URL:-by $(id -un)}" >>"$home/log"
}

# The release to go back to: the verified one before what runs; the newest verified one when what runs never was. Empty: none.
earlier() {
  local now
  now=$(running)
  awk -v now="$now" '{ ids[NR] = $0 } $0 == now { at = NR } END { n = (at ? at : NR + 1); if (n > 1) print ids[n - 1] }' "$home/verified"
}

# Every variable that the release's compose files can be told.
variables() {
  cat "$1"/compose.yaml "$1"/deploy/compose/*.yaml | grep -oE '\$\{[A-Z][A-Z0-9_]*' | cut -c3- | sort -u
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

# Starts a release in place of what runs; returns before its models are loaded.
put_live() {
  local recreate=()
  # Said before it is done: whatever interrupts this, a rollback does not take the new release for the good one.
  say "$1" >"$home/running"
  ln -sfn "releases/$1" "$home/current"
  # Compose does not see that a secret's content has changed: Redis would be left running with its old password.
  [ "$(secrets_now)" = "$(cat "$home/secrets.live" 2>/dev/null)" ] || recreate=(--force-recreate)
  # Without --remove-orphans: monitoring and the edge are of this project too, from files that no release has.
  compose "$1" up --detach --no-build "${recreate[@]}" redis vision queue || return 1
  # Not along with the others: compose would start it, and return, only when all models are loaded. It waits for them by itself.
  compose "$1" up --detach --no-build --no-deps "${recreate[@]}" worker
}

# Runs the release's own verify.sh against it; gives up early when a container starts again and again.
verify_live() {
  local folder=$home/releases/$1 before again pid pause=0.1 picture=()
  before=$(restarts)
  [ ! -e "$folder/verify-image" ] || picture=(--image "$folder/verify-image")
  "$folder/deploy/verify.sh" --vision "${DEPLOY_HOST:-localhost}:$(value_in "$1" VISION_SERVICE_PORT)" \
    --queue "${DEPLOY_HOST:-localhost}:$(value_in "$1" QUEUE_WORKER_PORT)" --wait "${DEPLOY_WAIT:-900}" "${picture[@]}" 9>&- &
  pid=$!
  while kill -0 $pid 2>/dev/null; do
    again=$(($(restarts) - before))
    if [ $again -ge $RESTARTS_TOO_MANY ]; then
      kill $pid 2>/dev/null
      wait $pid
      say "✗ containers have ended and been started again $again times; their last words:"
      compose "$1" logs --tail 10 2>&1 | sed 's/^/    /'
      return 1
    fi
    sleep $pause
    pause=1
  done
  wait $pid
}

# go_live ID: puts a release live and verifies it.
go_live() {
  put_live "$1" && verify_live "$1" || return 1
  # Not earlier: when it has to go back, or is cut off, nobody knows which containers have the new secrets.
  secrets_now >"$home/secrets.live"
}

# bring_back ID: puts a verified release live again and verifies it; what was verified after it counts no more.
bring_back() {
  local id=$1
  [ -f "$home/releases/$id/compose.yaml" ] || { say "$home/releases/$id is gone: it cannot be brought back."; return 1; }
  record back-to "$id"
  go_live "$id" || return 1
  awk -v id="$id" '{ ids[NR] = $0 } $0 == id { at = NR } END { for (n = 1; n <= at; n++) print ids[n] }' "$home/verified" >"$home/verified.new"
  mv "$home/verified.new" "$home/verified"
  record verified "$id"
}

# forget ID: removes a release that one cannot go back to, and its images, unless another release of this host or a container has them.
forget() {
  local name image file names=() others
  # Compose leaves a container alone that has not changed (Redis, for one): it goes on with the files of the release that made it, and
  # could not be started again without them.
  if docker inspect --format '{{range .Mounts}}{{println .Source}}{{end}}' "$project"-{redis,vision,queue,worker} 2>/dev/null |
    grep -qF "$home/releases/$1/"; then
    return
  fi
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
