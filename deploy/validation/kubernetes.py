"""The Kubernetes manifests, by the checks that lie beside them."""

from __future__ import annotations

from deploy.validation.findings import Finding, Outcome
from deploy.validation.tree import Options, Tree

FOLDER = "deploy/kubernetes/overlays"


def check(tree: Tree, options: Options) -> Outcome:
    """Each overlay is rendered by the real kustomize, and held against Kubernetes' schemas and this project's rules."""
    del options
    from deploy.kubernetes.check import all_findings  # here: it brings Kubernetes' schemas

    overlays = sorted(path.parent for path in (tree.root / FOLDER).glob("*/kustomization.yaml"))
    if not overlays:
        return Outcome.of([Finding(FOLDER, 0, "there is no overlay", f"Restore them: `git checkout {FOLDER}`.")])
    return Outcome.of(all_findings(overlays), note=", ".join(path.name for path in overlays))
