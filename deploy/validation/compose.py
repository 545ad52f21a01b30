"""compose.yaml: by the published schema, by Docker Compose itself, and by what this project asks of it."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.validation import compose_model
from deploy.validation.compose_hardening import hardening_findings
from deploy.validation.compose_model import FILE, Model
from deploy.validation.compose_wiring import wiring_findings
from deploy.validation.findings import Finding, Outcome
from deploy.validation.schemas import schema_findings
from deploy.validation.tree import Options, Tree

PROFILES = ("cpu", "gpu")


def check(tree: Tree, options: Options) -> Outcome:
    """Each step only when the one before it found nothing: what Compose cannot read cannot be looked into."""
    del options
    if not tree.exists(FILE):
        return Outcome.of([Finding(FILE, 0, "it is not there", f"Restore it: `git checkout {FILE}`.")])
    cure = "https://docs.docker.com/reference/compose-file/ lists every key and what it may be."
    if findings := list(schema_findings(tree, FILE, "vendor.compose-spec", cure)):
        return Outcome.of(findings)
    models = [compose_model.read(tree, profile, password=profile != "cpu") for profile in PROFILES]
    if refused := [model for model in models if isinstance(model, Finding)]:
        return Outcome.of(refused)
    read = [model for model in models if isinstance(model, Model)]
    findings = [finding for model in read for finding in (*hardening_findings(model), *wiring_findings(tree, model))]
    findings += _password_findings(tree)
    # The same in both profiles is said once.
    once = {
        (finding.line, finding.wrong.rpartition(" (profile ")[0] or finding.wrong): finding
        for finding in reversed(findings)
    }
    return Outcome.of(once.values(), note=f"{len(read[-1].services)} services, profiles {' and '.join(PROFILES)}")


def _password_findings(tree: Tree) -> Iterator[Finding]:
    """Outside `cpu`, Compose must refuse to go on when no password's file is named."""
    if isinstance(compose_model.read(tree, "gpu", password=False), Model):
        wrong = (
            "the profile gpu starts without a Redis password: no REDIS_PASSWORD_FILE was named, and nothing refused it"
        )
        line = tree.line_of(FILE, "REDIS_PASSWORD_FILE")
        yield Finding(FILE, line, wrong, "Ask for it with `${REDIS_PASSWORD_FILE:?…}` in deploy/compose/gpu.yaml.")
