"""Stands in for Docker's engine: a `docker` on PATH that records what it is told, and runs compose.yaml's services as processes.

The registry is a dictionary. An image is what it was built from: its digest follows from the content that a test gives to a
revision, and it may bring variables, by which a broken version is made. `docker compose` resolves the release's own files with
the real docker-compose; the processes are composing.py's: the same commands, variables, secrets. Nothing is built, and a real
image's digest would differ in each revision (its labels do): here a test says which image has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import socketserver
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.delivery import composing
from tests.processes import ROOT

CLIENT = """\
#!{python} -S
import json, os, socket, sys
said = sys.stdin.read() if "--password-stdin" in sys.argv else ""
told = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ), "stdin": said}}
with socket.socket(socket.AF_UNIX) as engine:
    engine.connect({address!r})
    engine.sendall(json.dumps(told).encode() + b"\\n")
    answer = json.loads(engine.makefile().readline())
sys.stdout.write(answer["stdout"])
sys.stderr.write(answer["stderr"])
sys.exit(answer["code"])
"""


class Said(Exception):
    """What docker answers instead of doing it; `stdout` is what it could do nevertheless."""

    def __init__(self, words: str, stdout: str = "") -> None:
        super().__init__(words)
        self.stdout = stdout


@dataclass(frozen=True)
class Image:
    """A built image; `environment` is what its version does differently."""

    digest: str
    environment: Mapping[str, str]


@dataclass
class Version:
    """What a revision is made of: contents decide the digests, variables what its processes do."""

    vision: str = "vision"
    queue: str = "queue"
    vision_environment: Mapping[str, str] = field(default_factory=dict)


class Project(composing.Composition):
    """One compose project: the containers that run, replaced one by one as `up` is told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        composing._tools(folder / "bin")
        self.containers = {}
        self.made_of: dict[str, tuple[str, str]] = {}

    def up(  # type: ignore[override]
        self, model: dict[str, Any], names: list[str], images: Mapping[str, Image], *, alone: bool, recreate: bool
    ) -> list[str]:
        """Starts or replaces what has changed, in the order of need; tells which."""
        self.model = model
        changed = []
        for name in self._in_order(names) if not alone else names:
            service = model["services"][name]
            image = images.get(service["image"])
            # As compose does: how an image would be built makes no other container.
            asked = {key: value for key, value in service.items() if key not in ("build", "depends_on")}
            made_of = json.dumps(asked, sort_keys=True), image.digest if image else service["image"]
            old = self.containers.get(name)
            if old is not None and self.made_of[name] == made_of and not (recreate and name in names):
                continue
            for needed, dependency in {} if alone else service.get("depends_on", {}).items():
                self._wait(needed, dependency)
            if old is not None:
                old.stop()
            container = self._container(name)
            container.environment |= image.environment if image else {}
            if name != "redis":
                container.probe = []  # nothing waits for their health here; verify.sh asks them itself
            container.start()
            self.containers[name], self.made_of[name] = container, made_of
            changed.append(name)
        return changed

    def stop(self, *names: str) -> None:
        """Ends containers; `up` starts them again, changed or not."""
        for name in names:
            if container := self.containers.pop(name, None):
                container.stop()

    def _in_order(self, names: list[str]) -> list[str]:
        """With what they depend on, that first."""
        order: list[str] = []

        def add(name: str) -> None:
            for needed in self.model["services"][name].get("depends_on", {}):
                if needed in self.model["services"]:
                    add(needed)
            if name not in order:
                order.append(name)

        for name in names:
            add(name)
        return order

    def _wait(self, needed: str, dependency: Mapping[str, Any]) -> None:
        until_s = time.monotonic() + 60
        while needed in self.containers and not self._holds(needed, dependency):
            assert time.monotonic() < until_s, self.containers[needed].log_tail()
            time.sleep(0.05)
        if needed in self.containers:
            self.containers[needed].probe = []


