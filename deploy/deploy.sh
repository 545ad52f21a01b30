#!/usr/bin/env bash
# Deploys a version on this host's Docker, verifies it, and goes back to the one before by itself when it is not good.
set -euo pipefail

usage() {
  cat <<'TEXT'
deploy/deploy.sh ENVIRONMENT TAG        for example: deploy/deploy.sh production v1.2.0

The images are $CI_REGISTRY_IMAGE/vision:TAG and $CI_REGISTRY_IMAGE/queue:TAG; team10-vision:TAG and team10-queue:TAG of this host
when CI_REGISTRY_IMAGE is not set. Settings are those of compose.yaml, from the environment, COMPOSE_PROFILES (cpu or gpu) at least;
.env is not read: set -a; . ./.env; set +a. REDIS_PASSWORD_FILE, QUEUE_WEBHOOK_SECRET_FILE and HF_TOKEN_FILE name files with secrets,
which are copied to the host's folder of the environment; those of the last deployment are taken when they are not set. VERIFY_IMAGE
names a picture to verify with (deploy/verify.sh --help), which goes into the release.

  AI4THAI_STATE_DIR   where this host keeps its releases             (/var/lib/team10)
  DEPLOY_WAIT         how long models may take to load, in seconds   (900)
  DEPLOY_KEEP         how many verified versions one can go back to  (5)
  DEPLOY_HOST         where the published ports are reached          (localhost)

Ends with 0: live and verified; 1: not good, and the version before is back (or there was none); 2: nothing was changed;
3: a person is needed: not good, and the version before is not either; or cut off, or it could not be verified.
TEXT
}

