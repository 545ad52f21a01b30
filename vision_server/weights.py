"""Finds a model's weights from its name, and nowhere but where weights may lie.

A model NAME of the model directory is the file NAME.pt, with what it was exported to (NAME_openvino_model/, NAME.onnx,
NAME.engine), or a describer's folder NAME. NAME@VERSION.pt is another version of it, and found as NAME@VERSION.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from serving.logs import get_logger
from vision_server.engines.choose import ENDINGS, NoEngine, ending_of, pick

SHIPPED_DETECTOR = "shapes-detector"
SHIPPED_DESCRIBER = "shapes-describer"
_SHIPPED_DIR = Path(__file__).parent / "shapes" / "weights"
SHIPPED: dict[str, Path] = {
    SHIPPED_DETECTOR: _SHIPPED_DIR / "shapes-detector.pt",
    "shapes-segmenter": _SHIPPED_DIR / "shapes-segmenter.pt",
    "shapes-oriented": _SHIPPED_DIR / "shapes-oriented.pt",
    "shapes-pose": _SHIPPED_DIR / "shapes-pose.pt",
    "shapes-classifier": _SHIPPED_DIR / "shapes-classifier.pt",
    SHIPPED_DESCRIBER: _SHIPPED_DIR / SHIPPED_DESCRIBER,
}
VERSION_DIGITS = 12
_CHUNK_BYTES = 1 << 20
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".xml", ".onnx", ".engine")
_PICKLE = ".pt"

_log = get_logger("weights")


class WeightsMissing(Exception):
    """There are no such weights here; the text says where they were looked for."""


class UnreadableWeights(Exception):
    """The file is there, but no model that can be served; the text says why."""


@dataclass(frozen=True, slots=True)
class Available:
    """A model that lies here; `name` is what loads it. `generates`: it is a describer, else a detector."""

    name: str
    generates: bool


def model_name(name: str) -> str:
    """The name without the ending of a file: `yolo11s.pt` and `yolo11s` are one model."""
    return name.removesuffix(ending_of(name.rpartition("/")[2]))


def list_models(model_dir: Path, prefetched_dir: Path | None = None) -> tuple[Available, ...]:
    """The shipped models and those of the two folders by name; a model and what it was exported to are one.

    Describers are folders with a config.json, also one level down (`llava-hf/llava-1.5-7b-hf`). Reads the disk; off the loop.
    """
    found = {name: Available(name, path.is_dir()) for name, path in SHIPPED.items() if path.exists()}
    for root in _folders(model_dir, prefetched_dir):
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            if path.name.startswith("."):
                continue
            if ending_of(path.name):
                name = model_name(path.name)
                found.setdefault(name, Available(name, generates=False))
            elif path.is_dir():
                for folder in (path, *sorted(path.iterdir())):
                    if (folder / "config.json").is_file():
                        name = folder.relative_to(root).as_posix()
                        found.setdefault(name, Available(name, generates=True))
    return tuple(found.values())


def find_here(name: str, model_dir: Path, prefetched_dir: Path | None = None) -> Path | None:
    """The file or folder of exactly this name in the model directory, else the prefetched one, or a shipped model's; None: none.

    Raises WeightsMissing for a name that leads out of the model directory: a .pt file is a pickle and runs code when
    loaded, so it must be one that the operator put there.
    """
    if name in SHIPPED:
        path = SHIPPED[name]
        if not path.exists():
            raise WeightsMissing(f"the shipped weights are not installed: {path} is missing")
        return path
    for folder in _folders(model_dir, prefetched_dir):
        root = folder.resolve()
        path = (root / name).resolve()
        if not path.is_relative_to(root) or path == root:
            raise WeightsMissing(f"{name!r} leads out of the model directory {folder}; put the model there")
        if path.exists():
            return path
    return None


def find_detector(
    name: str,
    model_dir: Path,
    prefetched_dir: Path | None = None,
    *,
    offline: bool,
    engine: str = "auto",
    device: str = "cpu",
) -> Path:
    """The file or folder of a detector that `engine` on `device` is to load: of what there is, the fastest.

    A name with the ending of an export means that file. An Ultralytics name that is not here is fetched into the model
    directory unless offline. Raises WeightsMissing, also where none of the files is for this engine or device.
    """
    files = detector_files(name, model_dir, prefetched_dir) or [_fetch(name, model_dir, offline=offline)]
    try:
        return pick(files, engine, device)[0]
    except NoEngine as error:
        raise WeightsMissing(str(error)) from error


def detector_files(name: str, model_dir: Path, prefetched_dir: Path | None = None) -> list[Path]:
    """What there is of a detector: the .pt file, its exports, or what has exactly this name; empty: nothing.

    Exports that are older than their .pt file are passed over: they are of other weights.
    """
    exact = find_here(name, model_dir, prefetched_dir)
    if ending_of(name) not in ("", _PICKLE):
        return [exact] if exact is not None else []
    stem = model_name(name)
    shipped = SHIPPED.get(stem)
    named = [find_here(f"{stem}{ending}", model_dir, prefetched_dir) for ending in ENDINGS]
    files = list(dict.fromkeys(path for path in (shipped and find_here(stem, model_dir), *named) if path is not None))
    pickles = [path for path in files if path.suffix == _PICKLE]
    if pickles:
        newest_s = max(_changed_s(path) for path in pickles)
        for old in [path for path in files if _changed_s(path) < newest_s and path not in pickles]:
            _log.warning("an export is older than its .pt file and is passed over; export it again", file=old.name)
            files.remove(old)
    return files or ([exact] if exact is not None else [])


def is_local_describer(name: str, model_dir: Path, prefetched_dir: Path | None = None) -> bool:
    """Whether the describer loads without the hub."""
    try:
        return find_here(name, model_dir, prefetched_dir) is not None
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


def _folders(model_dir: Path, prefetched_dir: Path | None) -> tuple[Path, ...]:
    """Where models may lie, in the order of looking."""
    return (model_dir,) if prefetched_dir is None else (model_dir, prefetched_dir)


def _fetch(name: str, model_dir: Path, *, offline: bool) -> Path:
    """Has Ultralytics fetch a model that it publishes."""
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

    file_name = name if ending_of(name) else f"{name}{_PICKLE}"
    if file_name not in GITHUB_ASSETS_NAMES:
        raise WeightsMissing(f"{name!r} is not shipped, not in {model_dir}, and no model that Ultralytics publishes")
    if offline:
        raise WeightsMissing(f"{name!r} is not in {model_dir}, and VISION_OFFLINE forbids to fetch it")
    model_dir.mkdir(parents=True, exist_ok=True)
    try:
        fetched = Path(attempt_download_asset(str(model_dir / file_name)))
    except Exception as error:  # requests, urllib, assertion: whatever the downloader meets
        raise WeightsMissing(f"{name!r} could not be fetched: {error}") from error
    if not fetched.exists():
        raise WeightsMissing(f"{name!r} could not be fetched into {model_dir}")
    return fetched


def _changed_s(path: Path) -> float:
    """When the file was written; of a folder, when the last of its files was."""
    return (
        max((file.stat().st_mtime for file in path.iterdir()), default=0.0) if path.is_dir() else path.stat().st_mtime
    )
