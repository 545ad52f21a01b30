"""What this project asks of its Dockerfile besides hadolint's rules: stages, users, ports, health checks, variables."""

from __future__ import annotations

import re
from collections.abc import Iterator

import dockerfile

from deploy.validation.dockerfile_installs import install_findings
from deploy.validation.dockerfile_model import Stage, pairs, read_stages
from deploy.validation.dockerfile_secrets import secret_findings
from deploy.validation.findings import Finding, Outcome
from deploy.validation.ports import QUEUE_PORT, VISION_PORT, setting_findings
from deploy.validation.tree import Options, Tree

FILE = "Dockerfile"
STAGES = ("base", "development", "production", "h100-optimized", "queue")
# The targets that serve, with the port that each answers on; `development` is a shell with tools.
SERVING = {"production": VISION_PORT, "h100-optimized": VISION_PORT, "queue": QUEUE_PORT}
_PORT_VARIABLE = {VISION_PORT: "VISION_SERVICE_PORT", QUEUE_PORT: "QUEUE_WORKER_PORT"}
_ALLOCATOR = "max_split_size_mb:2048"
_LABELS = ("title", "version", "revision", "created", "licenses")
_INITS = ("tini", "dumb-init", "catatonit")


def check(tree: Tree, options: Options) -> Outcome:
    """Every rule over every stage."""
    del options
    if not tree.exists(FILE):
        return Outcome.of([Finding(FILE, 0, "it is not there", "Restore it: `git checkout Dockerfile`.")])
    try:
        stages = read_stages(tree.read(FILE))
    except dockerfile.GoParseError as error:
        found = re.search(r"line (\d+)", str(error))
        return Outcome.of(
            [Finding(FILE, int(found[1]) if found else 0, f"it cannot be parsed: {error}", "Correct it.")]
        )
    findings = [
        *_stage_findings(stages),
        *_image_findings(stages),
        *install_findings(tree, FILE, stages),
        *secret_findings(FILE, stages),
        *setting_findings(),
    ]
    for stage in stages:
        if stage.name in SERVING or stage.name == "development":
            findings += _running_findings(stage)
        if port := SERVING.get(stage.name):
            findings += [*_label_findings(stage), *_port_findings(stage, port), *_health_findings(stage, port)]
            findings += _variable_findings(stage, port)
    # What a parent has wrong is told once, not for each of its children.
    return Outcome.of(dict.fromkeys(findings), note=f"{len(stages)} stages")


def _stage_findings(stages: list[Stage]) -> Iterator[Finding]:
    there = {stage.name for stage in stages}
    for name in STAGES:
        if name not in there:
            wrong = f"there is no stage {name!r}, which the pipeline builds (there are {', '.join(sorted(there))})"
            yield Finding(FILE, 0, wrong, f"Add `FROM … AS {name}`.")


def _image_findings(stages: list[Stage]) -> Iterator[Finding]:
    """Images from elsewhere: one fixed release each, a slim Python 3.11, Debian with security fixes."""
    names = {stage.name for stage in stages}
    images = [(stage.image, stage.line) for stage in stages if stage.parent is None and stage.image != "scratch"]
    images += [
        (source, instruction.line)
        for stage in stages
        for instruction in stage.own
        if instruction.name == "COPY" and (source := instruction.flag("from")) and source not in names
    ]
    for image, line in images:
        if image.isdecimal():  # a stage by its number
            continue
        name, _, tag = image.partition("@")[0].rpartition(":")
        if not name or "/" in tag or tag == "latest" or "latest" in tag.split("-"):
            wrong = f"the image {image!r} has no fixed release: what is built changes from one day to the next"
            yield Finding(FILE, line, wrong, "Name a release: `python:3.11-slim-bookworm`.")
        elif name.rsplit("/", 1)[-1] == "python" and not re.match(r"3\.11(\D|$)", tag):
            yield Finding(FILE, line, f"the image {image!r} is not Python 3.11", "Use `python:3.11-slim-bookworm`.")
        elif re.search(r"\b(bullseye|buster|stretch)\b", tag):
            wrong = f"the image {image!r} is of a Debian release that gets no security fixes any more"
            yield Finding(FILE, line, wrong, "Use `python:3.11-slim-bookworm`.")
        elif name.rsplit("/", 1)[-1] == "python" and not re.fullmatch(r"3\.11(\.\d+)?-slim-[a-z]+", tag):
            wrong = (
                f"the image {image!r} is not a slim one of a named Debian release: larger, or another Debian one day"
            )
            yield Finding(FILE, line, wrong, "Use `python:3.11-slim-bookworm`.")


