"""shellcheck over every shell script, and over the script blocks of the pipeline."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from deploy.validation import tools, yaml_lines
from deploy.validation.findings import Finding, Outcome
from deploy.validation.tree import Options, Tree

PIPELINE = ".gitlab-ci.yml"
_BLOCKS = ("before_script", "script", "after_script")
# Left out for the pipeline's blocks: they are put behind one another, and the runner sets their variables.
_EXCLUDED_IN_BLOCKS = "SC2148,SC2154,SC2317"


def check(tree: Tree, options: Options) -> Outcome:
    """Every complaint is an error; a script that means it says `# shellcheck disable=…` with the reason."""
    del options
    shellcheck = tools.find("shellcheck")
    scripts = [name for name in tree.sources if is_script(tree.root / name)]
    findings: list[Finding] = []
    if scripts:
        done = tools.run(
            [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", "--format", "json1", *scripts], tree.root
        )
        for comment in json.loads(done.stdout)["comments"]:
            findings.append(_finding(comment["file"], comment["line"], comment))
    blocks = 0
    with tempfile.TemporaryDirectory(prefix="ai4thai-validation-") as folder:
        lines_by_file: dict[str, list[int]] = {}
        for blocks, (job, text, lines) in enumerate(pipeline_blocks(tree.read(PIPELINE)), 1):
            path = Path(folder) / f"{blocks:03}-{job.replace('/', '_')}.sh"
            path.write_text(text, encoding="utf-8")
            lines_by_file[str(path)] = lines
        if lines_by_file:
            command = [shellcheck, "--shell=bash", f"--exclude={_EXCLUDED_IN_BLOCKS}", "--format", "json1"]
            done = tools.run([*command, *lines_by_file], tree.root)
            for comment in json.loads(done.stdout)["comments"]:
                line = lines_by_file[comment["file"]][comment["line"] - 1]
                findings.append(_finding(PIPELINE, line, comment))
    # What an anchor repeats in several jobs is one mistake.
    return Outcome.of(dict.fromkeys(findings), note=f"{len(scripts)} scripts, {blocks} blocks of the pipeline")


def is_script(path: Path) -> bool:
    """By its name, or by its first line."""
    if path.suffix in (".sh", ".bash"):
        return True
    if path.suffix:
        return False
    with path.open("rb") as file:
        first = file.readline(200)
    return first.startswith(b"#!") and first.rstrip().endswith((b"bash", b"/sh", b" sh"))


def pipeline_blocks(text: str) -> Iterator[tuple[str, str, list[int]]]:
    """Each script block: its job, its text as a shell sees it, and for each of its lines the line in the file."""
    try:
        documents = yaml_lines.read_all(text)
    except yaml.YAMLError:
        return  # the check of the YAML files tells
    for document in documents:
        if not isinstance(document, yaml.MappingNode):
            continue
        for job, body in document.value:
            if not isinstance(body, yaml.MappingNode):
                continue
            for key, value in body.value:
                if key.value in _BLOCKS:
                    script, lines = _block(value)
                    if script:
                        yield job.value, script, lines


def _block(node: yaml.Node) -> tuple[str, list[int]]:
    parts: list[str] = []
    lines: list[int] = []
    for item in _scalars(node):
        first = item.start_mark.line + 1 + (item.style in ("|", ">"))
        for offset, line in enumerate(item.value.rstrip("\n").split("\n")):
            parts.append(line)
            lines.append(first + (offset if item.style == "|" else 0))
    return "\n".join(parts) + "\n" if parts else "", lines


def _scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode) and not node.tag.startswith(
        "!"
    ):  # `!reference [job, script]` is no script
        for item in node.value:
            yield from _scalars(item)


def _finding(file: str, line: int, comment: dict[str, object]) -> Finding:
    code = f"SC{comment['code']}"
    return Finding(
        file, line, f"{code}: {comment['message']}", f"https://www.shellcheck.net/wiki/{code} shows the right way."
    )
