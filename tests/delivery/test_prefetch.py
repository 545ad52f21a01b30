"""Models that an image brings along: fetched with a token that stays out of sight, found by the server beside its own folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.processes import ROOT
from vision_server.catalog import Catalog
from vision_server.loading import Loader
from vision_server.settings import VisionSettings
from vision_server.weights import SHIPPED, SHIPPED_DESCRIBER, SHIPPED_DETECTOR, WeightsMissing, find_detector, find_here

MODEL = "somebody/tiny-llava"
TOKEN = "hf_not-a-real-one"  # pragma: allowlist secret
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """As much of huggingface.co as fetching one model takes; it asks for the token."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.fetched: list[str] = []
        super().__init__(("127.0.0.1", 0), _Pages)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Pages(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._answer(401, b"", {"x-error-code": "GatedRepo", "x-error-message": "Access to it is restricted."})
        elif path.startswith(f"/api/models/{MODEL}/tree"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            self._answer(200, json.dumps(entries).encode(), {})
        elif path.startswith(f"/api/models/{MODEL}"):
            listed = [{"rfilename": name} for name in self.server.files]
            self._answer(200, json.dumps({"id": MODEL, "sha": COMMIT, "siblings": listed}).encode(), {})
        else:
            name = path.removeprefix(f"/{MODEL}/resolve/{COMMIT}/")
            content = self.server.files[name]
            if self.command == "GET":
                self.server.fetched.append(name)
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._answer(200, content, {"etag": etag, "x-repo-commit": COMMIT, "accept-ranges": "bytes"})

    do_HEAD = do_GET

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    folder = SHIPPED[SHIPPED_DESCRIBER]
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    with Hub({**files, "pytorch_model.bin": b"the same weights as a pickle", "model.gguf": b"for llama.cpp"}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def prefetch(hub_url: str, into: Path, data: Path, secrets: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vision_server.prefetch", "--into", str(into), MODEL],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "PYTHONPATH": os.pathsep.join([str(ROOT / "clients"), str(ROOT)]),
            "HF_ENDPOINT": hub_url,
            "HF_HOME": str(data / "huggingface"),
            "AI4THAI_DATA_DIR": str(data),
            "AI4THAI_SECRETS_DIR": str(secrets),
        },
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_gated_model_is_fetched_by_a_secret_and_found_by_its_name(hub: Hub, tmp_path: Path) -> None:
    models, data, secrets = tmp_path / "models", tmp_path / "data", tmp_path / "secrets"
    secrets.mkdir()

    refused = prefetch(hub.url, models, data, secrets)
    assert refused.returncode == 1
    assert MODEL in refused.stderr
    assert not (models / MODEL).exists(), "half a model is left, which would be found and fail to load"

    (secrets / "hf_token").write_text(TOKEN)
    done = prefetch(hub.url, models, data, secrets)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.fetched
    assert not {"pytorch_model.bin", "model.gguf"} & set(hub.fetched), "the same weights were fetched twice"
    left = [file for file in tmp_path.rglob("*") if file.is_file() and file.parent != secrets]
    assert not [file for file in left if TOKEN.encode() in file.read_bytes()], "the token lies beside the model"

    settings = VisionSettings(data_dir=data, prefetched_dir=models, describer=MODEL, detector="")
    source = Loader(settings, print, print).find(MODEL, True, fetch=False, hub=True)
    assert source.path == models / MODEL


def test_a_hub_that_is_away_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    away = prefetch(url, tmp_path / "models", tmp_path / "data", tmp_path)
    assert away.returncode == 1
    assert f"{MODEL}: could not be fetched: " in away.stderr
    assert "Traceback" not in away.stderr
    assert not list((tmp_path / "models").rglob("*.*"))


async def test_what_an_image_brings_is_listed_and_goes_behind_the_operators_own(tmp_path: Path) -> None:
    brought, own = tmp_path / "brought", tmp_path / "own"
    for folder in (brought, own):
        folder.mkdir()
        shutil.copy(SHIPPED[SHIPPED_DETECTOR], folder / "cams.pt")
    shutil.copy(SHIPPED[SHIPPED_DETECTOR], brought / "gates.pt")

    assert find_detector("gates", own, brought, offline=True) == brought / "gates.pt"
    assert find_detector("cams.pt", own, brought, offline=True) == own / "cams.pt"
    catalog = Catalog(own, brought)
    await catalog.look()
    assert {"cams", "gates"} <= {name.removesuffix(".pt") for name in catalog}


def test_no_name_leads_out_of_what_an_image_brings(tmp_path: Path) -> None:
    (tmp_path / "secret.pt").touch()
    (tmp_path / "brought").mkdir()
    (tmp_path / "brought" / "link.pt").symlink_to(tmp_path / "secret.pt")
    for name in ("../secret.pt", "link.pt"):
        with pytest.raises(WeightsMissing):
            find_here(name, tmp_path / "own", tmp_path / "brought")


def test_an_empty_setting_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISION_PREFETCHED_DIR", "")
    assert VisionSettings().prefetched_dir is None
