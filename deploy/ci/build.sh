#!/usr/bin/env bash
# Builds one image (vision or queue) with BuildKit and the registry's layer cache; pushes it by the commit's id where PUSH=yes.
set -euo pipefail

name=${1:?usage: deploy/ci/build.sh vision|queue}
case $name in
  vision) target=${BUILD_TARGET:-h100-optimized} ;;
  queue) target=queue ;;
  *) echo "There are the images vision and queue, not $name." >&2; exit 2 ;;
esac
image=${CI_REGISTRY_IMAGE:?}/$name
revision=${CI_COMMIT_SHA:-$(git rev-parse HEAD)}
cache=$image-cache:$target

# Docker's own builder cannot write a cache to a registry; this one can, and keeps its local cache between pipelines.
builder=team10-builder
docker buildx inspect "$builder" >/dev/null 2>&1 || docker buildx create --name "$builder" --driver docker-container >/dev/null

arguments=(
  --builder "$builder" --file Dockerfile --target "$target" --progress plain
  --build-arg "ACCELERATOR=${ACCELERATOR:-gpu}"
  --build-arg "VERSION=${CI_COMMIT_TAG:-${CI_COMMIT_SHORT_SHA:-${revision:0:8}}}"
  --build-arg "REVISION=$revision"
  --build-arg "CREATED=${CI_PIPELINE_CREATED_AT:-$(date -u +%Y-%m-%dT%H:%M:%SZ)}"
  --cache-from "type=registry,ref=$cache"
)
if [ "$name" = vision ] && [ -n "${PREFETCH_MODELS:-}" ]; then
  arguments+=(--build-arg "PREFETCH_MODELS=$PREFETCH_MODELS")
  # A secret of the build: it is in no layer, and not in this log.
  if [ -n "${HF_TOKEN_FILE:-}" ]; then
    arguments+=(--secret "id=hf_token,src=$HF_TOKEN_FILE")
  elif [ -n "${HF_TOKEN:-}" ]; then
    arguments+=(--secret "id=hf_token,env=HF_TOKEN")
  fi
fi
if [ "${PUSH:-no}" = yes ]; then
  arguments+=(--cache-to "type=registry,ref=$cache,mode=max" --tag "$image:$revision" --push)
else
  arguments+=(--output type=cacheonly) # a merge request only shows that it builds
fi

began=$SECONDS
DOCKER_BUILDKIT=1 docker buildx build "${arguments[@]}" .
echo "Built $name ($target) in $((SECONDS - began)) s."