class Engine:
    """The stand-in; a context manager, with `path` to be the first of PATH."""

    def __init__(self, folder: Path, lite: Mapping[str, str] | None = None) -> None:
        """`lite`: variables that all images of the vision server have, to start quickly."""
        self._folder = folder
        self.path = folder / "bin"
        self.versions: dict[str, Version] = {}
        self.registry: dict[str, Image] = {}
        self.host: dict[str, Image] = {}
        """The images on this host, by tag and by digest."""
        self.calls: list[list[str]] = []
        self.faults: list[str] = []
        self.logins: list[tuple[str, str]] = []
        self.projects: dict[str, Project] = {}
        self.mounts: list[str] = []
        """The host's files that running containers have mounted, as a test says."""
        self.used: list[str] = []
        """The images of containers that a person has started, as a test says."""
        self.edge = ""
        """The edge's container that a person has started, by name; empty: there is none."""
        self.away = False
        """Whether the registry does not answer."""
        self._lite = dict(lite or {})
        self._builders: set[str] = set()

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True)
        # Not in the test's folder: a socket's path may have 107 characters.
        self._socket_folder = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
        address = str(self._socket_folder / "engine.sock")
        (self.path / "docker").write_text(CLIENT.format(python=sys.executable, address=address))
        (self.path / "docker").chmod(0o755)
        engine = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(json.dumps(engine._answer(json.loads(self.rfile.readline()))).encode() + b"\n")

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True

        self._server = Server(address, Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self._socket_folder)
        for project in self.projects.values():
            project.__exit__(*error)

    def container(self, name: str) -> composing.Container:
        """A running container by its name."""
        for project in self.projects.values():
            for container in project.containers.values():
                if container.name == name:
                    return container
        raise Said(f"Error: No such object: {name}")

    def told(self, *words: str) -> list[list[str]]:
        """The calls that begin with these words."""
        return [call for call in self.calls if call[: len(words)] == list(words)]

    def push(self, repository: str, tag: str, version: Version) -> None:
        """As if both images of a version had been built and pushed."""
        for name, content in (("vision", version.vision), ("queue", version.queue)):
            environment = {**self._lite, **version.vision_environment} if name == "vision" else {}
            digest = "sha256:" + hashlib.sha256(f"{name} {content}".encode()).hexdigest()
            self.registry[f"{repository}/{name}:{tag}"] = Image(digest, environment)

    def _answer(self, told: dict[str, Any]) -> dict[str, Any]:
        argv = told["argv"]
        self.calls.append(argv)
        try:
            words = argv[:2] if argv[0] in ("buildx", "image", "compose") else argv[:1]
            if words == ["buildx", "imagetools"]:
                words = argv[:3]
            method = getattr(self, "_" + "_".join(words[:1] if words[0] == "compose" else words), None)
            if method is None:
                raise AssertionError(f"the stand-in does not know docker {' '.join(argv)}")
            return {
                "code": 0,
                "stdout": method(argv[len(words) if words[0] != "compose" else 1 :], told) or "",
                "stderr": "",
            }
        except (Said, composing.Refused) as refusal:
            return {"code": 1, "stdout": getattr(refusal, "stdout", ""), "stderr": f"{refusal}\n"}
        except BaseException as fault:  # told to the test: a script may go on after it
            self.faults.append(f"docker {' '.join(argv)}: {fault!r}")
            return {"code": 125, "stdout": "", "stderr": f"{fault!r}\n"}

    def _reached(self) -> None:
        if self.away:
            raise Said("Error response from daemon: the registry does not answer")

    def _login(self, words: list[str], told: dict[str, Any]) -> str:
        self._reached()
        assert words[0] == "--username" and "--password-stdin" in words, "the password is not to be on the command line"
        self.logins.append((words[1], told["stdin"]))
        return "Login Succeeded\n"

    def _buildx_inspect(self, words: list[str], told: dict[str, Any]) -> None:
        if words[0] not in self._builders:
            raise Said(f'ERROR: no builder "{words[0]}" found')

    def _buildx_create(self, words: list[str], told: dict[str, Any]) -> None:
        self._builders.add(words[words.index("--name") + 1])

    def _buildx_build(self, words: list[str], told: dict[str, Any]) -> str:
        parser = argparse.ArgumentParser(exit_on_error=False)
        for option in (
            "--builder",
            "--file",
            "--target",
            "--progress",
            "--cache-from",
            "--cache-to",
            "--output",
            "--tag",
        ):
            parser.add_argument(option)
        parser.add_argument("--build-arg", action="append", default=[])
        parser.add_argument("--secret", action="append", default=[])
        parser.add_argument("--push", action="store_true")
        parser.add_argument("context")
        asked = parser.parse_args(words)
        assert asked.builder in self._builders and asked.context == "."
        stages = [line.split()[-1] for line in (ROOT / asked.file).read_text().splitlines() if line.startswith("FROM ")]
        assert asked.target in stages, f"the Dockerfile has no target {asked.target}: {stages}"
        if asked.push:
            self._reached()
            repository, _, tag = asked.tag.rpartition(":")
            self.push(repository.rpartition("/")[0], tag, self.versions[tag])
        return f"#1 {asked.target}\n"

    def _buildx_imagetools_inspect(self, words: list[str], told: dict[str, Any]) -> str:
        self._reached()
        if words[0] not in self.registry:
            raise Said(f"ERROR: {words[0]}: not found")
        return f"Name: {words[0]}\n"

    def _buildx_imagetools_create(self, words: list[str], told: dict[str, Any]) -> None:
        self._reached()
        assert words[0] == "--tag", words
        self.registry[words[1]] = self.registry[words[2]]

    def _pull(self, words: list[str], told: dict[str, Any]) -> str:
        self._reached()
        ref = words[-1]
        if ref not in self.registry:
            raise Said(f"Error response from daemon: manifest for {ref} not found")
        self.host[ref] = self.host[f"{ref.rpartition(':')[0]}@{self.registry[ref].digest}"] = self.registry[ref]
        return f"{ref}\n"

    def _image_inspect(self, words: list[str], told: dict[str, Any]) -> str:
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--format", default="")
        parser.add_argument("ref")
        asked = parser.parse_args(words)
        ref = asked.ref
        if ref not in self.host:
            raise Said(f"Error: No such image: {ref}")
        if asked.format == "{{.Id}}":
            return f"{self.host[ref].digest}\n"
        names = [name for name, image in self.host.items() if image.digest == self.host[ref].digest]
        tags = [name for name in names if "@" not in name and "RepoTags" in asked.format]
        return "".join(f"{name}\n" for name in [*tags, *(name for name in names if "@" in name)])

    def _tag(self, words: list[str], told: dict[str, Any]) -> None:
        self.host[words[1]] = self.host[words[0]]

    def _image_rm(self, words: list[str], told: dict[str, Any]) -> None:
        # Of a name at a time: the image is there as long as it has one.
        missing = [name for name in words if self.host.pop(name, None) is None]
        if missing:
            raise Said(f"Error: No such image: {', '.join(missing)}")

    def _ps(self, words: list[str], told: dict[str, Any]) -> str:
        if words[:-1] == ["--quiet", "--filter"]:
            return "0123456789ab\n" if words[-1] == f"name=^{self.edge}$" else ""
        assert words[:-1] == ["--all", "--quiet", "--filter"], words
        asked = self.host[words[-1].removeprefix("ancestor=")].digest
        containers = [container for project in self.projects.values() for container in project.containers.values()]
        used = [*self.used, *(container.service["image"] for container in containers)]
        return "".join(f"{name}\n" for name in used if name in self.host and self.host[name].digest == asked)

    def _inspect(self, words: list[str], told: dict[str, Any]) -> str:
        if "Mounts" in words[1]:
            missing = next(name for name in words[2:] if name.endswith("-edge"))
            raise Said(f"Error: No such object: {missing}", "".join(f"{path}\n" for path in self.mounts))
        assert words[:2] == ["--format", "{{.RestartCount}}"], words
        return "".join(f"{len(self.container(name).starts) - 1}\n" for name in words[2:])

    def _compose(self, words: list[str], told: dict[str, Any]) -> str:
        parser = argparse.ArgumentParser(exit_on_error=False)
        for option in ("--project-name", "--project-directory", "--file", "--env-file"):
            parser.add_argument(option, required=True)
        parser.add_argument("command", choices=["config", "up", "stop", "logs"])
        parser.add_argument("rest", nargs=argparse.REMAINDER)
        asked = parser.parse_args(words)
        options = [asked.project_name, asked.project_directory, asked.file, asked.env_file]
        names = ("--project-name", "--project-directory", "--file", "--env-file")
        done = composing.resolve(
            *(word for pair in zip(names, options, strict=True) for word in pair),
            environment=told["env"],
            cwd=Path(told["cwd"]),
        )
        if done.returncode != 0:
            raise Said(done.stderr.strip())
        if asked.command == "config":
            return ""
        if asked.command == "logs":
            running = self.projects[asked.project_name].containers.values()
            return "".join(f"{container.name} | {container.log_tail()}\n" for container in running)
        if asked.command == "stop":
            if asked.project_name in self.projects:
                self.projects[asked.project_name].stop(*asked.rest)
            return ""
        flags = [word for word in asked.rest if word.startswith("--")]
        needed, known = {"--detach", "--no-build"}, {"--no-deps", "--force-recreate"}
        assert needed <= set(flags) <= needed | known, flags
        services = [word for word in asked.rest if not word.startswith("--")]
        model = json.loads(done.stdout)
        for name in services:
            image = model["services"][name]["image"]
            if name != "redis" and image not in self.host:
                self._reached()
                raise Said(f"{image} is not on this host")
        project = self.projects.get(asked.project_name)
        if project is None:
            project = self.projects[asked.project_name] = Project(self._folder / asked.project_name)
        alone, recreate = "--no-deps" in flags, "--force-recreate" in flags
        changed = project.up(model, services, self.host, alone=alone, recreate=recreate)
        return "".join(f"{name} started\n" for name in changed)

    def stop(self, project: str) -> None:
        """Ends a project's processes, to have room for others."""
        for container in reversed(list(self.projects[project].containers.values())):
            with suppress(AssertionError):
                container.stop()
        self.projects[project].containers.clear()
        self.projects[project].made_of.clear()
