"""YAML files, read so that each value's line can be told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml


def read_all(text: str) -> list[yaml.Node]:
    """The documents as nodes with their marks; raises yaml.YAMLError. Tags of other programs (`!reference`) are let be."""
    return [node for node in yaml.compose_all(text, Loader=_Loader) if node is not None]


def values(text: str) -> Any:
    """The first document as plain values; `!reference [job, script]` of a pipeline as its list."""
    return yaml.load(text, Loader=_Loader)


def line_of(documents: Iterable[yaml.Node], *path: str) -> int:
    """The line of the value at the path; where the file has no such value, the line of the deepest part that it has."""
    for document in documents:
        line, node = 0, document
        for step in path:
            found = _child(node, step)
            if found is None:
                break
            line, node = found
        if line:
            return line
    return 0


def _child(node: yaml.Node, step: str) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        merged: list[yaml.Node] = []
        for key, value in node.value:
            if key.value == step:
                return key.start_mark.line + 1, value
            if key.value == "<<":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
        for other in merged:  # what an anchor brings in
            if found := _child(other, step):
                return found
    elif isinstance(node, yaml.SequenceNode) and step.isdecimal() and int(step) < len(node.value):
        item = node.value[int(step)]
        return item.start_mark.line + 1, item
    return None


class _Loader(yaml.SafeLoader):
    """A safe loader that complains about a key that stands twice, of which YAML would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands here twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


def _reference(loader: yaml.SafeLoader, node: yaml.Node) -> list[str]:
    return [item.value for item in node.value]


_Loader.add_constructor("!reference", _reference)


def error_place(error: yaml.YAMLError) -> tuple[int, str]:
    """The line of what cannot be read, and what is wrong with it."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return (mark.line + 1 if mark else 0), error.problem or error.context or "it is not YAML"
    return 0, str(error)
