"""Faults to plant into a copy of the sources, and what the validation must say of each."""

# ruff: noqa: E501 (a table: one fault, one line)

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from deploy.validation.tree import Tree

ROOT = Path(__file__).resolve().parents[2]
# Put together here, so that the scan of this repository does not find it.
FAKE_TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH"


@dataclass(frozen=True)
class Fault:
    """One change of one file, the check that must notice it, and words of what it says and of the cure."""

    name: str
    check: str
    file: str
    old: str  # what stands there; empty: `new` is put at the end of the file, which is made where it is missing
    new: str
    says: str
    cure: str


def copy_sources(into: Path, *parts: str) -> Path:
    """The sources, or those below the parts, as links: quick, and `plant` writes new files in their place."""
    for name in Tree(ROOT).sources:
        if parts and not any(name == part or name.startswith(f"{part}/") for part in parts):
            continue
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(ROOT / name, target)
        except OSError:  # another file system
            shutil.copy2(ROOT / name, target)
    return into


def plant(root: Path, fault: Fault) -> None:
    """Changes the copy; a fault whose place is gone from the sources must not pass as planted."""
    path = root / fault.file
    text = path.read_text() if path.exists() else ""
    assert fault.old in text, f"{fault.file} has no {fault.old!r} any more: plant {fault.name!r} elsewhere"
    mode = path.stat().st_mode if path.exists() else 0o644
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace(fault.old, fault.new) if fault.old else text + fault.new)
    path.chmod(mode)


# What each check reads, so that no more is copied.
READS = {
    "dockerfile": ("Dockerfile", "requirements"),
    "hadolint": ("Dockerfile", ".hadolint.yaml"),
    "context": (
        ".dockerignore",
        "Dockerfile",
        "clients",
        "serving",
        "vision_server",
        "queue_server",
        "requirements",
        "pyproject.toml",
        "README.md",
    ),
    "yaml": ("compose.yaml", ".gitlab-ci.yml"),
    "compose": ("compose.yaml", "deploy/compose"),
    "pipeline": (".gitlab-ci.yml",),
    "locks": ("pyproject.toml", "requirements", "docs"),
    "protos": ("protos",),
    "shell": (".gitlab-ci.yml", ".ci", "deploy/verify.sh"),
    "secrets": (
        "Dockerfile",
        "compose.yaml",
        ".gitlab-ci.yml",
        ".secrets.baseline",
        "deploy/compose",
        "deploy/validation",
    ),
    "kubernetes": (
        "deploy/kubernetes",
        "deploy/compose",
    ),
}
_NO_CACHE = "--no-cache-dir --no-deps --require-hashes -r requirements/queue.txt"
_PREFETCH = "mkdir -p /models \\\n"  # begins the one RUN that is given a secret

