"""detect-secrets over every file that git has or would take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deploy.validation import tools
from deploy.validation.findings import Finding, Outcome
from deploy.validation.tree import Options, Tree

BASELINE = ".secrets.baseline"
# Where values stand in quotes, or are none.
_SOURCES = (".py", ".pyi", ".md", ".proto", ".lua")
_CURE = (
    "Remove it, and revoke it if it was ever pushed. An invented one, for a test: `# pragma: allowlist secret` behind it, or, "
    f"once git has the file, `.venv/bin/detect-secrets scan --baseline {BASELINE}` (without file names: it would forget the "
    "others), and look at what that adds."
)


def check(tree: Tree, options: Options) -> Outcome:
    """What is found is told unless the baseline has it: by its file, its kind and its hash, whatever its line."""
    del options
    tools.find("detect-secrets")
    if not tree.exists(BASELINE):
        return Outcome.of([Finding(BASELINE, 0, "it is not there", f"Restore it: `git checkout {BASELINE}`.")])
    known = {
        (file, secret["type"], secret["hashed_secret"])
        for file, secrets in json.loads(tree.read(BASELINE))["results"].items()
        for secret in secrets
    }
    # One process for each core, the largest files in turn, so that each has as much to read: this is the longest check.
    names = sorted(tree.sources, key=lambda name: -(tree.root / name).stat().st_size)
    cores = min(os.cpu_count() or 1, 8)
    findings = []
    for file, kind, digest, line in _scan(tree, [names[core::cores] for core in range(cores)]):
        if (file, kind, digest) not in known:
            findings.append(Finding(file, line, f"this looks like a secret ({kind})", _CURE))
    return Outcome.of(findings, note=f"{len(names)} files, {len(known)} invented ones known")


def _scan(tree: Tree, shares: Sequence[Sequence[str]]) -> list[tuple[str, str, str, int]]:
    """Each secret's file, kind, hash and line, found by one process for each share of the files."""
    command = [sys.executable, "-m", "deploy.validation.secret_scan"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    scanners = []
    for share in filter(None, shares):
        scanner = subprocess.Popen(
            command,
            cwd=tree.root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert scanner.stdin
        scanner.stdin.write("\0".join(share))
        scanner.stdin.close()
        scanner.stdin = None
        scanners.append(scanner)
    found: list[tuple[str, str, str, int]] = []
    for scanner in scanners:
        output, errors = scanner.communicate()
        if scanner.returncode:
            raise RuntimeError(f"detect-secrets ended with {scanner.returncode}: {errors.strip()[-2000:]}")
        found += [tuple(secret) for secret in json.loads(output)]
    return found


def _scan_share() -> None:
    """The process that looks through a share: file names on its input, what it found as JSON on its output."""
    from detect_secrets.core import baseline
    from detect_secrets.core.scan import scan_file
    from detect_secrets.plugins.keyword import DENYLIST, KeywordDetector
    from detect_secrets.settings import configure_settings_from_baseline, get_plugins

    configure_settings_from_baseline(baseline.load_from_file(BASELINE), filename=BASELINE)
    plugins = [
        plugin for plugin in get_plugins() if not isinstance(plugin, KeywordDetector)
    ]  # which the words stand for
    words = re.compile("|".join(DENYLIST), re.IGNORECASE)
    found = []
    for name in sys.stdin.read().split("\0"):
        if name.endswith(_SOURCES) and not _may_hold_one(Path(name).read_text("utf-8"), words, plugins):
            continue
        for secret in scan_file(name):
            found.append((secret.filename, secret.type, secret.secret_hash, secret.line_number))
        if name.endswith((".yaml", ".yml")):
            found += _in_comments(name, plugins)
    json.dump(found, sys.stdout)


def _in_comments(name: str, plugins: Iterable[Any]) -> list[tuple[str, str, str, int]]:
    """Tokens in the comments of a YAML file, of which the library reads the values alone."""
    found = []
    for number, line in enumerate(Path(name).read_text("utf-8").splitlines(), 1):
        _, hash_sign, comment = line.partition("#")
        if hash_sign and "pragma: allowlist secret" not in comment:
            for plugin in plugins:
                for secret in plugin.analyze_line(filename=name, line=comment, line_number=number):
                    found.append((name, secret.type, secret.secret_hash, number))
    return found


def _may_hold_one(text: str, words: re.Pattern[str], plugins: Iterable[Any]) -> bool:
    """Whether any detector could find something in a text in which values stand in quotes.

    Each detector's own expressions, once over the whole text: line by line, as the library does it, takes five times as long.
    """
    if words.search(text):
        return True
    for plugin in plugins:
        limit = getattr(plugin, "entropy_limit", None)
        for value in plugin.analyze_string(text):
            if limit is None or plugin.calculate_shannon_entropy(value) > limit:
                return True
    return False


if __name__ == "__main__":
    _scan_share()
