"""Runs the jobs of a pipeline here, in GitLab's order: each job's own script, its variables, a clean workspace, what it needs.

What a job runs is real, but for what cannot be had, or run again, within a test. Stand-ins, first on PATH:
- `docker` is docker_engine.py: nothing is built, the services of `docker compose` are this machine's processes.
- `trivy` writes reports, and ends as the test says.
- `make`: this suite is what `make test` runs, so it runs one small file of it, with the job's own arguments (but the coverage of
  one package alone, which is quicker); `make check` looks at one file; `make setup` links this environment's tools, with
  `pip-audit` (which asks the network) written as a stand-in.
- `./validate-docker.sh`, which has tests of its own, only says that it was called; node and npm are never called.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests import programs
from tests.delivery.docker_engine import Engine
from tests.delivery.pipeline_model import Job, expand
from tests.processes import ROOT

BIN = Path(sys.executable).parent
JOB_S = 600

MAKE = f"""\
#!/bin/bash
set -eu
case $1 in
  setup)
    mkdir -p .venv/bin
    ln -sf {BIN}/cyclonedx-py .venv/bin/cyclonedx-py
    printf '%s\\n' '#!/bin/bash' 'while [ $# -gt 0 ]; do [ "$1" = --output ] && echo "{{}}" >"$2"; shift; done' \\
      'exit "${{AUDIT_ENDS_WITH:-0}}"' >.venv/bin/pip-audit
    chmod +x .venv/bin/pip-audit
    ;;
  check) exec {BIN}/ruff check deploy/ci/answers.py ;;
  test)
    [[ $2 == PYTEST_ARGUMENTS=* ]]
    arguments=$(tr ' ' '\\n' <<<"${{2#PYTEST_ARGUMENTS=}}" | grep -vE -- '--cov=(vision|queue|ai4)')
    exec {BIN}/python -m pytest $arguments tests/clients/test_errors.py
    ;;
  *) echo "no rule $1" >&2; exit 2 ;;
esac
"""
TRIVY = """\
#!/bin/bash
exits=0
while [ $# -gt 0 ]; do
  case $1 in
    --output) echo '{"bomFormat": "CycloneDX"}' >"$2" ;;
    --exit-code) exits=$2 ;;
    --severity) severity=$2 ;;
    --scanners) scanners=$2 ;;
    --skip-db-update) [ "${TRIVY_FINDS:-}" != trouble ] || exit 1 ;;
  esac
  shift
done
case ,${TRIVY_FINDS:-}, in
  *,secret,*) [[ ${scanners:-secret} == *secret* ]] && found=yes ;;
  *,CRITICAL,*) found=yes ;;
  *,HIGH,*) [ "${severity:-}" = HIGH,CRITICAL ] && found=yes ;;
