"""Rehearses an upgrade and the way back, behind the edge, with jobs, calls and streams going on: `make rehearse`.

Old is a commit of this repository, new is what lies here. Both run side by side, on one Redis. The order is the one of
docs/deployment.md: workers first, then vision servers one by one, then the queue server; back in the opposite order.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ai4thai.job_results import JobState

from benchmarks.pages import RESULTS, Page, console
from benchmarks.processes import Measured, end_on_sigterm, free_ports
from benchmarks.rehearsal_load import FRAME_S, FRAMES, SCENES, Door, Load, fault_of, submission
from benchmarks.rehearsal_parts import ROOT, Certificates, Edge, Server, wait_until

VISION = 2
WORKERS = 2
UNREADY_S = 10.0
DRAIN_S = 30.0
# Accepted by one version while their queue is paused, and run by the other.
KEPT = 12
KEPT_QUEUE = "kept"
COMMANDS: Sequence[Sequence[str]] = (("health",), ("info",), ("detect", str(SCENES[0])), ("queue", "stats"), ("jobs",))


def sources_of(revision: str, folder: Path) -> Path:
    """The sources of a commit, unpacked into `folder`. Raises RuntimeError when this repository has no such commit."""
    done = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise RuntimeError(
            f"There is no commit {revision!r} here: {done.stderr.decode().strip()}. Name one by --old; "
            "a shallow clone gets its history by `git fetch --unshallow`."
        )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


@dataclass
class Version:
    """The processes of one version."""

    name: str
    source: Path
    vision: list[Server]
    queue: Server
    workers: list[Server]
    exit_codes: list[int] = field(default_factory=list)

    def stop(self, server: Server) -> None:
        """Ends a process in order, and notes how it ended."""
        self.exit_codes.append(server.stop(UNREADY_S + DRAIN_S + 60))


@dataclass
class Rehearsal:
    """Two versions, the edge, the load, and what has been seen so far."""

    old: Version
    new: Version
    edge: Edge
    door: Door
    load: Load
    steps: list[tuple[str, float]] = field(default_factory=list)
    """Each step, in order, and how long it took in seconds."""
    faults: list[str] = field(default_factory=list)
    reads: dict[str, int] = field(default_factory=dict)
    """How many jobs were read whole, by whom."""

    def step(self, name: str, act: Callable[[], None]) -> None:
        """Does one step; what ends during it is counted under its name."""
        console.print(f"{name} …")
        self.load.phase = name
        began_s = time.monotonic()
        act()
        self.steps.append((name, time.monotonic() - began_s))

    def roll_workers(self, leaving: Version, coming: Version) -> None:
        """The others begin first, so that there is always someone."""
        for worker in coming.workers:
            worker.start()
        for worker in coming.workers:
            wait_until(f"{worker.name} works", lambda worker=worker: worker.events("working"), 120)  # type: ignore[misc]
        for worker in leaving.workers:
            leaving.stop(worker)

    def roll_vision(self, leaving: Version, coming: Version) -> None:
        """One comes, one goes."""
        for one, other in zip(leaving.vision, coming.vision, strict=True):
            other.start()
            self.wait_for_calls("vision_grpc", other)
            leaving.stop(one)

    def roll_queue(self, leaving: Version, coming: Version) -> None:
        """Both serve for a moment."""
        coming.queue.start()
        self.wait_for_calls("queue_grpc", coming.queue)
        leaving.stop(leaving.queue)

    def go_on(self, seconds: float) -> None:
        """Lets the callers call; more than one job of theirs ends."""
        before, until_s = self.load.count("jobs"), time.monotonic() + seconds
        wait_until("jobs end", lambda: self.load.count("jobs") > before + 3 and time.monotonic() > until_s, 300)

    def keep_jobs(self, count: int = KEPT) -> list[str]:
        """Submits to a queue that is paused: these jobs' records wait for the other version."""
        with self.door.open_queue() as queue:
            queue.pause(KEPT_QUEUE)
            return [queue.submit(submission(2 * number, queue=KEPT_QUEUE)).job_id for number in range(count)]

    def do_kept(self, job_ids: Sequence[str]) -> None:
        """Has the version that runs now do what the other has accepted: one is cancelled, one deleted, the others are done."""
        with self.door.open_queue() as queue:
            cancelled, *others = job_ids
            if queue.cancel(cancelled).state is not JobState.CANCELLED:
                self.faults.append(f"{cancelled}, accepted by the other version, could not be cancelled")
            retried = queue.retry(cancelled).job_id
            queue.resume(KEPT_QUEUE)
            for job_id in (retried, *others):
                if fault := fault_of(queue.wait(job_id, 180)):
                    self.faults.append(f"accepted by the other version: {fault}")
            queue.delete(others[-1])

    def read_all(self, who: str) -> None:
        """Reads every job that has ended through the version that serves now: its record, history and result."""
        with self.door.open_queue() as queue:
            count = 0
            for job_id in tuple(self.load.job_ids):
                job = queue.get(job_id)
                if not job.has_ended:
                    continue
                history = list(queue.watch(job_id, timeout_s=30))
                if fault := fault_of(job) or ("" if history[-1].state is job.state else "its history ends otherwise"):
                    self.faults.append(f"read by {who}: {job_id}: {fault}")
                count += 1
        self.reads[f"jobs read whole by {who}"] = count

    def call_with(self, client: Version, server: Version) -> None:
        """The command line of one version against the servers of the other."""
        env = {
            **os.environ,
            "PYTHONPATH": f"{client.source / 'clients'}:{client.source}",
            "PYTHONSAFEPATH": "1",
            "AI4THAI_VISION_ADDRESS": self.door.vision,
            "AI4THAI_QUEUE_ADDRESS": self.door.queue,
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(self.door.authority),
        }
        submit = ("submit", "detect", str(SCENES[0]), "--wait")
        for command in (*COMMANDS, submit):
            done = subprocess.run(
                [sys.executable, "-c", "from ai4thai.cli import main; main()", *command],
                env=env,
                capture_output=True,
                text=True,
                timeout=180,
            )
            if done.returncode:
                said = (done.stdout + done.stderr)[-500:]
                self.faults.append(f"{client.name} client, {server.name} server: ai4thai {command[0]}: {said}")
        self.reads[f"{client.name} client's commands, {server.name} servers"] = len(COMMANDS) + 1

    def wait_for_calls(self, cluster: str, server: Server) -> None:
        """Until the server is ready and the edge knows it."""
        server.wait_until_ready(240)
        wait_until(f"{server.name} gets calls", lambda: server.address in self.edge.healthy(cluster))


