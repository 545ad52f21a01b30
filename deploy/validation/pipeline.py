"""GitLab's own schema over .gitlab-ci.yml."""

from __future__ import annotations

from deploy.validation.findings import Finding, Outcome
from deploy.validation.schemas import schema_findings
from deploy.validation.tree import Options, Tree

FILE = ".gitlab-ci.yml"


def check(tree: Tree, options: Options) -> Outcome:
    """The schema that GitLab publishes, as check-jsonschema brings it."""
    del options
    if not tree.exists(FILE):
        return Outcome.of([Finding(FILE, 0, "it is not there", "Restore it: `git checkout .gitlab-ci.yml`.")])
    cure = "https://docs.gitlab.com/ci/yaml/ lists every keyword and what it may be."
    return Outcome.of(schema_findings(tree, FILE, "vendor.gitlab-ci", cure))
