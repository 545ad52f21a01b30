#!/usr/bin/env bash
# Starts an image as it is to run in production (its own user, a read-only root, no capabilities) and looks whether it is well:
#   deploy/image-check.sh IMAGE [TARGET]      TARGET: production (default), h100-optimized, queue, development
# ENGINE=docker (default where it is) or buildah (as root; a chroot stands in for a container). ACCELERATOR=gpu, or --gpus as in
# `docker run`, gives the vision server GPUs, and it must compute on them. Exit code: 0 right, 1 wrong, with one line for each fault
# on stderr and the end of the server's log, 2 the check itself cannot run.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 -m deploy.image "$@"