def rehearse(old: Path, new: Path, folder: Path, seconds: float) -> Rehearsal:
    """Up and back again; every process is ended before it returns."""
    ports = free_ports(2 * VISION + 2 + 4)
    ports, edge_ports = ports[:-4], ports[-4:]
    certificates = Certificates(folder / "authority")
    tls = folder / "tls"
    certificates.renew(tls, "edge")
    with ExitStack() as ends:
        broker = ends.enter_context(
            Measured("queue_server.broker", "--port", "0", "--data-dir", str(folder / "redis"), ready="ready")
        )
        edge = Edge(
            folder,
            tls,
            ports=edge_ports,
            vision=[f"127.0.0.1:{port}" for port in ports[: 2 * VISION]],
            queue=[f"127.0.0.1:{port}" for port in ports[2 * VISION :]],
        )
        door = Door(
            f"grpcs://localhost:{edge.vision_port}", f"grpcs://localhost:{edge.queue_port}", certificates.authority
        )
        shared = {
            "REDIS_URL": broker.url,
            "AI4THAI_DATA_DIR": str(folder / "data"),
            "SERVING_HOST": "127.0.0.1",
            "SERVING_UNREADY_SECONDS": f"{UNREADY_S:g}",
            "SERVING_DRAIN_SECONDS": f"{DRAIN_S:g}",
            "QUEUE_VISION_ADDRESS": door.vision,
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(certificates.authority),
            "VISION_DESCRIBER": "",
        }
        was = _version("old", old, ports[:VISION], ports[-2], shared, folder)
        comes = _version("new", new, ports[VISION : 2 * VISION], ports[-1], shared, folder)
        for version in (was, comes):
            for server in (*version.workers, *version.vision, version.queue):
                ends.callback(server.kill)
        ends.callback(edge.kill)
        rehearsal = Rehearsal(was, comes, edge, door, Load(door))
        _perform(rehearsal, seconds)
        return rehearsal


def _version(
    name: str, source: Path, vision_ports: Sequence[int], queue_port: int, env: Mapping[str, str], folder: Path
) -> Version:
    vision = [
        Server(
            f"{name}-vision-{n}", "vision_server", {**env, "VISION_SERVICE_PORT": str(p)}, folder, port=p, source=source
        )
        for n, p in enumerate(vision_ports)
    ]
    queue_env = {**env, "QUEUE_WORKER_PORT": str(queue_port)}
    queue = Server(f"{name}-queue", "queue_server", queue_env, folder, port=queue_port, source=source)
    workers = [Server(f"{name}-worker-{n}", "queue_server.worker", env, folder, source=source) for n in range(WORKERS)]
    return Version(name, source, vision, queue, workers)


