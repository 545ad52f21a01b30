#!/bin/sh
# Installs the programs that are named and missing; for job containers (Debian or Alpine, as root) and hosts that have them already.
set -eu

missing=
for program in "$@"; do
  case $program in
    lib*) PATH=$PATH:/sbin:/usr/sbin ldconfig -p | grep -q "${program%[0-9]}" || missing="$missing $program" ;; # a library by its Debian package
    *) command -v "$program" >/dev/null 2>&1 || missing="$missing $program" ;;
  esac
done
[ -n "$missing" ] || exit 0

# The package has the program's name, but for these.
packages=
for program in $missing; do
  case $program in
    python3.11) packages="$packages python3.11 python3.11-venv" ;;
    node) packages="$packages nodejs" ;;
    flock) packages="$packages util-linux" ;;
    *) packages="$packages $program" ;;
  esac
done

if [ "$(id -u)" -ne 0 ]; then
  echo "Missing on this runner:$missing. Install them on the host (as root), then retry the job." >&2
  exit 1
fi
if command -v apt-get >/dev/null 2>&1; then
  apt-get update -qq
  # shellcheck disable=SC2086 # a list of words
  apt-get install -y -qq --no-install-recommends $packages >/dev/null
elif command -v apk >/dev/null 2>&1; then
  # shellcheck disable=SC2086
  apk add --no-cache --quiet $packages
else
  echo "Missing:$missing, and neither apt-get nor apk is here. Use another image for this job." >&2
  exit 1
fi
