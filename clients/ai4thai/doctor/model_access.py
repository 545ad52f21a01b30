"""Will the models be found that the settings name: here, in the hub's cache, on the hub, on another server?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx

from ai4thai.doctor.findings import Finding, Level, Situation

_ENDINGS: Final = ("", ".pt", ".onnx", ".engine", "_openvino_model", ".safetensors")
_INCLUDED: Final = "shapes-"
_ASK_S = 4.0
_YOLO_HOST = "https://github.com/ultralytics/assets"


def hub_cache(situation: Situation) -> Path:
    """Where Hugging Face's libraries keep what they have fetched."""
    env = situation.env
    if folder := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder)
    return _hub_home(situation) / "hub"


def check_models(situation: Situation) -> Iterator[Finding]:
    """Every model of VISION_DETECTOR and VISION_DESCRIBER."""
    for name in _names(situation, "VISION_DETECTOR", "shapes-detector"):
        yield _detector(situation, name)
    describers = _names(situation, "VISION_DESCRIBER", "shapes-describer")
    yield from _check_token(situation, any(not _is_near(situation, name) for name in describers))
    for name in describers:
        yield _describer(situation, name)


def _detector(situation: Situation, name: str) -> Finding:
    if place := _local(situation, name):
        return Finding("models", Level.OK, f"{name}: {place}")
    models = situation.data_dir / "models"
    if situation.says("VISION_OFFLINE"):
        return Finding(
            "models",
            Level.FAILURE,
            f"{name}: not in {models}, and VISION_OFFLINE is set",
            f"Put its file into {models}.",
        )
    if (problem := _reach(_YOLO_HOST)) is not None:
        return Finding(
            "models",
            Level.FAILURE,
            f"{name}: not in {models}, and it cannot be fetched: {problem}",
            f"Put its file into {models}, or let this machine reach github.com (HTTPS_PROXY).",
        )
    return Finding("models", Level.OK, f"{name}: fetched from Ultralytics at the first start, if they publish it")