def _perform(rehearsal: Rehearsal, seconds: float) -> None:
    old, new, load = rehearsal.old, rehearsal.new, rehearsal.load
    rehearsal.edge.start()
    for server in (*old.vision, old.queue, *old.workers):
        server.start()
    for cluster, servers in (("vision_grpc", old.vision), ("queue_grpc", [old.queue])):
        for server in servers:
            rehearsal.wait_for_calls(cluster, server)
    load.start()
    kept: list[str] = []
    rehearsal.step("old alone", lambda: rehearsal.go_on(seconds))
    rehearsal.step("old alone: jobs are kept for new", lambda: kept.extend(rehearsal.keep_jobs()))
    rehearsal.step("new client, old servers", lambda: rehearsal.call_with(new, old))
    rehearsal.step("up: workers", lambda: rehearsal.roll_workers(old, new))
    rehearsal.step("up: vision servers", lambda: rehearsal.roll_vision(old, new))
    rehearsal.step("up: queue server", lambda: rehearsal.roll_queue(old, new))
    rehearsal.step("new alone: kept jobs are done", lambda: rehearsal.do_kept(kept))
    rehearsal.step("new reads every job", lambda: rehearsal.read_all("new"))
    rehearsal.step("old client, new servers", lambda: rehearsal.call_with(old, new))
    rehearsal.step("new alone", lambda: rehearsal.go_on(seconds))
    kept = []
    rehearsal.step("new alone: jobs are kept for old", lambda: kept.extend(rehearsal.keep_jobs()))
    rehearsal.step("back: queue server", lambda: rehearsal.roll_queue(new, old))
    rehearsal.step("back: vision servers", lambda: rehearsal.roll_vision(new, old))
    rehearsal.step("back: workers", lambda: rehearsal.roll_workers(new, old))
    rehearsal.step("old alone again: kept jobs are done", lambda: rehearsal.do_kept(kept))
    rehearsal.step("old reads every job", lambda: rehearsal.read_all("old"))
    rehearsal.step("old alone again", lambda: rehearsal.go_on(seconds))
    rehearsal.step("the last calls end", load.stop)
    for server in (*old.workers, *old.vision, old.queue):
        old.stop(server)
    rehearsal.edge.stop(90)


def main() -> int:
    """Rehearses, writes the page; 1 when anything was lost."""
    parser = argparse.ArgumentParser(prog="make rehearse", description=__doc__)
    parser.add_argument("--old", default="HEAD", help="the commit or tag that is in production now (default: HEAD)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of calls between two steps (default: 10)")
    parser.add_argument("--keep", type=Path, help="keep the logs of all processes in this folder")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder to write the page to")
    arguments = parser.parse_args()
    end_on_sigterm()
    page = Page("rehearsal", "An upgrade and the way back", "make rehearse")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            old = sources_of(arguments.old, Path(temporary) / "old")
        except RuntimeError as error:
            parser.error(str(error))
        rehearsal = rehearse(old, ROOT, folder, arguments.seconds)
    describe(page, rehearsal, _commit(arguments.old))
    page.write(arguments.output)
    return 1 if page.missed else 0


def describe(page: Page, rehearsal: Rehearsal, old: str) -> None:
    """Writes what was seen onto the page."""
    load = rehearsal.load
    page.say(
        f"Old is commit {old}, new is the working tree. Each has {VISION} vision servers, a queue server and {WORKERS} workers; "
        "all stand behind one Envoy (deploy/envoy), with TLS, and on one Redis. Meanwhile 4 submitters submit jobs (detect, "
        "videos, delayed ones) and watch each to its end, 2 callers call Detect, 3 cameras stream "
        f"{FRAMES} frames at a time ({FRAMES * FRAME_S:g} s), without retries. A server that is told to leave says for "
        f"{UNREADY_S:g} s that it is not ready, then ends the streams that are still there, in order, and has {DRAIN_S:g} s for "
        "the rest."
    )
    rows = []
    for name, seconds in rehearsal.steps:
        ended = [load.counts[name, kind] for kind in ("jobs", "calls", "streams", "moves")]
        faults = sum(phase == name for phase, _, _ in load.faults)
        rows.append([name, f"{seconds:.1f}", *ended, f"{load.slowest_s[name] * 1000:.0f}", faults])
    page.table(
        ["step", "s", "jobs ended", "calls", "streams ended", "streams moved", "slowest call ms", "failed"], rows
    )
    page.table(["read or called across versions", "count"], list(rehearsal.reads.items()))
    failed = [fault for fault in load.faults if fault[1] == "jobs"]
    page.goal(f"no job fails or is lost ({len(failed)} of {load.count('jobs') + len(failed)})", not failed)
    cut = [fault for fault in load.faults if fault[1] == "streams"]
    page.goal(
        f"no stream is cut and no frame lost ({len(cut)} of {load.count('streams') + len(cut)} streams; "
        f"{load.count('moves')} lasted longer than their server's time and went on at another, frame by frame)",
        not cut,
    )
    rest = len(load.faults) - len(failed) - len(cut)
    page.goal(f"no call fails ({rest} of {load.count('calls') + rest})", rest == 0)
    page.goal(
        f"records, results and histories are read both ways, and jobs that one version accepted are done by the other "
        f"({len(rehearsal.faults)} faults)",
        not rehearsal.faults,
    )
    codes = rehearsal.old.exit_codes + rehearsal.new.exit_codes
    page.goal(f"each of the {len(codes)} processes that were told to leave left in order", not any(codes))
    for text in [*rehearsal.faults, *(f"{phase}: {kind}: {fault}" for phase, kind, fault in load.faults)][:20]:
        page.say(f"- {text}")


def _commit(revision: str) -> str:
    done = subprocess.run(
        ["git", "log", "-1", "--format=%h (%cs)", revision], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
