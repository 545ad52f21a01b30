"""The memory of models: how much they may take, about how much one will need, and how it goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

# What models leave to everything else: pictures on their way, the CUDA context, the server itself.
_SHARE = 0.9

# Measured on the CPU with yolo11n, s and m at 640 px, alone and in batches of 8, on PyTorch, OpenVINO and ONNX Runtime: an
# image's activations take 0.024 to 0.048 bytes for each pixel and each root of a byte of weights (a wider network has more
# channels in proportion, weights in square), and a network takes about 10 MB besides its weights.
_ACTIVATION_BYTES = 0.0366
_FRAME_BYTES = 10_000_000
# Ultralytics trains and serves at this size unless told otherwise; a model tells its own only once it is loaded.
USUAL_SIDE_PX = 640

# Bytes for each parameter. bitsandbytes quantises linear layers alone; of LLaVA 1.5's 7.06 billion parameters 6.8 lie in such,
# the others keep 16 bits.
_PARAMETER_BYTES = {"nf4": 0.58, "int8": 1.04}
# The cache of the tokens and the activations, as a share of the weights: a guess, for it depends on what is asked.
_CACHE_SHARE = 0.2


def limit_bytes(devices: Sequence[str]) -> int:
    """What all models together may take on each device: 90 % of the smallest GPU, or of the memory that is free now."""
    gpus = [device for device in devices if device.startswith("cuda")]
    if gpus:
        import torch

        return int(_SHARE * min(torch.cuda.mem_get_info(device)[1] for device in gpus))
    return int(_SHARE * free_bytes())


def free_bytes() -> int:
    """Memory that this process may still take: the machine's, or its container's where that is less."""
    return min([int(psutil.virtual_memory().available), *_container_free_bytes(Path("/sys/fs/cgroup"))])


def detector_bytes(weights_bytes: int, *, side_px: int, images: int, value_bytes: int) -> int:
    """About what a detector takes with `images` of them computed at once; `value_bytes`: 4 for fp32, 2 for fp16."""
    activations = images * side_px * side_px * math.sqrt(weights_bytes) * _ACTIVATION_BYTES * value_bytes / 4
    return int(weights_bytes + activations + _FRAME_BYTES)


def detector_weights_bytes(path: Path, *, value_bytes: int) -> int:
    """About what the weights of a file or an exported folder take; Ultralytics' .pt files have 16 bits a number."""
    size_bytes = (
        path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    )
    return size_bytes * value_bytes // 2 if path.suffix == ".pt" else size_bytes


def describer_bytes(weights_bytes: int) -> int:
    """About what a describer takes, its caches included."""
    return int(weights_bytes * (1 + _CACHE_SHARE))


def describer_weights_bytes(folder: Path, *, quantization: str, value_bytes: int) -> int:
    """About what a describer's weights take: their number is in the safetensors' headers, else guessed from 16 bits each."""
    parameters = sum(_parameters(file) for file in folder.glob("*.safetensors"))
    parameters = parameters or sum(file.stat().st_size // 2 for file in folder.glob("*.bin"))
    return int(parameters * _PARAMETER_BYTES.get(quantization, value_bytes))


def give_back() -> None:
    """Returns what nobody uses any more: Python's cycles, torch's cache, the C library's free pages. Blocks; off the loop."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    # serving.process lets glibc keep up to 512 MB of freed memory for the next large message; after a model this is too much.
    with suppress(OSError, AttributeError):  # another C library: it keeps what it keeps
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _parameters(file: Path) -> int:
    """Numbers in a safetensors file (8 bytes of length, then JSON with each tensor's type and place)."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _container_free_bytes(root: Path) -> list[int]:
    """What the control group of this process leaves free, version 2 or 1; empty: it sets no limit, or there is none."""
    for limit_file, used_file, stat_file, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            limit, used = int((root / limit_file).read_text()), int((root / used_file).read_text())
            stat = dict(line.split() for line in (root / stat_file).read_text().splitlines())
        except (OSError, ValueError):  # not this version, or `max`: no limit
            continue
        # Pages of files that were read are given up when memory is wanted.
        return [max(0, limit - used + int(stat.get(cache, 0)))]
    return []
