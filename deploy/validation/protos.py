"""buf's lint over the contract."""

from __future__ import annotations

import json

from deploy.validation import tools
from deploy.validation.findings import Finding, Outcome
from deploy.validation.tree import Options, Tree


def check(tree: Tree, options: Options) -> Outcome:
    """The same as `buf lint protos`, by buf.yaml's rules."""
    del options
    done = tools.run([tools.find("buf"), "lint", "protos", "--error-format", "json"], tree.root)
    complaints = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode and not complaints:
        wrong = f"buf could not lint: {(done.stderr or done.stdout).strip()}"
        return Outcome.of([Finding("protos/buf.yaml", 0, wrong, "Correct buf.yaml or the file that is named.")])
    files = sum(name.startswith("protos/ai4thai/") and name.endswith(".proto") for name in tree.sources)
    return Outcome.of(
        (
            Finding(
                complaint.get("path", "protos"),
                complaint.get("start_line", 0),
                f"{complaint['type']}: {complaint['message']}",
                f"https://buf.build/docs/lint/rules/#{complaint['type'].lower()} tells why; then run `make protos`.",
            )
            for complaint in complaints
        ),
        note=f"{files} files",
    )
