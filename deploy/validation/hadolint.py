"""hadolint over the Dockerfile: the rules that everybody's Dockerfile is held to."""

from __future__ import annotations

import json

from deploy.validation import tools
from deploy.validation.findings import Finding, Outcome
from deploy.validation.tree import Options, Tree

_WIKI = {"DL": "https://github.com/hadolint/hadolint/wiki/", "SC": "https://www.shellcheck.net/wiki/"}


def check(tree: Tree, options: Options) -> Outcome:
    """Every complaint is an error; what the project leaves out stands in .hadolint.yaml, each with its reason."""
    del options
    if not tree.exists("Dockerfile"):
        return Outcome.of([Finding("Dockerfile", 0, "it is not there", "Restore it: `git checkout Dockerfile`.")])
    command = [tools.find("hadolint"), "--format", "json", "--no-fail"]
    if tree.exists(".hadolint.yaml"):
        command += ["--config", ".hadolint.yaml"]
    done = tools.run([*command, "Dockerfile"], tree.root)
    if done.returncode:
        wrong = f"hadolint could not read it or its settings: {(done.stderr or done.stdout).strip()}"
        return Outcome.of([Finding(".hadolint.yaml", 0, wrong, "Correct the settings.")])
    complaints = json.loads(done.stdout)
    return Outcome.of(
        (
            Finding(
                complaint["file"],
                complaint["line"],
                f"{complaint['code']}: {complaint['message']}",
                f"{_WIKI.get(complaint['code'][:2], _WIKI['DL'])}{complaint['code']} shows the right way.",
            )
            for complaint in complaints
        ),
        note=f"{len(tree.read('Dockerfile').splitlines())} lines",
    )
