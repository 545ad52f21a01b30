"""What must be true of a running image; each check raises AssertionError with what is wrong."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.image.engines import Config, Container

ROOT = Path(__file__).resolve().parents[2]
SCENE = ROOT / "clients" / "ai4thai" / "samples" / "scene-01.jpg"
# What computes on a GPU, or is large and of no use to a queue.
NOT_IN_THE_QUEUE = (
    *("torch", "torchvision", "transformers", "accelerate", "bitsandbytes", "ultralytics"),
    *("openvino", "onnxruntime", "tensorrt", "numpy"),
)
LABELS = ("title", "description", "licenses", "version", "revision", "created")

_WRITABLE = """
import os, sys, tempfile
def writable(folder):
    try:
        with tempfile.TemporaryFile(dir=folder): return True
    except OSError: return False
print(os.getuid(), os.getgid(), *(folder for folder in sys.argv[1:] if writable(folder)))
"""
# A stream without an end, as of a camera; SIGTERM comes in the middle.
_STREAM = """
import sys, time
from pathlib import Path
import ai4thai
scene = next(Path(ai4thai.__file__).parent.glob("samples/scene-01.*")).read_bytes()
sent = answered = 0
def frames():
    global sent
    while True:
        time.sleep(0.1)
        sent += 1
        yield scene
with ai4thai.VisionClient(sys.argv[1]) as client:
    try:
        for result in client.detect_stream(frames(), timeout_s=60):
            answered += result.detection is not None
            if answered == 5:
                print("begun", flush=True)
    except ai4thai.Unavailable as error:
        print("drained", sent, answered, error, flush=True)
"""


def says_who_it_is(config: Config) -> None:
    """The labels, an init, SIGTERM, a numeric user."""
    missing = [name for name in LABELS if not config.labels.get(f"org.opencontainers.image.{name}")]
    assert not missing, f"labels are missing: {', '.join(missing)}"
    assert config.user == "10001:10001", f"the user is {config.user!r}, not 10001:10001"
    assert config.entrypoint[:1] == ["tini"], f"no init: the entrypoint is {config.entrypoint}"
    assert config.stop_signal in ("SIGTERM", "15"), f"STOPSIGNAL is {config.stop_signal!r}"


def writes_only_where_it_may(container: Container) -> None:
    """As user 10001, in /data and /tmp and nowhere else."""
    said = _run(container, ["python", "-c", _WRITABLE, "/", "/app", "/opt/venv", "/etc", "/models", "/data", "/tmp"])
    assert said.split() == ["10001", "10001", "/data", "/tmp"], f"user, group, writable folders: {said}"


def becomes_healthy(container: Container, check: Sequence[str], within_s: float) -> None:
    """By the image's own HEALTHCHECK."""
    assert check, "the image has no HEALTHCHECK"
    until_s = time.monotonic() + within_s
    while (said := container.inside(list(check))).returncode:
        assert container.running(), "its main process has ended; the log tells why"
        assert time.monotonic() < until_s, f"not healthy within {within_s:g} s: {said.stdout}{said.stderr}"
        time.sleep(0.5)


def computes_on_a_gpu(container: Container, libraries: Sequence[str]) -> None:
    """The libraries import there, and torch sees a GPU."""
    _run(container, ["python", "-c", f"import {', '.join(libraries)}; assert torch.cuda.is_available(), 'no GPU'"])


def has_what_it_needs(container: Container) -> None:
    """`pip check` in the image's environment."""
    _run(container, ["pip", "check"])


def runs(container: Container, command: list[str]) -> None:
    """The command ends with 0."""
    _run(container, command)


def has_no_gpu_library(container: Container) -> None:
    """Neither a package nor a module of those that the queue is to go without, nor the vision server."""
    listed = json.loads(_run(container, ["pip", "list", "--format", "json", "--disable-pip-version-check"]))
    found = [p["name"] for p in listed if p["name"] in NOT_IN_THE_QUEUE or p["name"].startswith("nvidia")]
    assert not found, f"the queue has {', '.join(found)}"
    code = f"from importlib.util import find_spec; print(*filter(find_spec, {[*NOT_IN_THE_QUEUE, 'vision_server']}))"
    modules = _run(container, ["python", "-c", code]).strip()
    assert not modules, f"the queue can import {modules}"


