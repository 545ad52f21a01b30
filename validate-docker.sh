#!/usr/bin/env bash
# Checks all that delivers this project; `./validate-docker.sh --help` lists the checks, `--build` also builds every image.
# Exit codes: 0 all is right, 1 a check failed, 2 wrong usage or a tool is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv="${VENV:-.venv}"
python="$venv/bin/python"
if [ ! -x "$python" ]; then
  echo "There is no $python: run 'make setup' first (it needs Python 3.11 and installs every tool into .venv)," >&2
  echo "or name a virtual environment that has them: VENV=/path/to/venv ./validate-docker.sh" >&2
  exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
  echo "$python is $("$python" --version 2>&1); Python 3.11 is needed. Remove $venv and run 'make setup'." >&2
  exit 2
fi
missing="$("$python" -c 'import importlib.util as u
print(*[name for name in ("check_jsonschema", "detect_secrets", "docker", "dockerfile", "rich", "yaml") if not u.find_spec(name)])')"
if [ -n "$missing" ]; then
  echo "$venv lacks: $missing. Run 'make setup', which installs every tool." >&2
  exit 2
fi

# This folder comes before what the environment has on its path: what is checked is what lies here.
PYTHONPATH="$PWD/clients:$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m deploy.validation "$@"
