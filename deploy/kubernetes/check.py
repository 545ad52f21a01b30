"""Checks the manifests without a cluster: `python -m deploy.kubernetes.check [OVERLAY | FOLDER]…`, by default all overlays.

Exit codes: 0 all right, 1 something is wrong (each finding with its cure), 2 it could not be looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from deploy.kubernetes import link_rules, network_rules, pod_rules, schema_rules, settings
from deploy.kubernetes.objects import HERE, DoesNotRender, Objects, overlays, render
from deploy.validation.findings import Finding, ToolMissing

# Each step stands on those before it: the rules read only what fits the schemas, and settings that the servers take.
STEPS = ((schema_rules.check,), (settings.check,), (pod_rules.check, link_rules.check, network_rules.check))


def findings(objects: Objects) -> list[Finding]:
    """What is wrong with an overlay: all that the first step finds which finds something."""
    for step in STEPS:
        if found := [finding for check in step for finding in check(objects)]:
            return found
    return []


def all_findings(folders: Iterable[Path]) -> Iterator[Finding]:
    """The same for folders that are yet to be rendered."""
    for folder in folders:
        try:
            yield from findings(render(folder))
        except DoesNotRender as error:
            yield Finding(
                f"deploy/kubernetes/overlays/{folder.name}", 0, f"kustomize: {error}", "Mend what it names; then again."
            )


def main(arguments: Sequence[str]) -> int:
    """The command."""
    folders = [HERE / "overlays" / name if name in overlays() else Path(name) for name in arguments or overlays()]
    try:
        wrong = list(all_findings(folders))
    except ToolMissing as error:
        print(error, file=sys.stderr)
        return 2
    for finding in wrong:
        print(f"✗ {finding.place}: {finding.wrong}\n  → {finding.cure}")
    for folder in folders:
        if not any(finding.path.endswith(f"/{folder.name}") for finding in wrong):
            print(f"✓ {folder.name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
