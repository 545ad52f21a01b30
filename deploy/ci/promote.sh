#!/usr/bin/env bash
# Gives the images that main built, scanned and tried on staging the name of the release: nothing is built again.
set -euo pipefail

tag=${CI_COMMIT_TAG:?this is for pipelines of tags}
for name in vision queue; do
  image=${CI_REGISTRY_IMAGE:?}/$name
  if ! docker buildx imagetools inspect "$image:${CI_COMMIT_SHA:?}" >/dev/null; then
    echo "There is no $image:$CI_COMMIT_SHA: only a commit whose pipeline on ${CI_DEFAULT_BRANCH:-main} has built it can be released." >&2
    echo "Wait for that pipeline, or merge the commit; then retry this job." >&2
    exit 1
  fi
  docker buildx imagetools create --tag "$image:$tag" "$image:$CI_COMMIT_SHA"
  echo "$image:$tag is $CI_COMMIT_SHA."
done
