#!/usr/bin/env bash
# Gives both images of a commit a further name; nothing is built again:
#   deploy/ci/promote.sh SHA staged-SHA       staging has taken and verified them
#   deploy/ci/promote.sh staged-SHA v1.2.0    they are a release
set -euo pipefail

[ $# -eq 2 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
from=$1 to=$2
# Both before the first gets its name: half a release would be one that can be asked for.
for name in vision queue; do
  image=${CI_REGISTRY_IMAGE:?}/$name:$from
  if ! docker buildx imagetools inspect "$image" >/dev/null; then
    echo "There is no $image: only a commit that ${CI_DEFAULT_BRANCH:-main}'s pipeline has built, scanned and verified on staging can be released." >&2
    echo "Wait for that pipeline; run it again if a newer push has cancelled it; mend it if deploy-staging failed. Then retry this job." >&2
    exit 1
  fi
done
for name in vision queue; do
  docker buildx imagetools create --tag "$CI_REGISTRY_IMAGE/$name:$to" "$CI_REGISTRY_IMAGE/$name:$from"
  echo "$CI_REGISTRY_IMAGE/$name:$to is $from."
done
