#!/bin/sh
# Looks for known vulnerabilities and writes bills of materials (CycloneDX): of the locks, or of an image.
#
#   deploy/scan.sh locks          needs .venv (make setup): pip-audit, cyclonedx-py
#   deploy/scan.sh image REF      needs trivy, and REGISTRY credentials as TRIVY_USERNAME, TRIVY_PASSWORD
#
# Writes to scan/. Ends with 0: nothing known; 10: something to look at; 1: something that must not go live (CRITICAL, and a newer
# version mends it; exceptions with their reason in deploy/ci/trivyignore.yaml), or the scan itself did not work.
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
    # Scanned once; what follows only reads the report.
    trivy image --quiet --scanners vuln,secret --format json --output "scan/$name.json" "$ref"
    trivy convert --format cyclonedx --output "scan/sbom-image-$name.cdx.json" "scan/$name.json"
    trivy convert --format table --severity HIGH,CRITICAL --output "scan/$name.txt" "scan/$name.json"
    cat "scan/$name.txt"
    if ! trivy image --quiet --scanners vuln --severity CRITICAL --ignore-unfixed --ignorefile "$ignore" --exit-code 1 "$ref"; then
      echo "$ref has critical vulnerabilities that a newer version mends: take it (make lock, or a newer PYTHON_IMAGE)." >&2
      exit 1
    fi
    code=0
    trivy convert --format table --severity HIGH,CRITICAL --exit-code 10 --output /dev/null "scan/$name.json" || code=$?
    exit $code
    ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
