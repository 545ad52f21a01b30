"""The programs that checks call: looked for beside this Python first, then on the path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.validation.findings import ToolMissing


def find(tool: str, cure: str = "Run `make setup`: it installs every tool into .venv.") -> str:
    """Where the program is; raises ToolMissing when it is nowhere."""
    # Not resolved: a virtual environment's python is a link to one whose folder has none of these programs.
    beside = Path(sys.executable).parent
    found = shutil.which(tool, path=os.pathsep.join((str(beside), os.environ.get("PATH", ""))))
    if found is None:
        raise ToolMissing(tool, cure)
    return found


def run(
    command: Sequence[str], root: Path, *, stdin: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The program's output and exit code, whatever that is; `environment` is all that it gets, None this process's."""
    return subprocess.run(
        command,
        cwd=root,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        env=environment,
    )
