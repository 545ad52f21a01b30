"""Reads .gitlab-ci.yml as GitLab does: what each job is after `extends` and `default`, and which jobs a pipeline has."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

GLOBAL = {"stages", "workflow", "variables", "default", "include"}
# A job takes these from `default` unless it, or what it extends, says otherwise.
INHERITED = (
    "image",
    "tags",
    "interruptible",
    "timeout",
    "retry",
    "before_script",
    "after_script",
    "cache",
    "artifacts",
)
_TOKENS = re.compile(r'\s*(?:(\$\w+)|"([^"]*)"|(=~|==|!=|&&|\|\||[()])|(null)|/((?:[^/\\]|\\.)+)/)')


@dataclass
class Job:
    """A job of one pipeline: `when` is on_success or manual."""

    name: str
    keys: dict[str, Any]
    when: str = "on_success"
    allow_failure: Any = False
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        return str(self.keys["stage"])

    @property
    def needs(self) -> list[tuple[str, bool]] | None:
        """(job, optional); None: all jobs of the stages before."""
        if "needs" not in self.keys:
            return None
        return [
            (one, False) if isinstance(one, str) else (one["job"], bool(one.get("optional")))
            for one in self.keys["needs"]
        ]

    @property
    def environment(self) -> str:
        """The environment's name; empty: it has none."""
        given = self.keys.get("environment", "")
        return str(given.get("name", "")) if isinstance(given, dict) else str(given)


class Pipelines:
    """The file, and the pipelines that it makes."""

    def __init__(self, path: Path) -> None:
        self.source: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
        self.stages: list[str] = self.source["stages"]
        self.variables = {name: str(value) for name, value in self.source["variables"].items()}
        written = {name: keys for name, keys in self.source.items() if name not in GLOBAL}
        self.jobs = {
            name: {**self._defaults(), **self._extended(written, name)} for name in written if not name.startswith(".")
        }

    def pipeline(self, given: Mapping[str, str], changed: tuple[str, ...] = ()) -> list[Job] | None:
        """The jobs of a pipeline with these predefined variables, by stage; None: there is none."""
        known = {**self.variables, **given}
        rule = self._first(self.source["workflow"]["rules"], known, changed)
        if rule is None or rule.get("when") == "never":
            return None
        workflow = {**self.variables, **{name: str(value) for name, value in rule.get("variables", {}).items()}}
        jobs = []
        for name, keys in self.jobs.items():
            rule = self._first(keys["rules"], {**workflow, **given}, changed)
            if rule is None or rule.get("when") == "never":
                continue
            own = {key: str(value) for key, value in {**keys.get("variables", {}), **rule.get("variables", {})}.items()}
            allowed = rule.get("allow_failure", keys.get("allow_failure", False))
            jobs.append(Job(name, keys, rule.get("when", "on_success"), allowed, {**workflow, **own}))
        return sorted(jobs, key=lambda job: self.stages.index(job.stage))

    def _defaults(self) -> dict[str, Any]:
        return {key: value for key, value in self.source["default"].items() if key in INHERITED}

    def _extended(self, written: Mapping[str, Any], name: str) -> dict[str, Any]:
        keys = written[name]
        parents = keys.get("extends", [])
        merged: dict[str, Any] = {}
        for parent in [parents] if isinstance(parents, str) else parents:
            merged = _merged(merged, self._extended(written, parent))
        return _merged(merged, {key: value for key, value in keys.items() if key != "extends"})

    @staticmethod
    def _first(
        rules: list[dict[str, Any]], known: Mapping[str, str], changed: tuple[str, ...]
    ) -> dict[str, Any] | None:
        for rule in rules:
            assert set(rule) <= {"if", "changes", "when", "allow_failure", "variables"}, rule
            if "changes" in rule and not any(fnmatch.fnmatch(path, one) for path in changed for one in rule["changes"]):
                continue
            if "if" not in rule or holds(rule["if"], known):
                return rule
        return None


def holds(condition: str, known: Mapping[str, str]) -> bool:
    """Whether a rule's `if` is true: variables, strings, null, == != =~ && || and parentheses."""
    tokens = _tokens(condition)
    words = [*tokens, ("", "")]
    at = 0

    def value() -> str | None:
        nonlocal at
        kind, word = words[at]
        at += 1
        assert kind in ("variable", "string", "null"), (condition, word)
        return {"variable": known.get(word[1:]) if kind == "variable" else None, "string": word, "null": None}[kind]

    def comparison() -> bool:
        nonlocal at
        if words[at][1] == "(" and words[at][0] == "operator":
            at += 1
            inner = either()
            assert words[at] == ("operator", ")"), condition
            at += 1
            return inner
        left = value()
        if words[at] in (("operator", "=="), ("operator", "!=")):
            equal = words[at][1] == "=="
            at += 1
            return (left == value()) == equal
        if words[at] == ("operator", "=~"):
            assert words[at + 1][0] == "pattern", condition
            at += 2
            return re.search(words[at - 1][1], left or "") is not None
        return bool(left)

    def both() -> bool:
        nonlocal at
        result = comparison()
        while words[at] == ("operator", "&&"):
            at += 1
            result = comparison() and result
        return result

    def either() -> bool:
        nonlocal at
        result = both()
        while words[at] == ("operator", "||"):
            at += 1
            result = both() or result
        return result

    result = either()
    assert at == len(tokens), f"{condition!r} is not understood from {words[at][1]!r} on"
    return result


def expand(text: str, known: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` replaced, as GitLab does in variables and keywords."""
    return re.sub(r"\$\{?(\w+)\}?", lambda found: known.get(found[1], ""), text)


def _tokens(condition: str) -> list[tuple[str, str]]:
    def read() -> Iterator[tuple[str, str]]:
        at = 0
        while condition[at:].strip():
            found = _TOKENS.match(condition, at)
            assert found is not None, f"{condition!r} is not understood from {condition[at:]!r} on"
            at = found.end()
            kind = ("variable", "string", "operator", "null", "pattern")[(found.lastindex or 1) - 1]
            yield kind, found[found.lastindex or 1]

    return list(read())


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged, all else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
