"""That every YAML file of delivery can be read."""

from __future__ import annotations

from pathlib import PurePosixPath

import yaml

from deploy.validation import yaml_lines
from deploy.validation.findings import Finding, Outcome
from deploy.validation.tree import Options, Tree


def check(tree: Tree, options: Options) -> Outcome:
    """Well-formed, without tabs, and no key twice."""
    del options
    names = [name for name in tree.sources if _is_delivery(name)]
    findings = []
    for name in names:
        try:
            yaml_lines.read_all(tree.read(name))
        except yaml.YAMLError as error:
            line, problem = yaml_lines.error_place(error)
            cure = "Correct it there: most often it is the indentation, a tab, or a value with `: ` that needs quotes."
            findings.append(Finding(name, line, f"it is not YAML: {problem}", cure))
    if not names:
        findings.append(Finding("deploy", 0, "there is no YAML file to look at", "Run this in the project's root."))
    return Outcome.of(findings, note=f"{len(names)} files")


def _is_delivery(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in (".yaml", ".yml") and (
        len(path.parts) == 1 or path.parts[0] in ("deploy", "protos", "requirements")
    )
