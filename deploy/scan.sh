#!/bin/sh
# Looks for known vulnerabilities and writes bills of materials (CycloneDX): of the locks, or of an image.
#
#   deploy/scan.sh locks          needs .venv (make setup): pip-audit, cyclonedx-py
#   deploy/scan.sh image REF      needs trivy, and REGISTRY credentials as TRIVY_USERNAME, TRIVY_PASSWORD
#
# Writes to scan/. Ends with 0: nothing known; 10: something to look at; 1: something that must not go live (CRITICAL: what a newer
# version mends, or a secret in the image; exceptions with their reason in deploy/ci/trivyignore.yaml), or the scan itself did not work.
set -eu

cd "$(dirname "$0")/.."
mkdir -p scan

case ${1:-} in
  locks)
    bin=${VENV:-.venv}/bin
    found=0
    for name in queue vision-cpu vision-gpu h100; do # what images are made of; dev.txt never leaves the pipeline
      lock=requirements/$name.txt
      # --no-validate: its check of what it has just written takes ten times as long as the writing.
      "$bin/cyclonedx-py" requirements "$lock" --no-validate --output-format JSON --output-file "scan/sbom-$name.cdx.json"
      rm -f "scan/audit-$name.json"
      # --disable-pip: the locks are complete, so nothing is resolved or downloaded.
      if "$bin/pip-audit" --requirement "$lock" --no-deps --disable-pip --progress-spinner off \
        --format json --output "scan/audit-$name.json"; then
        echo "$lock: nothing known"
      elif [ -s "scan/audit-$name.json" ]; then
        found=10 # pip-audit has said above how many; the report names them
        echo "$lock: known vulnerabilities, see scan/audit-$name.json; make lock takes newer versions"
      else
        echo "pip-audit did not work on $lock: is pypi.org reachable?" >&2
        exit 1
      fi
    done
    exit $found
    ;;
  image)
    ref=${2:?usage: deploy/scan.sh image REF}
    name=${ref%%@*}
    name=${name##*/}
    name=${name%%:*}
    ignore=deploy/ci/trivyignore.yaml
    # The reports have all that is known, the exceptions too.
    trivy image --quiet --scanners vuln,secret --format json --output "scan/$name.json" "$ref"
    trivy convert --format cyclonedx --output "scan/sbom-image-$name.cdx.json" "scan/$name.json"
    trivy convert --format table --severity HIGH,CRITICAL --output "scan/$name.txt" "scan/$name.json"
    cat "scan/$name.txt"
    # Asked again, from the cache of the first time: a report cannot be filtered by what is mended. 3, for trivy's own errors end with 1.
    code=0
    trivy image --quiet --skip-db-update --scanners vuln,secret --severity CRITICAL --ignore-unfixed --ignorefile "$ignore" \
      --exit-code 3 "$ref" || code=$?
    case $code in
      0) ;;
      3)
        echo "$ref is not to go live. Vulnerabilities: a newer version mends them (make lock, or a newer PYTHON_IMAGE). Secrets: take them" \
          "out of the image, and change them." >&2
        exit 1
        ;;
      *)
        echo "trivy did not work on $ref: what it found is not known. Is the registry reachable? Then retry." >&2
        exit 1
        ;;
    esac
    trivy convert --format table --severity HIGH,CRITICAL --exit-code 10 --output /dev/null "scan/$name.json" || code=$?
    exit $code
    ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