esac
[ "${found:-no}" = yes ] && exit $exits
exit 0
"""


@dataclass
class Ended:
    """What became of a job: success, warning (failed, but allowed to), failed, skipped, or manual (nobody started it)."""

    status: str
    code: int = 0
    output: str = ""


@dataclass
class Runner:
    """A GitLab runner, and what GitLab keeps for it: variables and artifacts."""

    folder: Path
    engine: Engine
    variables: dict[str, dict[str, str]] = field(default_factory=dict)
    """The project's variables by environment; `*` is for all jobs."""
    order: list[str] = field(default_factory=list)
    """The jobs in the order in which they were run."""

    def __post_init__(self) -> None:
        programs.needed("curl")  # verify.sh and deploy.sh are run for real
        # prepare.sh would install on this machine what its job's image lacks.
        tools = {
            "apt-get": "#!/bin/true\n",
            "apk": "#!/bin/true\n",
            "make": MAKE,
            "trivy": TRIVY,
            "node": "#!/bin/false\n",
            "npm": "#!/bin/false\n",
        }
        self._tools = self.folder / "stand-ins"
        self._tools.mkdir(parents=True)
        for name, text in tools.items():
            (self._tools / name).write_text(text)
            (self._tools / name).chmod(0o755)

    def run(
        self, jobs: list[Job], given: Mapping[str, str], start: Collection[str] = (), shown: Collection[str] = ()
    ) -> dict[str, Ended]:
        """Runs a pipeline; `start` names the manual jobs that a person starts, `shown` those that are taken to have succeeded."""
        ended: dict[str, Ended] = {}
        waiting = {job.name: job for job in jobs}
        stages = {job.name: job.stage for job in jobs}
        order = list(dict.fromkeys(stages.values()))
        artifacts: dict[str, Path] = {}

        def needed(job: Job) -> list[str]:
            if job.needs is None:
                return [name for name, stage in stages.items() if order.index(stage) < order.index(job.stage)]
            for name, optional in job.needs:
                assert optional or name in stages, f"{job.name} needs {name}, which this pipeline does not have"
            return [name for name, _ in job.needs if name in stages]

        while waiting:
            job = next(job for job in waiting.values() if all(name in ended for name in needed(job)))
            del waiting[job.name]
            # A stage does not wait for a manual job that may be left alone; who needs it by name does.
            left = {name for name in needed(job) if ended[name].status == "manual"}
            stopped = any(ended[name].status in ("failed", "skipped") for name in needed(job))
            if stopped or (left and job.needs is not None):
                ended[job.name] = Ended("skipped")
            elif job.when == "manual" and job.name not in start:
                ended[job.name] = Ended("manual")
            elif job.name in shown:
                ended[job.name] = Ended("success")
            else:
                self.order.append(job.name)
                place = self.folder / f"{len(self.order):02}-{job.name}"
                ended[job.name] = self._run(
                    job, given, place, [artifacts[name] for name in needed(job) if name in artifacts]
                )
                artifacts[job.name] = place
        return ended

    def environment(self, job: Job, given: Mapping[str, str], place: Path) -> dict[str, str]:
        """The variables of a job; the project's go before the file's, the file's before the predefined."""
        own = {
            **given,
            "CI": "true",
            "CI_PROJECT_DIR": str(place),
            "CI_JOB_NAME": job.name,
            **({"CI_ENVIRONMENT_NAME": job.environment} if job.environment else {}),
            **job.variables,
            **self.variables.get("*", {}),
            **(self.variables.get(job.environment, {}) if job.environment else {}),
        }
        for _ in range(3):  # a variable may name one that names another
            own = {name: expand(value, own) for name, value in own.items()}
        path = [
            self.engine.path,
            self._tools,
            "/usr/local/sbin",
            "/usr/local/bin",
            "/usr/sbin",
            "/usr/bin",
            "/sbin",
            "/bin",
            BIN,
        ]
        return {"PATH": os.pathsep.join(map(str, path)), "HOME": str(place), "LANG": "C.UTF-8", **own}

    def _run(self, job: Job, given: Mapping[str, str], place: Path, handed: list[Path]) -> Ended:
        _check_out(place)
        for before in handed:
            for found in before.glob("scan/*"):
                (place / "scan").mkdir(exist_ok=True)
                shutil.copy(found, place / "scan")
        script = "\n".join([*job.keys.get("before_script", []), *job.keys["script"]])
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", script],
            cwd=place,
            env=self.environment(job, given, place),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=JOB_S,
            check=False,
        )
        if done.returncode == 0:
            return Ended("success", 0, done.stdout)
        allowed = job.allow_failure
        if isinstance(allowed, dict):
            allowed = done.returncode in allowed["exit_codes"]
        return Ended("warning" if allowed else "failed", done.returncode, done.stdout)

    def reports(self, job: Job) -> dict[str, list[str]]:
        """The files of each kind of artifact that the job's last run left, by the names in the file."""
        place = next(
            self.folder / f"{number:02}-{name}"
            for number, name in reversed(list(enumerate(self.order, 1)))
            if name == job.name
        )
        told = job.keys["artifacts"]
        reports = {
            kind: value["path"] if isinstance(value, dict) else value for kind, value in told.get("reports", {}).items()
        }
        return {
            kind: sorted(str(path.relative_to(place)) for path in place.glob(pattern))
            for kind, pattern in reports.items()
        }


def _check_out(place: Path) -> None:
    """The project's files, as links: a job that changes one of them would be a fault."""
    place.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (
            ".git",
            ".venv",
            ".cache",
            "scan",
            "validate-docker.sh",
            "junit.xml",
            "coverage.xml",
            ".coverage",
        ):
            (place / path.name).symlink_to(path)
    (place / "validate-docker.sh").write_text("#!/bin/sh\necho validate-docker.sh was called\n")
    (place / "validate-docker.sh").chmod(0o755)
