"""What the operator can set about the vision server."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from vision_server.describers.addresses import RemoteAddress, read_describers

# `host` or `host:port`, IPv6 in brackets: no scheme, path, user or wildcard.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s/\\@:*?#\[\]]+)(:\d{1,5})?")

_QUANTIZATIONS = ("auto", "none", "nf4", "int8")


def default_data_dir() -> Path:
    """`ai4thai` in the user's data directory (XDG_DATA_HOME, `~/.local/share` where that is not set)."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "ai4thai"


class VisionSettings(BaseSettings):
    """Settings of the vision server; environment variables are named VISION_…, but for the two named in full."""

    model_config = SettingsConfigDict(env_prefix="VISION_", extra="ignore", populate_by_name=True)

    port: int = Field(
        2001,
        ge=0,
        le=65535,
        validation_alias=AliasChoices("VISION_SERVICE_PORT"),
        description="VISION_SERVICE_PORT: the port for gRPC and HTTP. 0 takes a free one and logs it.",
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        validation_alias=AliasChoices("AI4THAI_DATA_DIR"),
        description="AI4THAI_DATA_DIR: where models and caches lie; models in its folder `models`.",
    )
    prefetched_dir: Path | None = Field(
        None,
        description="VISION_PREFETCHED_DIR: a second folder of models, looked at after the model directory and never written: "
        "what an image brings with it. Empty: none.",
    )

    detector: str = Field(
        "shapes-detector",
        description="The detectors, separated by commas; the first answers requests that name none. `shapes-detector` is "
        "shipped; other names are files or folders of the model directory, or Ultralytics models such as `yolo11s.pt`, "
        "fetched into it unless VISION_OFFLINE. Empty: no detector.",
    )
    describer: str = Field(
        "shapes-describer",
        description="The describers, separated by commas; the first is the default. `shapes-describer` is shipped; other "
        "names are folders of the model directory, or Hugging Face ids such as `llava-hf/llava-1.5-7b-hf`, or run on an "
        "OpenAI-compatible server (vLLM): `openai+http://HOST:8000/v1`, with `#MODEL` behind it unless the first that the server "
        "lists is meant, and `NAME=` before it unless it is to be called MODEL, or `remote`. Empty: none.",
    )
    remote_api_key: SecretStr = Field(
        SecretStr(""),
        description="The key that every remote describer's server is sent (`Authorization: Bearer`). Empty: none.",
    )
    max_remote_generations: int = Field(
        64, ge=1, description="Generations that one remote describer's server is asked at once; more wait here."
    )
    remote_silence_s: float = Field(
        120.0,
        gt=0,
        description="A remote describer's server that says nothing for this long, before an answer or within one, is given up: "
        "UNAVAILABLE.",
    )
    quantization: str = Field(
        "auto",
        description="How describers hold their weights (bitsandbytes): `none`, `nf4` (4 bits) or `int8`. `auto`: nf4 on CUDA for "
        "describers that are not shipped, none otherwise. By model with commas: `nf4,typhoon=int8`.",
    )
    hf_token: SecretStr = Field(
        SecretStr(""),
        validation_alias=AliasChoices("HF_TOKEN"),
        description="HF_TOKEN, or the file hf_token among the secrets: the Hugging Face token that models behind a licence are "
        "fetched with. Empty: none, or that of `hf auth login`.",
    )
    offline: bool = Field(False, description="Never fetch a model; what is not on this machine fails to load.")
    device: str = Field(
        "auto",
        description="`auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:1`; several with commas (`cuda:0,cuda:1`) "
        "share each detector's images; describers run on the first.",
    )
    engine: Literal["auto", "pytorch", "onnxruntime", "openvino", "tensorrt"] = Field(
        "auto",
        description="What computes detectors. `auto`: on the CPU OpenVINO where it is installed, on a GPU an exported TensorRT "
        "engine where there is one, else PyTorch.",
    )
    detector_input_px: int = Field(
        0, ge=0, le=4096, description="Side of the square images are fitted into. 0: what the model was trained at."
    )

    executors: int = Field(
        0,
        ge=0,
        description="Batches that a detector computes side by side. 0: on the CPU one more than there are cores, on a GPU one.",
    )
    torch_threads: int = Field(
        0,
        ge=0,
        description="Threads of one forward pass on the CPU, whatever the engine. 0: one, since batches side by side use the "
        "cores better.",
    )
    gpu_decode: bool = Field(
        False, description="Decode plain JPEGs on the GPU (nvJPEG, through torchvision) where there is one."
    )
    decode_threads: int = Field(0, ge=0, description="Threads that decode images. 0: as many as cores, at most 8.")

    max_image_bytes: int = Field(20_000_000, ge=1, description="Bytes of one image file.")
    image_url_hosts: str = Field(
        "",
        description="Hosts that images may be fetched from when a chat (/v1/chat/completions) names an http(s) URL, separated by "
        "commas: `cdn.example`, `files.internal:8080`. Exactly these: no subdomains, no redirects. Empty: none.",
    )
    max_image_pixels: int = Field(
        50_000_000, ge=1, description="Pixels of one image, read from its header before it is decoded."
    )
    max_queued_images: int = Field(
        256,
        ge=1,
        description="Images being worked on or waiting, in the whole server; more get RESOURCE_EXHAUSTED. Callers of priority "
        "STANDARD may fill 90 % of it, BATCH 75 %; frames of streams, which wait instead, one step less.",
    )
    max_queued_bytes: int = Field(
        1 << 30,
        ge=1,
        description="Bytes that those images take, encoded and decoded; more get RESOURCE_EXHAUSTED. As many again may the "
        "questions take that a describer has not read yet.",
    )
    max_wait_ms: float = Field(
        5000.0,
        ge=0,
        description="When those ahead of an image take longer than this, by what the last batches took, it is refused before it "
        "is decoded and told when to come back; frames of streams wait instead. 0: VISION_MAX_QUEUED_IMAGES alone decides.",
    )
    max_batch: int = Field(8, ge=1, le=256, description="Images in one forward pass.")
    max_delay_ms: float = Field(
        2.0,
        ge=0,
        description="When a batch ends and few images wait, the next one gathers until its oldest image has waited this "
        "long. An idle detector never waits. 0: it takes what is there.",
    )
    priority_ageing_ms: float = Field(
        500.0,
        gt=0,
        description="A waiting image moves up one priority each time that it has waited this long, so that none waits for ever.",
    )
    stuck_after_s: float = Field(
        60.0,
        gt=0,
        description="A batch that computes longer than this is given up: its callers are told, its executor is built anew; the "
        "second time the server fails its liveness, so that it is started again. A describer does so at once, after a step as "
        "long (on the CPU ten times as long).",
    )
    max_streams: int = Field(256, ge=1, description="DetectStream calls at once; more get RESOURCE_EXHAUSTED.")
    max_stream_in_flight: int = Field(16, ge=1, le=1024, description="Frames of one stream worked on at once.")

    max_model_bytes: int = Field(
        0,
        ge=0,
        description="Memory that all models together may take; a model that does not fit is refused before it is loaded. "
        "0: 90 % of the GPU's, or of the memory that is free at the start on the CPU.",
    )

    model_control: bool = Field(
        True,
        description="Whether callers may load and unload models (LoadModel, UnloadModel). False: PERMISSION_DENIED.",
    )

    max_new_tokens: int = Field(1024, ge=1, description="Tokens of one generation.")
    max_queued_generations: int = Field(
        64, ge=1, description="Generations waiting for one describer; more get RESOURCE_EXHAUSTED."
    )
    max_running_generations: int = Field(
        16,
        ge=1,
        description="Generations that one describer steps together; a step takes hardly longer for many than for one.",
    )
    max_cache_bytes: int = Field(
        0,
        ge=0,
        description="Memory for the tokens of one describer's running conversations; one whose prompt and answer do not fit "
        "waits, or is refused when it would not fit alone. 0: half of the free memory, at most what all places can use.",
    )
    prefill_tokens: int = Field(
        0,
        ge=0,
        description="Tokens of new prompts read between two tokens of the running answers: more begins new answers sooner, less "
        "keeps running ones even. 0: 512 on a GPU, 128 on the CPU.",
    )
    max_image_cache_bytes: int = Field(
        256 << 20,
        ge=0,
        description="Memory for what one describer's vision tower made of the last pictures, found again by content. 0: none.",
    )
    max_images_per_request: int = Field(8, ge=1, description="Images in one conversation.")
    max_text_bytes: int = Field(65_536, ge=1, description="Bytes of all texts in one conversation, UTF-8.")

    @property
    def model_dir(self) -> Path:
        """Where weights are loaded from and fetched to; besides it only the shipped ones and prefetched_dir's are loaded: a .pt
        file is a pickle and runs code.
        """
        return self.data_dir / "models"

    @field_validator("prefetched_dir", mode="before")
    @classmethod
    def _none_when_empty(cls, folder: object) -> object:
        return folder or None

    @property
    def detectors(self) -> tuple[str, ...]:
        """The detectors' names, the default first."""
        return _names(self.detector)

    @field_validator("describer")
    @classmethod
    def _describers(cls, listed: str) -> str:
        read_describers(_names(listed))
        return listed

    @property
    def describers(self) -> Mapping[str, RemoteAddress | None]:
        """The describers by name, the default first; those with an address run there."""
        return read_describers(_names(self.describer))

    @property
    def local_describers(self) -> tuple[str, ...]:
        """The names of those that run in this process."""
        return tuple(name for name, address in self.describers.items() if address is None)

    @field_validator("image_url_hosts")
    @classmethod
    def _hosts(cls, listed: str) -> str:
        for host in _names(listed):
            if not _HOST.fullmatch(host):
                raise ValueError(f"{host!r} is no host; name hosts as `cdn.example` or `files.internal:8080`")
        return listed

    @property
    def image_hosts(self) -> tuple[str, ...]:
        """The hosts, `host` or `host:port`, that images may be fetched from."""
        return _names(self.image_url_hosts)

    @field_validator("quantization")
    @classmethod
    def _known_quantization(cls, value: str) -> str:
        for entry in _names(value):
            mode = entry.rpartition("=")[2].strip()
            if mode not in _QUANTIZATIONS:
                raise ValueError(f"{mode!r} is none of {', '.join(_QUANTIZATIONS)}")
        return value

    def quantization_of(self, name: str) -> str:
        """`auto`, `none`, `nf4` or `int8`: the model's own entry, else the one without a name."""
        modes = {
            model.strip(): mode.strip() for model, _, mode in (e.rpartition("=") for e in _names(self.quantization))
        }
        return modes.get(name, modes.get("", "auto"))

    @property
    def core_count(self) -> int:
        """Cores that this process may use: those it is bound to, or its container's share of them where that is less."""
        bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(bound, container_cores(Path("/sys/fs/cgroup")) or bound)


def container_cores(root: Path) -> int | None:
    """The whole cores, at least 1, that the control group below `root` (version 2 or 1) may use at once; None: it sets no limit.

    `docker run --cpus 4` takes time away, not cores: a thread for each core of the machine would only wait for the next period.
    """
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = (int(word) for file in files for word in (root / file).read_text().split())
        except (OSError, ValueError):  # not this version, or `max`: no limit
            continue
        return max(1, quota // period) if quota > 0 else None
    return None


def _names(listed: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
