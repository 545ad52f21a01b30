"""Where each microsecond of a call goes in the null server: py-spy's samples, sorted by the layer of the code."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ai4thai.bench import Load

from benchmarks.loads import put
from benchmarks.pages import Page, console
from benchmarks.processes import Measured

CALLERS = 64
SIZE_BYTES = 20_000
SECONDS = 10.0
SAMPLES_PER_S = 200

# The innermost frame that fits decides. Files of ours are told by their names, what they call belongs to them.
LAYERS = {
    "metrics": ("prometheus_client", "vision_server/metrics.py", "serving/telemetry.py"),
    "access log": ("serving/logs.py", "serving/access_log.py", "structlog", "_log_call"),
    "admission": ("vision_server/admission.py",),
    "decoder's threads: the hand-over": ("vision_server/images.py", "benchmarks/null_server.py"),
    "batcher and its lanes": ("vision_server/batcher.py", "vision_server/lanes.py", "vision_server/line.py"),
    "the way of an image": ("vision_server/detections.py", "vision_server/models.py", "vision_server/loaded.py"),
    "wire and service": ("vision_server/wire/", "vision_server/service.py", "vision_server/results.py"),
    "interceptors": ("serving/interceptors.py",),
    "front: the relay": ("serving/relay.py", "serving/listener.py"),
    "hand-over between threads (asyncio's futures)": ("asyncio/futures.py", "concurrent/futures"),
    "protobuf": ("_message.abi3",),
    "grpc (cython and core)": ("cygrpc", "grpc/aio"),
}
LOOP = "event loop (uvloop, asyncio)"
GARBAGE = "garbage collector"
# Of every stack: where the process began says nothing.
_ROOTS = ("<module>", "main (", "run (serving", "_serve (serving", "_run_code", "_run_module")


def add_to(page: Page) -> None:
    """Adds the table to the page; without py-spy, or where it may not look into processes, says so."""
    page.head("Where each microsecond goes")
    with tempfile.TemporaryDirectory() as folder, Measured("benchmarks.null_server") as server:
        server.wait_until_ready()
        load = Load(callers=CALLERS, seconds=SECONDS, warm_up_s=0.5)
        console.print(f"the layers of the null server, {CALLERS} callers …")
        before = server.usage.thread_cpu_s()
        report = put(server.address, [os.urandom(SIZE_BYTES)], load)
        after = server.usage.thread_cpu_s()
        cpu_us = {kind: (after[kind] - before[kind]) / report.all_answered_count * 1e6 for kind in after}
        samples = Path(folder) / "samples"
        problem = _sample(server, samples, load)
        if problem:
            page.say(f"Not measured here: {problem}")
            return
        counted = Counter[str]()
        for line in samples.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            frames = stack.split(";")
            if "MainThread" in frames[0]:
                counted[layer_of(frames)] += int(count)
    whole = sum(counted.values())
    page.say(
        f"{CALLERS} callers, {SIZE_BYTES:,} B. The main thread's CPU time for each call, {cpu_us['main']:.0f} µs, is shared "
        f"out by {whole:,} samples of py-spy (native frames, the interpreter's lock held); the other threads' is the kernel's."
    )
    rows = [
        [name, f"{count / whole:.0%}", f"{count / whole * cpu_us['main']:.0f}"] for name, count in counted.most_common()
    ]
    rows.append(["grpc's own threads", "", f"{cpu_us['grpc']:.0f}"])
    rows.append(["Python's other threads: grpc's poller, decoder's threads, lanes", "", f"{cpu_us['python']:.0f}"])
    rows.append(["all", "", f"{sum(cpu_us.values()):.0f}"])
    page.table(["layer", "of the main thread", "µs a call"], rows)


def layer_of(frames: Sequence[str]) -> str:
    """The layer that a stack belongs to, outermost frame first."""
    if any("gc_collect" in frame for frame in frames):
        return GARBAGE
    for frame in reversed(frames):
        if frame.startswith(_ROOTS):
            continue
        for name, marks in LAYERS.items():
            if any(mark in frame for mark in marks):
                return name
    return LOOP


def _sample(server: Measured, samples: Path, load: Load) -> str:
    """Samples the server under the load; returns what went wrong."""
    spy = Path(sys.executable).with_name("py-spy")
    if not spy.exists():
        return "py-spy is not installed."
    options = ["--native", "--gil", "--threads", "--format", "raw"]
    command = [str(spy), "record", *options, "--rate", str(SAMPLES_PER_S), "--duration", str(int(load.seconds))]
    command += ["--output", str(samples), "--pid", str(server.pid)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        put(server.address, [os.urandom(SIZE_BYTES)], load)
        _, errors = running.communicate()
    if running.returncode or not samples.exists() or not samples.read_text().strip():
        return f"py-spy could not look into the process: {errors.strip().splitlines()[-1] if errors.strip() else 'no samples'}"
    return ""
