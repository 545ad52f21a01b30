#!/usr/bin/env bash
# Goes back to the last version that was verified before the one that runs; again, and it goes one further back.
set -euo pipefail

usage() {
  cat <<'TEXT'
deploy/rollback.sh [--environment NAME] [--list] [TAG]

  TAG             to this one instead, also one that was gone back from; it must have been verified in this environment
  --environment   production unless said otherwise (or CI_ENVIRONMENT_NAME)
  --list          tells what one can go back to, and changes nothing

Needs neither GitLab nor the registry as long as this host still has the images; also lies in every release:
/var/lib/team10/production/current/deploy/rollback.sh

Ends with 0: back and verified; 1: there is nothing to go back to; 2: nothing was changed; 3: a person is needed: not good either,
or cut off, or it could not be verified.
TEXT
}

environment=${CI_ENVIRONMENT_NAME:-production}
tag=''
list=no
while [ $# -gt 0 ]; do
  case $1 in
    --environment) [ $# -ge 2 ] || { echo "--environment needs a name." >&2; exit 2; }; environment=$2; shift ;;
    --list) list=yes ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "Unknown option $1." >&2; usage >&2; exit 2 ;;
    *) [ -z "$tag" ] || { usage >&2; exit 2; }; tag=$1 ;;
  esac
  shift
done
# shellcheck source=deploy/ci/release.sh
. "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/ci/release.sh"
enter "$environment"

now=$(running)
if [ $list = yes ]; then
  say "Runs in $environment: ${now:-nothing}$(is_verified "$now" || echo ' (not verified)')."
  say "Verified, the newest first:"
  tac "$home/verified" | sed 's/^/  /'
  taken=$(taken_back)
  if [ -n "$taken" ]; then
    say "Gone back from, and still here (by name):"
    tac <<<"$taken" | awk '!seen[$0]++ { print "  " $0 }'
  fi
  exit 0
fi
lock
refuse_edge
if [ -n "$tag" ]; then
  # The tag as it was deployed last: with a number behind it when that was not the first time.
  for known in "$(cat "$home/verified")" "$(taken_back)"; do
    target=$(awk -F + -v tag="$tag" '$1 == tag || $0 == tag { last = $0 } END { print last }' <<<"$known")
    [ -z "$target" ] || break
  done
  [ -n "$target" ] || die 2 "$tag was not verified in $environment, or is no longer on this host; deploy/rollback.sh --environment $environment --list tells what was." \
    "To deploy it all the same: deploy/deploy.sh $environment $tag"
else
  target=$(earlier)
  [ -n "$target" ] || die 1 "There is nothing to go back to: ${now:-nothing} runs in $environment, and no version was verified before it." \
    "A good version must be deployed: deploy/deploy.sh $environment TAG"
fi

can_come_back "$target" || exit 2
say "Going back from ${now:-nothing} to $target in $environment."
code=0
bring_back "$target" || code=$?
case $code in
  0) say "$target is live in $environment, and verified."; exit 0 ;;
  2) die 3 "$target runs in $environment, and could not be verified: why is said above." ;;
esac
say "$target is not good either: the cause may be this host (GPU, disk, memory). ai4thai doctor; docs/operations.md; this command once more goes further back." >&2
exit 3
