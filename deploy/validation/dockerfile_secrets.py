"""That no secret gets into a layer or into the image's history."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from deploy.validation.dockerfile_model import Instruction, Stage, pairs
from deploy.validation.findings import Finding

# Whole words of a variable's name, so that TOKENIZERS_PARALLELISM is none.
_SECRET_NAME = re.compile(
    r"(^|_)(PASSWORD|PASSWD|PASS|SECRET|SECRETS|TOKEN|APIKEY|API_KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?)(_|$)", re.I
)
# Where a secret lies is no secret.
_NAMES_A_PLACE = re.compile(r"_(FILE|DIR|PATH|NAME|ID)$", re.I)
_SECRET_FILE = re.compile(
    r"(\.env(\..+)?|\.netrc|\.pypirc|pip\.conf|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx|jks|kdbx)"
    r"|\.?secrets?|\.ssh|\.aws|\.kube|kubeconfig|credentials(\.json)?|\.docker)"
)
_PASSWORD_IN_URL = re.compile(r"://[^/\s:@${}]+:[^/\s@${}]+@")
# A redirection, but to /dev/null or another descriptor (`2>&1`); `>=` is a version's.
_WRITES = re.compile(r"\btee\b[^;&|\n]*|>{1,2}\|?(?!=)(?!&\s*[\d-])&?\s*(?!/dev/(?:null|stdout|stderr)\b)[^\s;&|>]+")
_CURE = "Give it at run time (a file in /run/secrets), or to one RUN alone: `--mount=type=secret,id=…`."


def secret_findings(file: str, stages: list[Stage]) -> Iterator[Finding]:
    """ARG, ENV, LABEL and COPY of every stage, and what RUN does with a mounted secret."""
    for stage in stages:
        for instruction in stage.own:
            line = instruction.line
            for name, value in pairs(instruction):
                if instruction.name == "LABEL":
                    continue
                if _SECRET_NAME.search(name) and not _NAMES_A_PLACE.search(name):
                    wrong = f"{instruction.name} {name} puts a secret into the image's history, where `docker history` shows it"
                    yield Finding(file, line, wrong, _CURE)
                elif _PASSWORD_IN_URL.search(value):
                    wrong = f"{instruction.name} {name} has a password in its URL"
                    yield Finding(file, line, wrong, _CURE)
            if instruction.name in ("COPY", "ADD"):
                for source in instruction.words[:-1]:
                    if any(_SECRET_FILE.fullmatch(part) for part in PurePosixPath(source).parts):
                        wrong = f"{instruction.name} {source} puts a secret file into a layer"
                        yield Finding(file, line, wrong, _CURE)
            if instruction.name == "RUN" and _PASSWORD_IN_URL.search(instruction.text):
                yield Finding(file, line, "RUN has a password in a URL, which stays in the image's history", _CURE)
            if instruction.name == "RUN":
                yield from _mounted_findings(file, instruction)


def _mounted_findings(file: str, instruction: Instruction) -> Iterator[Finding]:
    """Whether a RUN that is given a secret writes something that may be it, by way of a variable or the environment too."""
    if re.search(r"\b(cp|install|mv)\b[^;&|]*/run/secrets/[^;&|)]*\s/", instruction.text):
        cure = "Read it where it is mounted."
        yield Finding(file, instruction.line, "RUN copies a mounted secret into the layer", cure)
    if not any(flag.startswith("--mount=") and "type=secret" in flag for flag in instruction.flags):
        return
    if written := _WRITES.search(instruction.text):
        wrong = f"RUN is given a secret, and writes into the layer (`{written[0].strip()}`) what may be that secret"
        yield Finding(file, instruction.line, wrong, "Write that in a RUN of its own, which is given no secret.")