def _describer(situation: Situation, name: str) -> Finding:
    if "openai+" in name:
        return _remote(situation, name)
    if place := _local(situation, name):
        return Finding("models", Level.OK, f"{name}: {place}")
    cached = hub_cache(situation) / f"models--{name.replace('/', '--')}" / "snapshots"
    if cached.is_dir() and any((snapshot / "config.json").exists() for snapshot in cached.iterdir()):
        return Finding("models", Level.OK, f"{name}: in the hub's cache {hub_cache(situation)}")
    for variable in ("VISION_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if situation.says(variable):
            return Finding(
                "models",
                Level.FAILURE,
                f"{name}: not on this machine, and {variable} is set",
                f"Unset {variable} for the first start, or put the model into {situation.data_dir / 'models' / name}.",
            )
    return _on_hub(situation, name)


def _on_hub(situation: Situation, name: str) -> Finding:
    endpoint = situation.env.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    token, _ = _token(situation)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    page = f"{endpoint}/{name}"
    try:
        answer = httpx.head(f"{page}/resolve/main/config.json", headers=headers, timeout=_ASK_S)
    except httpx.HTTPError as error:
        return Finding(
            "models",
            Level.FAILURE,
            f"{name}: not on this machine, and {endpoint} cannot be reached: {error or type(error).__name__}",
            "Let this machine reach it (HTTPS_PROXY, HF_ENDPOINT for a mirror), or fetch the model elsewhere: "
            f"hf download {name} --local-dir {situation.data_dir / 'models' / name}",
        )
    reason = answer.headers.get("x-error-code", "")
    if answer.status_code < 400:
        return Finding("models", Level.OK, f"{name}: on {endpoint}, fetched at the first start")
    if reason == "GatedRepo" or (answer.status_code == 403 and token):
        cure = f"Accept its terms at {page} with the account of the token" + ("." if token else ", and set HF_TOKEN.")
        return Finding("models", Level.FAILURE, f"{name}: gated, and this machine has no access", cure)
    if answer.status_code == 401 and token and reason != "RepoNotFound":
        return Finding(
            "models", Level.FAILURE, f"{name}: the hub refuses the token", "Make a new one, with the right to read."
        )
    if answer.status_code in (401, 404):
        return Finding(
            "models",
            Level.FAILURE,
            f"{name}: there is no such model on {endpoint}, or it is private"
            + ("" if token else ", and no HF_TOKEN is set"),
            "Look at the name; for a private model set HF_TOKEN.",
        )
    return Finding("models", Level.WARNING, f"{name}: {endpoint} answers HTTP {answer.status_code}", "Try again later.")


def _remote(situation: Situation, name: str) -> Finding:
    url = name.partition("openai+")[2].partition("#")[0].rstrip("/")
    key = situation.secret("VISION_REMOTE_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url}/models", headers=headers, timeout=_ASK_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Finding(
            "models",
            Level.FAILURE,
            f"{name}: {error or type(error).__name__}",
            "Start that server, or correct its address.",
        )
    if answer.status_code in (401, 403):
        return Finding(
            "models", Level.FAILURE, f"{name}: it refuses the key", "Set VISION_REMOTE_API_KEY to one that it knows."
        )
    if answer.status_code != 200:
        cure = "Its address ends where /models hangs, mostly with /v1."
        return Finding("models", Level.FAILURE, f"{name}: {url}/models answers HTTP {answer.status_code}", cure)
    return Finding("models", Level.OK, f"{name}: answers")


def _check_token(situation: Situation, is_needed: bool) -> Iterator[Finding]:
    token, place = _token(situation)
    named = situation.env.get("HF_TOKEN_PATH")
    if named and not Path(named).is_file():
        yield Finding(
            "models",
            Level.FAILURE,
            f"HF_TOKEN_PATH is {named}, and there is no such file",
            "Correct it, or set HF_TOKEN.",
        )
    elif token:
        form = "" if token.startswith("hf_") else ", which does not look like one of Hugging Face (hf_…)"
        yield Finding(
            "models", Level.WARNING if form else Level.OK, f"a token from {place}{form}", "Look at it." if form else ""
        )
    elif is_needed:
        yield Finding("models", Level.NOTE, "no HF_TOKEN: public models only")


def _token(situation: Situation) -> tuple[str, str]:
    """The hub's token and where it is from; empty: there is none."""
    if token := situation.secret("HF_TOKEN").strip():
        return token, "HF_TOKEN" if situation.env.get("HF_TOKEN") else "the secret hf_token"
    path = Path(situation.env.get("HF_TOKEN_PATH") or _hub_home(situation) / "token")
    try:
        return path.read_text("utf-8").strip(), str(path)
    except (OSError, ValueError):
        return "", ""


def _hub_home(situation: Situation) -> Path:
    if home := situation.env.get("HF_HOME"):
        return Path(home)
    cache = situation.env.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "huggingface"


def _is_near(situation: Situation, name: str) -> bool:
    return "openai+" in name or bool(_local(situation, name))


def _local(situation: Situation, name: str) -> str:
    """Where a model lies on this machine; empty: nowhere."""
    if name.startswith(_INCLUDED) and "/" not in name:
        return "included"
    stem = name.removesuffix(".pt")
    folders = [situation.data_dir / "models"]
    if prefetched := situation.env.get("VISION_PREFETCHED_DIR"):
        folders.append(Path(prefetched))
    files = [folder / f"{stem}{ending}" for folder in folders for ending in _ENDINGS]
    found = next((file for file in files if file.exists()), None)
    return f"in {found.parent}" if found is not None else ""


def _names(situation: Situation, variable: str, default: str) -> list[str]:
    return [name for part in situation.env.get(variable, default).split(",") if (name := part.strip())]


def _reach(url: str) -> str | None:
    """Why the host of this URL cannot be reached; None: it can."""
    try:
        httpx.head(url, timeout=_ASK_S)
    except httpx.HTTPError as error:
        return f"{urlsplit(url).hostname}: {error or type(error).__name__}"
    return None
