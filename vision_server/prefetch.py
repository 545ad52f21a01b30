"""Fetches models into a folder, for an image that brings them along: `python -m vision_server.prefetch --into DIR NAME …`.

A name is what VISION_DETECTOR or VISION_DESCRIBER says: `yolo11s.pt`, `llava-hf/llava-1.5-7b-hf`. The server finds them there by
VISION_PREFETCHED_DIR, without a network. HF_TOKEN, or the file hf_token among the secrets, opens models behind a licence.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from serving.settings import read
from vision_server.network import set_environment
from vision_server.settings import VisionSettings
from vision_server.weights import SHIPPED, WeightsMissing, find_detector, find_here

# The same weights once more, in the formats of other programs.
_FOREIGN = ("*.gguf", "*.onnx*", "*.h5", "*.msgpack", "*.tflite", "*.mlpackage/*", "original/*", "consolidated*")
_PICKLES = ("*.bin", "*.pth", "*.pt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetches one after the other; 1 when one cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m vision_server.prefetch", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--into", type=Path, required=True, metavar="DIR")
    asked = parser.parse_args(arguments)
    settings = read(VisionSettings)
    set_environment(settings.data_dir, fetch_describer=True, hf_token=settings.hf_token.get_secret_value())
    for name in asked.names:
        began_s = time.perf_counter()
        try:
            place = fetch(name, asked.into)
        except WeightsMissing as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(f"{name}: {_megabytes(place):.1f} MB in {place}, {time.perf_counter() - began_s:.0f} s", flush=True)
    return 0


def fetch(name: str, folder: Path) -> Path:
    """Where the model lies then: the file of a detector, the folder of a describer. Raises WeightsMissing."""
    if name in SHIPPED:
        raise WeightsMissing("is shipped with the server; it need not be fetched")
    if "/" not in name:
        return find_detector(name, folder, offline=False)
    return find_here(name, folder) or _fetch_from_hub(name, folder / name)


def _fetch_from_hub(name: str, folder: Path) -> Path:
    """All files of a Hugging Face model, each once: pickles only where there are no safetensors."""
    # Imported late: the environment must be set before.
    from huggingface_hub import HfApi

    # Half a model would be found next time, and fail to load: only a whole one gets the name.
    part = folder.with_name(f".{folder.name}.part")
    try:
        info = HfApi().model_info(name)
        files = [file.rfilename for file in info.siblings or ()]
        has_safetensors = any(file.endswith(".safetensors") for file in files)
        # The revision just asked for: were the model changed meanwhile, the files would not belong together.
        HfApi().snapshot_download(
            name,
            revision=info.sha,
            local_dir=part,
            ignore_patterns=[*_FOREIGN, *(_PICKLES if has_safetensors else ())],
        )
        shutil.rmtree(part / ".cache", ignore_errors=True)  # the hub's own notes about the download
        if not (part / "config.json").is_file():
            raise WeightsMissing("has no config.json: it is no model of transformers")
        part.rename(folder)
    except WeightsMissing:
        raise
    except Exception as error:  # the hub's, those of the HTTP library below it, the disk's: to the caller all the same
        raise WeightsMissing(f"could not be fetched: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


if __name__ == "__main__":
    sys.exit(main())
