"""Looks whether a built image runs as in production: `deploy/image-check.sh IMAGE [TARGET]`."""
