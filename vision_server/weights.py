"""Finds a model's weights from its name, and nowhere but where weights may lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

SHIPPED_DETECTOR = "shapes-detector"
SHIPPED_DESCRIBER = "shapes-describer"
SHIPPED: dict[str, Path] = {
    SHIPPED_DETECTOR: Path(__file__).parent / "shapes" / "weights" / "shapes-detector.pt",
    SHIPPED_DESCRIBER: Path(__file__).parent / "shapes" / "weights" / "shapes-describer",
}
VERSION_DIGITS = 12
_CHUNK_BYTES = 1 << 20


class WeightsMissing(Exception):
    """There are no such weights here; the text says where they were looked for."""


def find_here(name: str, model_dir: Path) -> Path | None:
    """The file or folder of a shipped model, or of one in the model directory; None: neither.

    Raises WeightsMissing for a name that leads out of the model directory: a .pt file is a pickle and runs code when
    loaded, so it must be one that the operator put there.
    """
    if name in SHIPPED:
        path = SHIPPED[name]
        if not path.exists():
            raise WeightsMissing(f"the shipped weights are not installed: {path} is missing")
        return path
    root = model_dir.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or path == root:
        raise WeightsMissing(f"{name!r} leads out of the model directory {model_dir}; put the model there")
    return path if path.exists() else None


def find_detector(name: str, model_dir: Path, *, offline: bool) -> Path:
    """The file of a detector; an Ultralytics name that is not here is fetched into the model directory unless offline."""
    path = find_here(name, model_dir)
    if path is not None:
        return path
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

    if name not in GITHUB_ASSETS_NAMES:
        raise WeightsMissing(f"{name!r} is not shipped, not in {model_dir}, and no model that Ultralytics publishes")
    if offline:
        raise WeightsMissing(f"{name!r} is not in {model_dir}, and VISION_OFFLINE forbids to fetch it")
    model_dir.mkdir(parents=True, exist_ok=True)
    try:
        fetched = Path(attempt_download_asset(str(model_dir / name)))
    except Exception as error:  # requests, urllib, assertion: whatever the downloader meets
        raise WeightsMissing(f"{name!r} could not be fetched: {error}") from error
    if not fetched.exists():
        raise WeightsMissing(f"{name!r} could not be fetched into {model_dir}")
    return fetched


def find_describer(name: str, model_dir: Path) -> str:
    """The folder of a describer, or the Hugging Face id itself when the model is not here."""
    path = find_here(name, model_dir)
    return name if path is None else str(path)


def is_local_describer(name: str, model_dir: Path) -> bool:
    """Whether the describer loads without the hub."""
    try:
        return find_here(name, model_dir) is not None
    except WeightsMissing:
        return True  # it will fail to load, and needs no network for that


def short_hash(path: Path) -> str:
    """The first digits of the SHA-256 over a file, or over a folder's weight files in their names' order."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:VERSION_DIGITS]


_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".xml", ".onnx", ".engine")
