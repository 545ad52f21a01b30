"""The runbook's commands are run in the situations that they are for; what it and the ways to live name is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
import yaml

from tests.delivery.runbook import SITUATIONS, Block, Platform, blocks_of
from tests.processes import ROOT
from tests.programs import needed

OPERATIONS = (ROOT / "docs/operations.md").read_text("utf-8")
PAGES = {
    name: (ROOT / name).read_text("utf-8")
    for name in ("README.md", "docs/operations.md", "docs/deployment.md", "docs/quickstart.th.md")
}
BLOCKS = blocks_of(OPERATIONS)
# Blocks that stand together share their situation, so that it is brought about once.
GROUPS = [(name, list(blocks)) for name, blocks in groupby(BLOCKS, key=lambda block: block.situation)]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    platform = Platform(tmp_path_factory.mktemp("runbook"))
    yield platform
    platform.stop()


@pytest.mark.parametrize(("situation", "blocks"), GROUPS, ids=[f"{name} {i}" for i, (name, _) in enumerate(GROUPS)])
def test_commands_print_what_the_runbook_says(situation: str, blocks: list[Block], platform: Platform) -> None:
    if any(re.search(r"\bcurl ", block.code) for block in blocks):
        needed("curl")
    with SITUATIONS[situation](platform) as variables:
        for block in blocks:
            done = platform.run(block, variables)
            printed = done.stdout + done.stderr
            assert done.returncode == block.exit_code, printed
            for word in block.words:
                assert word in printed, printed


def test_every_situation_is_one_of_the_runbook() -> None:
    assert {block.situation for block in BLOCKS} == set(SITUATIONS)


def test_each_block_is_run_or_says_what_it_needs() -> None:
    before = OPERATIONS.split("```sh\n")[:-1]
    for text, number in zip(before, range(len(before)), strict=True):
        paragraph = " ".join(text.rstrip("\n").rpartition("\n\n")[2].lower().split())
        is_run = paragraph.startswith("<!-- in: ")
        assert is_run or "not run by the tests: needs " in paragraph, f"block {number}: {paragraph}"


def test_the_table_of_alerts_is_that_of_prometheus() -> None:
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text("utf-8"))
    alerts = {rule["alert"]: rule["labels"]["severity"] for group in rules["groups"] for rule in group["rules"]}
    rows = re.findall(r"^\| `(AI4Thai\w+)` \| (yes|no) \|", OPERATIONS, re.MULTILINE)
    assert {name: {"yes": "page", "no": "ticket"}[wakes] for name, wakes in rows} == alerts


def test_reasons_are_those_of_the_servers() -> None:
    sources = "".join(
        path.read_text("utf-8")
        for package in ("vision_server", "queue_server")
        for path in (ROOT / package).rglob("*.py")
    )
    table = OPERATIONS.split("## By the reason")[1].split("## ")[0]
    reasons = re.findall(r"`([A-Z]+_[A-Z_]+)`", "".join(re.findall(r"^\|([^|]+)\|", table, re.MULTILINE)))
    assert len(reasons) > 15
    assert [reason for reason in reasons if f'"{reason}"' not in sources] == []


def test_the_readme_tells_the_pins_that_are_installed() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    table = PAGES["README.md"].split("| the guide | here | because |")[1].split("\n\n")[0]
    here = [row.split("|")[1:3] for row in table.splitlines() if "|" in row][1:]
    told = [cell.split()[-2:] if " " in cell.strip() else [guide.split()[0], cell.strip()] for guide, cell in here]
    pins = {name.lower(): version for name, version in told if re.fullmatch(r"\d+\.\d+\.\d+", version)}
    assert set(pins) >= {"torch", "transformers", "ultralytics", "bitsandbytes", "nvidia-ml-py", "dramatiq"}
    for name, version in pins.items():
        assert re.search(rf'"{name}[a-z-]*==({re.escape(version)})"', project), (name, version)


@pytest.mark.parametrize("name", PAGES)
def test_jobs_of_the_pipeline_are_there(name: str) -> None:
    jobs = set(yaml.safe_load((ROOT / ".gitlab-ci.yml").read_text("utf-8")))
    told = re.findall(
        r"\b((?:deploy|rollback|verify|build|scan)-(?:staging|production|vision|queue|locks))\b", PAGES[name]
    )
    assert set(told) <= jobs


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_is_there(name: str) -> None:
    page = PAGES[name]
    paths = set(re.findall(r"(?<![\w/$.-])((?:deploy(?!/ai4thai-)|requirements|docs|protos)/[\w./-]*\w)", page))
    paths |= {
        Path("docs", link).as_posix() for link in re.findall(r"\]\(([\w.-]+\.md)\b", page) if name.startswith("docs/")
    }
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", page, re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }


@pytest.fixture(scope="module")
def sources() -> str:
    """All that reads or sets a variable."""
    files = [ROOT / name for name in ("compose.yaml", ".env.example", ".gitlab-ci.yml", "Dockerfile", "Makefile")]
    for folder in ("deploy", "vision_server", "queue_server", "serving", "clients/ai4thai"):
        files += [
            path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh", ".yaml", ".lua", ".conf")
        ]
    return "".join(path.read_text("utf-8") for path in files)


@pytest.mark.parametrize("name", [name for name in PAGES if name != "README.md"])
def test_variables_that_a_page_names_are_read_by_something(name: str, sources: str) -> None:
    of_others = {
        "HTTPS_PROXY",
        "SSL_CERT_FILE",
        "REDISCLI_AUTH",
        "COMPOSE_FILE",
    }  # of curl, OpenSSL, valkey-cli, Compose
    for variable in set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", PAGES[name])) - of_others:
        prefix, _, field = variable.partition("_")
        is_field = prefix in ("VISION", "QUEUE", "SERVING") and f" {field.lower()}: " in sources
        assert is_field or re.search(rf"\b{variable}\b", sources), f"nothing reads {variable}"


@pytest.mark.parametrize("name", PAGES)
def test_links_within_a_page_lead_somewhere(name: str) -> None:
    headings = re.findall(r"^#+ (.+)$", PAGES[name], re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert [link for link in re.findall(r"\]\(#([^)]+)\)", PAGES[name]) if link not in anchors] == []