# Each is planted alone.
SINGLE = (
    Fault("secret in ENV", "dockerfile", "Dockerfile", "ENV QUEUE_WORKER_PORT=2003", f"ENV QUEUE_WORKER_PORT=2003 HF_TOKEN={FAKE_TOKEN}", "ENV HF_TOKEN puts a secret into the image's history", "--mount=type=secret"),
    Fault("secret in ARG", "dockerfile", "Dockerfile", "ARG PREFETCH_MODELS", "ARG REDIS_PASSWORD=x\nARG PREFETCH_MODELS", "ARG REDIS_PASSWORD", "--mount=type=secret"),
    Fault("secret file copied", "dockerfile", "Dockerfile", "COPY serving serving\nCOPY queue_server", "COPY .env serving\nCOPY queue_server", "COPY .env puts a secret file into a layer", "/run/secrets"),
    Fault("mounted secret echoed into a layer", "dockerfile", "Dockerfile", _PREFETCH, 'echo "$(cat /run/secrets/hf_token)" > /models/t \\\n', "RUN is given a secret, and writes into the layer", "given no secret"),
    Fault("mounted secret by a variable", "dockerfile", "Dockerfile", _PREFETCH, "T=$(cat /run/secrets/hf_token) && echo $T >> /models/t \\\n", "RUN is given a secret, and writes into the layer", "given no secret"),
    Fault("mounted secret's environment kept", "dockerfile", "Dockerfile", f"id=hf_token {_PREFETCH}", "id=hf_token,env=HF_TOKEN env | tee /models/t \\\n", "RUN is given a secret, and writes into the layer", "given no secret"),
    Fault("pip cache purge", "dockerfile", "Dockerfile", _NO_CACHE, f"{_NO_CACHE} && pip cache purge", "`pip cache purge`", "--no-cache-dir"),
    Fault("no --no-cache-dir", "dockerfile", "Dockerfile", f"pip install {_NO_CACHE}", f"pip install {_NO_CACHE.removeprefix('--no-cache-dir ')}", "leaves its cache in the layer", "Add `--no-cache-dir`"),
    Fault("unpinned package", "dockerfile", "Dockerfile", _NO_CACHE, f"{_NO_CACHE} requests", "`pip install requests` takes whatever version", "requests==VERSION"),
    Fault("range instead of a pin", "dockerfile", "Dockerfile", _NO_CACHE, f"{_NO_CACHE} 'requests>=2'", "`pip install requests>=2`", "requests==VERSION"),
    Fault("no lock file", "dockerfile", "Dockerfile", "-r requirements/queue.txt", "-r requirements/queue.in", "is no lock file", "make lock"),
    Fault("wrong port", "dockerfile", "Dockerfile", "EXPOSE 2003", "EXPOSE 2004", "exposes 2004, but its server listens on 2003", "EXPOSE 2003"),
    Fault("port by variable", "dockerfile", "Dockerfile", "QUEUE_WORKER_PORT=2003", "QUEUE_WORKER_PORT=2005", "QUEUE_WORKER_PORT is 2005", "QUEUE_WORKER_PORT=2003"),
    Fault("no health check", "dockerfile", "Dockerfile", 'CMD ["python", "-m", "queue_server"]', 'HEALTHCHECK NONE\nCMD ["python", "-m", "queue_server"]', "'queue' has no health check", "HEALTHCHECK --timeout"),
    Fault("health check without a time-out", "dockerfile", "Dockerfile", "--timeout=15s --start-period=1m", "--start-period=1m", "has no time-out", "--timeout"),
    Fault("health check by curl", "dockerfile", "Dockerfile", "ai4thai health --grpc localhost:$QUEUE_WORKER_PORT", "curl localhost:2003/health; #", "not this project's probe", "ai4thai"),
    Fault("root", "dockerfile", "Dockerfile", "EXPOSE 2003\nUSER 10001:10001", "EXPOSE 2003\nUSER root", "'queue' runs as root", "USER 10001:10001"),
    Fault("latest", "dockerfile", "Dockerfile", "PYTHON_IMAGE=python:3.11-slim-bookworm", "PYTHON_IMAGE=python:latest", "'python:latest' has no fixed release", "python:3.11-slim-bookworm"),
    Fault("no tag", "dockerfile", "Dockerfile", "PYTHON_IMAGE=python:3.11-slim-bookworm", "PYTHON_IMAGE=registry.example:5000/python", "has no fixed release", "python:3.11-slim-bookworm"),
    Fault("another Python", "dockerfile", "Dockerfile", "PYTHON_IMAGE=python:3.11-slim-bookworm", "PYTHON_IMAGE=python:3.12-slim-bookworm", "is not Python 3.11", "python:3.11-slim-bookworm"),
    Fault("the whole Python image", "dockerfile", "Dockerfile", "PYTHON_IMAGE=python:3.11-slim-bookworm", "PYTHON_IMAGE=python:3.11", "is not a slim one of a named Debian release", "python:3.11-slim-bookworm"),
    Fault("any Debian release", "dockerfile", "Dockerfile", "PYTHON_IMAGE=python:3.11-slim-bookworm", "PYTHON_IMAGE=python:3.11.9-slim", "is not a slim one of a named Debian release", "python:3.11-slim-bookworm"),
    Fault("missing stage", "dockerfile", "Dockerfile", "AS h100-optimized", "AS h100", "no stage 'h100-optimized'", "AS h100-optimized"),
    Fault("no init", "dockerfile", "Dockerfile", 'ENTRYPOINT ["tini", "--"]', "", "does not start with an init", "ENTRYPOINT"),
    Fault("no SIGTERM", "dockerfile", "Dockerfile", "STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "not stopped by SIGTERM", "STOPSIGNAL SIGTERM"),
    Fault("no allocator setting", "dockerfile", "Dockerfile", "    PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:2048 \\\n", "", "PYTORCH_CUDA_ALLOC_CONF is ''", "max_split_size_mb:2048"),
    Fault("broken Dockerfile", "dockerfile", "Dockerfile", "ENV QUEUE_WORKER_PORT=2003", "ENV QUEUE_WORKER_PORT", "cannot be parsed", "Correct it"),
    Fault("apt without a pin", "hadolint", "Dockerfile", "tini=0.19.0-*", "tini", "DL3008", "https://github.com/hadolint/hadolint/wiki/DL3008"),
    Fault(".git in the context", "context", ".dockerignore", "", "\n!.git\n", "files like .git/*, 30.0 MB", "Leave it out"),
    Fault("virtual environment in the context", "context", ".dockerignore", "", "\n!.venv\n", "at most 32.0 MB should be", "Most is in .venv"),
    Fault("all but the virtual environment in the context", "context", ".dockerignore", (ROOT / ".dockerignore").read_text(), ".venv\n", "at most 32.0 MB should be", "Most is in .git"),
    Fault("a copied file kept out", "context", ".dockerignore", "!serving\n", "", "COPY serving: there is no such file", "!serving"),
    Fault("broken compose.yaml", "yaml", "compose.yaml", "services:\n", "services:\n\t- x\n", "it is not YAML", "a tab"),
    Fault("a key twice", "yaml", "compose.yaml", "    init: true\n", "    init: true\n    init: false\n", "'init' stands here twice", "Correct it"),
    Fault("broken pipeline", "yaml", ".gitlab-ci.yml", "stages: [", "stages: [[", "it is not YAML", "Correct it"),
    Fault("unknown key in compose.yaml", "compose", "compose.yaml", "    init: true\n", "    initt: true\n", "initt", "docs.docker.com"),
    Fault("unknown service in compose.yaml", "compose", "compose.yaml", "      queue: {condition: service_healthy}", "      cue: {condition: service_healthy}", "Compose refuses it", "docker compose config"),
    Fault("unknown key in the pipeline", "pipeline", ".gitlab-ci.yml", "default:\n", "surprise:\n  skript: [make]\n\ndefault:\n", "skript", "https://docs.gitlab.com/ci/yaml/"),
    Fault("stale lock", "locks", "pyproject.toml", "redis==8.1.0", "redis==8.0.0", "redis", "ake lock"),
    Fault("unclear contract", "protos", "protos/ai4thai/queue/v1/job.proto", "JOB_STATE_QUEUED = 2", "Queued = 2", "ENUM_VALUE_PREFIX", "buf.build/docs/lint"),
)  # fmt: skip

# Planted together: what reads them takes seconds, and none of them hides another.
COMPOSE = (
    Fault("published Redis", "compose", "compose.yaml", "    networks: [internal]\n    healthcheck:\n      test: [CMD, sh,", '    networks: [internal]\n    ports: ["6379:6379"]\n    healthcheck:\n      test: [CMD, sh,', "redis: the port 6379:6379 is published", "Remove `ports`"),
    Fault("not by health", "compose", "compose.yaml", "      queue: {condition: service_healthy}", "      queue: {condition: service_started}", "worker: it waits for queue by 'service_started'", "service_healthy"),
    Fault("no order", "compose", "compose.yaml", "      vision: {condition: service_started} # not healthy: jobs are accepted while models load\n", "", "queue: it does not wait for vision", "depends_on"),
    Fault("missing limit", "compose", "compose.yaml", 'limits: {cpus: "${WORKER_CPUS:-2}", memory: "${WORKER_MEMORY:-2g}", pids: 512}', "limits: {pids: 512}", "worker: it has no limit of memory", "limits:"),
    Fault("root can be written", "compose", "compose.yaml", "  read_only: true", "  read_only: false", "its root file system can be written", "read_only: true"),
    Fault("capabilities", "compose", "compose.yaml", "cap_drop: [ALL]", "cap_drop: [NET_RAW]", "cap_drop is ['NET_RAW']", "cap_drop: [ALL]"),
    Fault("new privileges", "compose", "compose.yaml", 'security_opt: ["no-new-privileges:true"]', "security_opt: []", "gain rights by setuid", "no-new-privileges"),
    Fault("log fills the disk", "compose", "compose.yaml", "max-size: 20m, ", "", "its log is not rotated", "max-size"),
    Fault("stays away", "compose", "compose.yaml", "restart: unless-stopped", 'restart: "no"', "it stays away after a crash", "unless-stopped"),
    Fault("secret in compose.yaml", "compose", "compose.yaml", "      HF_TOKEN:", f"      HF_TOKEN: {FAKE_TOKEN}", "HF_TOKEN has its value in compose.yaml", "secret from a file"),
    Fault("jobs thrown away", "compose", "compose.yaml", "      - noeviction", "      - allkeys-lru", "throws jobs away", "noeviction"),
    Fault("not on disk", "compose", "compose.yaml", '      - --appendonly\n      - "yes"\n', "", "what it accepts is not on disk", "--appendonly yes"),
    Fault("no password asked", "compose", "deploy/compose/redis.sh", "requirepass", "masterauth", "it asks for no password", "requirepass"),
    Fault("password not demanded", "compose", "deploy/compose/gpu.yaml", "${REDIS_PASSWORD_FILE:?", "${REDIS_PASSWORD_FILE:-", "starts without a Redis password", "REDIS_PASSWORD_FILE:?"),
    Fault("network open", "compose", "compose.yaml", "internal: {internal: true}", "internal: {}", "no network is internal", "internal: true"),
    Fault("no GPU", "compose", "deploy/compose/gpu.yaml", "capabilities: [gpu, compute, utility]", "capabilities: [compute]", "no GPU is reserved", "nvidia"),
    Fault("another name", "compose", "compose.yaml", "container_name: ${CONTAINER_PREFIX:-team10}-worker", "container_name: worker", "its container is called 'worker'", "team10-worker"),
    Fault("killed while it drains", "compose", "compose.yaml", "stop_grace_period: 60s # longer than it drains", "stop_grace_period: 5s", "vision: it is killed 5 s after SIGTERM", "60s"),
    Fault("Redis of any version", "compose", "compose.yaml", "valkey/valkey:9.1.2", "valkey/valkey:latest", "has no fixed release", "Name a release"),
)  # fmt: skip

SHELL = (
    Fault("shell bug", "shell", "deploy/verify.sh", "", "\nrm -rf $UNSET/*\n", "SC2086", "shellcheck.net/wiki/SC2086"),
    Fault("shell bug without a suffix", "shell", ".ci/run", "", "\ncd $HOME/x\n", "SC2086", "shellcheck.net/wiki"),
    Fault("shell bug in the pipeline", "shell", ".gitlab-ci.yml", "", "\nplanted:\n  script:\n    - |\n      make\n      [ $A = b ]\n", "SC2086", "shellcheck.net/wiki"),
)  # fmt: skip

SECRETS = (
    Fault("token in the Dockerfile", "secrets", "Dockerfile", "", f"\n# {FAKE_TOKEN}\n", "Hugging Face Token", "revoke"),
    Fault("password in compose.yaml", "secrets", "compose.yaml", "services:\n", "x-planted: {password: " + "Tr0ub4dor&3xyz" + "}\nservices:\n", "Secret Keyword", "revoke"),
    Fault("token in the pipeline", "secrets", ".gitlab-ci.yml", "", '\n# "glpat-' + "aB3dEfGhIjKlMnOpQrSt" + '"\n', "GitLab Token", "revoke"),
    Fault("key in the code", "secrets", "deploy/planted.py", "", '"-----BEGIN RSA ' + 'PRIVATE KEY-----"\n', "Private Key", "revoke"),
    Fault("password in a URL", "secrets", "deploy/planted.md", "", "redis://user:" + "Xk29fjQ8s7" + "@redis:6379\n", "Basic Auth", "revoke"),
)  # fmt: skip

KUBERNETES = Fault(
    "manifest without sense",
    "kubernetes",
    "deploy/kubernetes/base/vision.yaml",
    "kind: Deployment",
    "kind: Deploymint",
    "eploymint",
    "",
)