def _running_findings(stage: Stage) -> Iterator[Finding]:
    """The user, the init, the signal."""
    user = stage.last("USER")
    who = user.words[0].partition(":")[0] if user else "root"
    if who in ("root", "0"):
        wrong = f"the target {stage.name!r} runs as {who}"
        yield Finding(FILE, user.line if user else stage.line, wrong, "End it with `USER 10001:10001`.")
    elif user and not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", user.words[0]):
        wrong = f"the target {stage.name!r} runs as {user.words[0]!r}; Kubernetes' runAsNonRoot needs a number"
        yield Finding(FILE, user.line, wrong, "Write `USER 10001:10001`.")
    entry = stage.last("ENTRYPOINT")
    if entry is None or not entry.is_json or entry.words[0].rsplit("/", 1)[-1] not in _INITS:
        wrong = f"the target {stage.name!r} does not start with an init: orphans stay, and signals may not arrive"
        yield Finding(FILE, entry.line if entry else stage.line, wrong, 'Write `ENTRYPOINT ["tini", "--"]`.')
    command = stage.last("CMD")
    if command is None or not command.is_json:
        wrong = f"the target {stage.name!r} has no CMD as a list: a shell in between would keep SIGTERM from the server"
        yield Finding(FILE, command.line if command else stage.line, wrong, 'Write `CMD ["program", "argument"]`.')
    signal = stage.last("STOPSIGNAL")
    if signal is None or signal.words[0] not in ("SIGTERM", "15"):
        wrong = f"the target {stage.name!r} is not stopped by SIGTERM, on which the servers drain"
        yield Finding(FILE, signal.line if signal else stage.line, wrong, "Write `STOPSIGNAL SIGTERM`.")


def _label_findings(stage: Stage) -> Iterator[Finding]:
    labels = {name for instruction in stage.all("LABEL") for name, _ in pairs(instruction)}
    for label in _LABELS:
        if f"org.opencontainers.image.{label}" not in labels:
            wrong = f"the target {stage.name!r} has no label org.opencontainers.image.{label}"
            yield Finding(
                FILE, stage.line, wrong, "Add it to LABEL; VERSION, REVISION and CREATED are build arguments."
            )


def _port_findings(stage: Stage, port: int) -> Iterator[Finding]:
    exposed = stage.all("EXPOSE")
    if not exposed:
        yield Finding(FILE, stage.line, f"the target {stage.name!r} exposes no port", f"Write `EXPOSE {port}`.")
    for instruction in exposed:
        for word in instruction.words:
            if word.partition("/")[0] != str(port):
                wrong = f"the target {stage.name!r} exposes {word}, but its server listens on {port}"
                yield Finding(FILE, instruction.line, wrong, f"Write `EXPOSE {port}`.")


def _health_findings(stage: Stage, port: int) -> Iterator[Finding]:
    health = stage.last("HEALTHCHECK")
    cure = f'Write `HEALTHCHECK --timeout=… CMD ["ai4thai", "health", "--grpc", "localhost:{port}"]`.'
    if health is None or (health.words and health.words[0].upper() == "NONE"):
        wrong = f"the target {stage.name!r} has no health check: compose cannot tell when it is ready"
        yield Finding(FILE, health.line if health else stage.line, wrong, cure)
        return
    if health.flag("timeout") is None:
        wrong = f"the health check of {stage.name!r} has no time-out: a server that hangs would count as well for 30 s"
        yield Finding(FILE, health.line, wrong, "Add `--timeout=10s`.")
    command = " ".join(health.words[1:])
    if not re.search(r"\bai4thai\b.*\bhealth\b.*--grpc", command):
        wrong = f"the health check of {stage.name!r} is {command!r}, not this project's probe"
        yield Finding(FILE, health.line, wrong, cure)
    else:
        for named in re.findall(r":(\d{2,5})\b", command):
            if named != str(port):
                wrong = f"the health check of {stage.name!r} asks port {named}, but its server listens on {port}"
                yield Finding(FILE, health.line, wrong, cure)


def _variable_findings(stage: Stage, port: int) -> Iterator[Finding]:
    environment = stage.environment
    variable = _PORT_VARIABLE[port]
    value, line = environment.get(variable, (str(port), 0))
    if value != str(port):
        wrong = f"{variable} is {value} in the target {stage.name!r}, which exposes {port}"
        yield Finding(FILE, line, wrong, f"Write `{variable}={port}`.")
    if port == VISION_PORT:
        value, line = environment.get("PYTORCH_CUDA_ALLOC_CONF", ("", stage.line))
        if _ALLOCATOR not in value.split(","):
            wrong = (
                f"PYTORCH_CUDA_ALLOC_CONF is {value!r} in the target {stage.name!r}: the GPU's memory would fragment"
            )
            yield Finding(FILE, line, wrong, f"Write `ENV PYTORCH_CUDA_ALLOC_CONF={_ALLOCATOR}`.")
    for name, wanted in (("PYTHONUNBUFFERED", "1"), ("AI4THAI_DATA_DIR", "/data")):
        value, line = environment.get(name, ("", stage.line))
        if value != wanted:
            wrong = f"{name} is {value!r} in the target {stage.name!r}"
            yield Finding(FILE, line, wrong, f"Write `ENV {name}={wanted}`.")