case ${1:-} in -h | --help) usage; exit 0 ;; esac
[ $# -eq 2 ] || { usage >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=deploy/ci/release.sh
. "$root/deploy/ci/release.sh"
tag=$2
[[ $tag =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]] || die 2 "'$tag' is no tag of an image."
enter "$1"
lock
# Whatever ends this before a container is touched (a full disk, for one) has changed nothing.
touched=no
trap 'code=$?; rm -rf "$home/secrets.new"; [ $code -eq 0 ] || [ $touched = yes ] || exit 2' EXIT
# Compose's default is the CPU with the small models: nobody is to get that in production by having forgotten something.
[ -n "${COMPOSE_PROFILES:-}" ] ||
  die 2 "COMPOSE_PROFILES is not set (cpu or gpu). By hand, settings come from the environment, not from .env: set -a; . ./.env; set +a"
[ -z "${VERIFY_IMAGE:-}" ] || [ -r "$VERIFY_IMAGE" ] || die 2 "The picture $VERIFY_IMAGE (VERIFY_IMAGE) cannot be read."
refuse_edge
umask 022

# The images, by what they are and not by what they are called: a tag can be moved, a digest cannot.
image_of() {
  local ref=${CI_REGISTRY_IMAGE:+$CI_REGISTRY_IMAGE/$1:$tag} digest
  if [ -z "$ref" ]; then
    ref=team10-$1:$tag
    digest=$(docker image inspect --format '{{.Id}}' "$ref") || die 2 "There is no image $ref on this host: build it, or set CI_REGISTRY_IMAGE."
    # What was never pushed has no digest to be named by: it gets a name of its own, which no later build takes away.
    digest=${digest#sha256:}
    docker tag "$ref" "team10-$1:${digest:0:12}" || die 2 "$ref could not be given a further name."
    echo "team10-$1:${digest:0:12}"
    return
  fi
  docker pull --quiet "$ref" >/dev/null || die 2 "$ref cannot be pulled: is it pushed, is this host logged in (docker login)?"
  digest=$(docker image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$ref" | grep -F "$CI_REGISTRY_IMAGE/$1@" | head -n 1)
  [ -n "$digest" ] || die 2 "$ref has no digest: was it built here and never pushed?"
  echo "$digest"
}
say "Fetching the images of $tag."
VISION_IMAGE=$(image_of vision)
QUEUE_IMAGE=$(image_of queue)
export VISION_IMAGE QUEUE_IMAGE

# Secrets are kept once for all releases: a rollback must not bring an old password back. Readable by the containers' users, below a
# folder that only this host's user may enter. New ones replace them only when the release is taken: containers that restart read them.
rm -rf "$home/secrets.new"
mkdir -p "$home/secrets" "$home/secrets.new"
chmod 700 "$home/secrets" "$home/secrets.new"
# shellcheck disable=SC2153
for name in REDIS_PASSWORD_FILE QUEUE_WEBHOOK_SECRET_FILE HF_TOKEN_FILE; do
  secret=$(tr '[:upper:]' '[:lower:]' <<<"${name%_FILE}")
  kept=$home/secrets/$secret
  given=${!name:-}
  # A variable of GitLab's that is not of the type "file" would be the secret itself; it is not printed.
  [ -z "$given" ] || [ -r "$given" ] || die 2 "$name does not name a readable file. In GitLab its type must be File."
  if [ -n "$given" ] && [ "$given" != "$kept" ]; then
    cat "$given" >"$home/secrets.new/$secret"
  fi
  if [ "$name" = HF_TOKEN_FILE ] && [ -z "$given" ] && [ -n "${HF_TOKEN:-}" ]; then
    printf %s "$HF_TOKEN" >"$home/secrets.new/$secret"
  fi
  if [ -e "$kept" ] || [ -e "$home/secrets.new/$secret" ]; then export "$name=$kept"; else unset "$name"; fi
done

# The release holds all that is needed to put it live again, without a checkout and without GitLab.
next=$home/releases/.next
rm -rf "$next"
mkdir -p "$next/deploy" "$next/clients/ai4thai/samples"
cp "$root/compose.yaml" "$next/"
cp -R "$root"/deploy/{compose,ci,verify.sh,rollback.sh} "$next/deploy/"
cp -R "$root"/deploy/{envoy,prometheus,grafana} "$next/deploy/" # for those who start the edge or monitoring beside it
for settings in vision.env queue.env; do # what compose.yaml reads where there is one
  if [ -e "$root/$settings" ]; then cp "$root/$settings" "$next/"; fi
done
cp "$root/clients/ai4thai/samples/scene-01.jpg" "$next/clients/ai4thai/samples/"
if [ -n "${VERIFY_IMAGE:-}" ]; then cp "$VERIFY_IMAGE" "$next/verify-image"; fi
export COMPOSE_PROJECT_NAME=$project
for name in COMPOSE_PROJECT_NAME $(variables "$next"); do
  [ -n "${!name+set}" ] || continue # set to nothing is a setting, too: VISION_DESCRIBER= is none
  case ${!name} in *\'* | *$'\n'*) die 2 "$name holds a quote or a line's end, which a release cannot keep." ;; esac
  printf "%s='%s'\n" "$name" "${!name}"
done >"$next/release.env"
chmod 600 "$next/release.env"
# So that a plain `docker compose restart vision` in the release's folder means this release, and not compose.yaml's defaults.
ln -s release.env "$next/.env"

id=$tag
number=1
while [ -e "$home/releases/$id" ] && ! diff -r "$next" "$home/releases/$id" >/dev/null; do
  number=$((number + 1)) id=$tag+$number
done
if [ -e "$home/releases/$id" ]; then rm -rf "$next"; else mv "$next" "$home/releases/$id"; fi

before=$(running)
if ! is_verified "$before" || [ "$before" = "$id" ]; then before=$(earlier); fi
# Read by compose before anything is touched: a password that is missing, a setting that it does not take.
compose "$id" config --quiet || die 2 "compose does not take this release ($home/releases/$id); nothing was changed."

say "Deploying $id to $environment${before:+, where $before is the last good one}."
say "While the vision server is replaced, port $VISION_SERVICE_PORT does not answer until its models are loaded; jobs are taken and wait."
for secret in "$home"/secrets.new/*; do
  [ ! -e "$secret" ] || mv "$secret" "$home/secrets/"
done
touched=yes
record deploy "$id"
code=0
go_live "$id" forward || code=$?
if [ $code -eq 0 ]; then
  # Kept is what one can still go back to.
  { cat "$home/verified"; [ "$(tail -n 1 "$home/verified")" = "$id" ] || say "$id"; } | tail -n "${DEPLOY_KEEP:-5}" | put "$home/verified" ||
    die 3 "$id is live in $environment and good, but is not among the verified versions: make room, then deploy it again."
  record verified "$id"
  for folder in "$home"/releases/*; do
    old=${folder##*/}
    is_verified "$old" || forget "$old"
  done
  say "$id is live in $environment, and verified."
  exit 0
fi

[ $code -ne 2 ] ||
  die 3 "$id runs in $environment, and could not be verified (why is said above). Mend that and deploy it again, or go back: deploy/rollback.sh"
record failed "$id"
if [ -z "$before" ]; then
  say "$id is not good, and nothing was verified in $environment before: it is left running to be looked at." >&2
  exit 1
fi
say "$id is not good: going back to $before." >&2
can_come_back "$before" || die 3 "$id is left running: a person is needed."
if bring_back "$before"; then
  say "$environment is back at $before, verified. $id was not good: the lines with ✗ above say why." >&2
  exit 1
fi
say "$before is not good either: the cause may be this host (GPU, disk, memory). ai4thai doctor; docs/operations.md; deploy/rollback.sh goes further back." >&2
exit 3
