"""How do the platform's containers do (team10-…, or another CONTAINER_PREFIX), where Docker is?"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator

from ai4thai.doctor.findings import Finding, Level, Situation

_ASK_S = 4.0


def check_containers(situation: Situation) -> Iterator[Finding]:
    """Each of them with its state and health."""
    if shutil.which("docker") is None:
        yield Finding("containers", Level.NOTE, "no docker here")
        return
    prefix = situation.env.get("CONTAINER_PREFIX") or "team10"
    command = ["docker", "ps", "--all", "--filter", f"name={prefix}-", "--format", "{{json .}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except subprocess.TimeoutExpired:
        yield Finding(
            "containers",
            Level.FAILURE,
            f"Docker does not answer within {_ASK_S:g} s",
            "Its daemon hangs: journalctl -u docker; sudo systemctl restart docker (containers are started again).",
        )
        return
    if done.returncode:
        words = " ".join(done.stderr.split())
        if "permission denied" in words.lower():
            cure = "sudo usermod -aG docker $USER, then log in again."
            yield Finding("containers", Level.WARNING, "this user may not ask Docker", cure)
        else:
            yield Finding("containers", Level.NOTE, f"Docker does not answer: {words[:200]}")
        return
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    if not rows:
        yield Finding("containers", Level.NOTE, f"none named {prefix}-…")
    for row in rows:
        name, state, status = row.get("Names", "?"), row.get("State", ""), row.get("Status", "")
        told = f"{name}: {status}"
        if name.endswith("-preflight") and status.startswith("Exited (0)"):
            continue  # looks at the secrets before the others start, and is done
        if state != "running" or "unhealthy" in status:
            yield Finding(
                "containers",
                Level.FAILURE,
                told,
                f"docker logs --tail 50 {name}; docker inspect -f '{{{{.State.OOMKilled}}}}' {name}; docker restart {name}",
            )
        elif "health: starting" in status:
            yield Finding(
                "containers", Level.WARNING, told, "Wait until it is healthy: production models take 5 to 10 minutes."
            )
        else:
            yield Finding("containers", Level.OK, told)