def answers_http(address: str, paths: Sequence[str]) -> None:
    """Each of the paths with 200."""
    for path in paths:
        get(f"http://{address}{path}")


def answers_grpcurl(address: str, service: str) -> None:
    """By reflection, where grpcurl is installed."""
    grpcurl = shutil.which("grpcurl") or shutil.which("grpcurl", path=str(ROOT / ".venv" / "bin"))
    if grpcurl is None:
        print("      (grpcurl is not installed: gRPC is asked by the image's own probe only)")
        return
    body = json.dumps({"service": service})
    for arguments, wanted in (
        ([address, "list"], service),
        (["-d", body, address, "grpc.health.v1.Health/Check"], '"SERVING"'),
    ):
        said = subprocess.run([grpcurl, "-plaintext", *arguments], capture_output=True, text=True, timeout=60)
        assert said.returncode == 0, f"grpcurl: {said.stderr.strip()}"
        assert wanted in said.stdout, f"grpcurl {arguments[-1]} says {said.stdout!r}"


def finds_objects(address: str) -> None:
    """In a real picture, by JSON over HTTP."""
    content = base64.b64encode(SCENE.read_bytes()).decode()
    answer = get(f"http://{address}/v1/vision:detect", {"image": {"content": content}})
    assert answer.get("detections"), f"nothing was found in {SCENE.name}: {answer}"


def describes(address: str) -> None:
    """The same picture in words, by OpenAI's interface."""
    url = f"data:image/jpeg;base64,{base64.b64encode(SCENE.read_bytes()).decode()}"
    parts = [{"type": "text", "text": "What is in the picture?"}, {"type": "image_url", "image_url": {"url": url}}]
    models = get(f"http://{address}/v1/models")["data"]
    body = {"model": models[0]["id"], "max_tokens": 20, "messages": [{"role": "user", "content": parts}]}
    answer = get(f"http://{address}/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"].strip(), f"no words: {answer}"


def drains(container: Container, port: int, within_s: float) -> None:
    """SIGTERM while a stream is in flight: what was read of it is answered, it is told to go elsewhere, the exit code is 0."""
    streaming = container.begin_inside(["python", "-c", _STREAM, f"localhost:{port}"])
    assert streaming.stdout is not None
    try:
        first = streaming.stdout.readline().strip()
        assert first == "begun", f"the stream did not begin: {first!r}"
        container.terminate()
        word, sent, answered, *said = streaming.stdout.readline().split()
    except ValueError:
        raise AssertionError("the stream was cut without a word") from None
    finally:
        streaming.kill()
        streaming.wait()
    assert (word, "shutting" in said) == ("drained", True), f"the stream ended with {word} {' '.join(said)}"
    # One may have been on its way when the server stopped to read.
    assert int(answered) >= int(sent) - 1, f"of {sent} frames {answered} were answered"
    ends_in_order(container, within_s)


def stops(container: Container, within_s: float) -> None:
    """SIGTERM ends it in order."""
    container.terminate()
    ends_in_order(container, within_s)


def ends_in_order(container: Container, within_s: float) -> None:
    """Exit code 0, soon."""
    try:
        code = container.wait(within_s)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it has not ended {within_s:g} s after SIGTERM") from None
    assert code == 0, f"its exit code after SIGTERM is {code}"


def get(url: str, body: object = None) -> dict[str, Any]:
    """The JSON of a page, or of a POST."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.code} {error.read().decode(errors='replace')[:300]}") from None
    except OSError as error:
        raise AssertionError(f"{url}: {error}") from None


def _run(container: Container, command: list[str]) -> str:
    said = container.inside(command)
    assert said.returncode == 0, f"{' '.join(command[:2])}: {(said.stdout + said.stderr).strip()}"
    return said.stdout
