"""The pipeline: GitLab's schema, which jobs run when, and every job's script run in order, up to production and back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ai4thai.stack import Ports

from tests.delivery.docker_engine import Engine, Version
from tests.delivery.pipeline_model import Job, Pipelines, holds
from tests.delivery.pipeline_runner import Ended, Runner
from tests.ports import free_port
from tests.processes import ROOT

FILE = ROOT / ".gitlab-ci.yml"
PIPELINES = Pipelines(FILE)
REGISTRY = "registry.example/team10/vision-platform"
PASSWORD = "a-password-nobody-may-see"
# The describer is left out so that the vision server starts sooner; the rest of a version is as it is shipped.
LITE = {"VISION_DESCRIBER": ""}
BROKEN = {"VISION_DETECTOR": "forgotten.pt", "VISION_OFFLINE": "true"}

SHOWN = ("check", "validate-docker", "test", "scan-locks")


def commit(sha: str, **more: str) -> dict[str, str]:
    return {
        "CI_COMMIT_SHA": sha,
        "CI_COMMIT_SHORT_SHA": sha[:8],
        "CI_DEFAULT_BRANCH": "main",
        "CI_PIPELINE_SOURCE": "push",
        "CI_REGISTRY": "registry.example",
        "CI_REGISTRY_IMAGE": REGISTRY,
        "CI_REGISTRY_USER": "gitlab-ci-token",
        "CI_REGISTRY_PASSWORD": PASSWORD,
        "CI_JOB_URL": "https://gitlab.example/job/1",
        **more,
    }


def on_main(sha: str = "a" * 40, **more: str) -> dict[str, str]:
    return commit(sha, CI_COMMIT_BRANCH="main", **more)


def on_tag(tag: str, sha: str = "a" * 40, **more: str) -> dict[str, str]:
    return commit(sha, CI_COMMIT_TAG=tag, **more)


MERGE_REQUEST = commit("b" * 40, CI_PIPELINE_SOURCE="merge_request_event", CI_MERGE_REQUEST_IID="7")


def names(given: dict[str, str], *changed: str) -> dict[str, str]:
    """The jobs of a pipeline, with `manual` or `on_success`."""
    jobs = PIPELINES.pipeline(given, changed)
    assert jobs is not None
    return {job.name: job.when for job in jobs}


class TestTheFile:
    def test_gitlabs_schema_takes_it(self, tmp_path: Path) -> None:
        # The schema looks into no hidden job, so what the jobs are after `extends` is held against it too; and a broken one.
        jobs = {name: {key: keys[key] for key in keys if key != "extends"} for name, keys in PIPELINES.jobs.items()}
        merged, broken = tmp_path / "merged.yml", tmp_path / "broken.yml"
        merged.write_text(yaml.safe_dump({"stages": PIPELINES.stages, **jobs}))
        jobs["deploy-staging"]["retry"] = "often"
        broken.write_text(yaml.safe_dump({"stages": PIPELINES.stages, **jobs}))
        command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.gitlab-ci"]
        done = subprocess.run(
            [*command, "--data-transform", "gitlab-ci", "--output-format", "json", FILE, merged, broken],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        errors = json.loads(done.stdout)["errors"]
        assert [(error["filename"], error["path"]) for error in errors] == [(str(broken), "$['deploy-staging'].retry")]

    def test_stages_are_the_guides(self) -> None:
        assert PIPELINES.stages == ["validate", "test", "build", "scan", "deploy", "verify"]
        assert {job["stage"] for job in PIPELINES.jobs.values()} == set(PIPELINES.stages)

    def test_every_job_has_the_runners_tag_and_an_end(self) -> None:
        for name, job in PIPELINES.jobs.items():
            assert job["tags"] == ["hackathon-siamai2"], name
            assert re.fullmatch(r"\d+ minutes", job["timeout"]), name

    def test_the_guides_variables(self) -> None:
        wanted = {
            "BUILD_TARGET": "h100-optimized",
            "DOCKER_BUILDKIT": "1",
            "CUDA_VISIBLE_DEVICES": "0",
            "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:2048",
            "REDIS_PORT": "6379",
        }
        assert wanted.items() <= PIPELINES.variables.items()
        production = PIPELINES.jobs["deploy-production"]["variables"]
        assert (production["VISION_SERVICE_PORT"], production["QUEUE_WORKER_PORT"]) == ("2001", "2003")

    def test_what_is_tried_again_and_what_may_be_interrupted(self) -> None:
        faults_of_the_runner = {"runner_system_failure", "scheduler_failure", "api_failure", "data_integrity_failure"}
        for name, job in PIPELINES.jobs.items():
            if job["retry"] != 0:
                assert set(job["retry"]["when"]) <= faults_of_the_runner, name
            if job["stage"] == "deploy":
                assert (job["retry"], job["interruptible"]) == (0, False), name
                assert job["resource_group"] == job["environment"]["name"], name

    def test_a_rollback_is_no_deployment_which_gitlab_would_refuse_in_an_older_pipeline(self) -> None:
        actions = {
            name: job["environment"].get("action", "start")
            for name, job in PIPELINES.jobs.items()
            if "environment" in job
        }
        assert {name for name, action in actions.items() if action == "start"} == {
            "deploy-staging",
            "deploy-production",
        }
        assert (actions["rollback-staging"], actions["rollback-production"]) == ("prepare", "prepare")

    def test_needs_lead_nowhere_in_a_circle_nor_to_a_later_stage(self) -> None:
        for name, keys in PIPELINES.jobs.items():
            for needed, _ in Job(name, keys).needs or ():
                stages = [PIPELINES.stages.index(PIPELINES.jobs[one]["stage"]) for one in (needed, name)]
                assert stages[0] <= stages[1], f"{name} needs {needed}"
        done: set[str] = set()
        while ready := [
            name
            for name, keys in PIPELINES.jobs.items()
            if name not in done and all(needed in done for needed, _ in Job(name, keys).needs or ())
        ]:
            done |= set(ready)
        assert done == set(PIPELINES.jobs)

    def test_scripts_pass_shellcheck_and_tell_no_secret(self) -> None:
        for name, keys in PIPELINES.jobs.items():
            script = "\n".join([*keys.get("before_script", []), *keys["script"]])
            done = subprocess.run(
                [Path(sys.executable).with_name("shellcheck"), "--shell=bash", "-"],
                input=script,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, f"{name}: {done.stdout}"
            assert not re.search(r"echo.*(PASSWORD|TOKEN|SECRET)|set -x", script), name


class TestWhichJobsRun:
    def test_a_merge_request_is_checked_and_tested_and_touches_nothing(self) -> None:
        assert set(names(MERGE_REQUEST, "README.md")) == {"check", "validate-docker", "test"}

    @pytest.mark.parametrize("path", ["Dockerfile", "requirements/queue.txt"])
    def test_a_merge_request_that_changes_the_images_builds_them_without_pushing(self, path: str) -> None:
        jobs = PIPELINES.pipeline(MERGE_REQUEST, (path,)) or []
        builds = {job.name: job.variables["PUSH"] for job in jobs if job.stage == "build"}
        assert builds == {"build-vision": "no", "build-queue": "no"}
        assert not {job.stage for job in jobs} & {"deploy", "verify"}

    def test_main_goes_to_staging_by_itself_and_no_further(self) -> None:
        jobs = names(on_main())
        assert {name for name, when in jobs.items() if when == "on_success"} == {
            *(
                "check",
                "validate-docker",
                "test",
                "build-vision",
                "build-queue",
                "scan-locks",
                "scan-vision",
                "scan-queue",
            ),
            *("deploy-staging", "verify-staging"),
        }
        assert {name for name, when in jobs.items() if when == "manual"} == {"rollback-staging", "rollback-production"}

    def test_a_tag_goes_to_production_by_hand_without_building_again(self) -> None:
        jobs = PIPELINES.pipeline(on_tag("v1.0.0")) or []
        assert {job.name: job.when for job in jobs} == {
            "promote": "on_success",
            **dict.fromkeys(("scan-locks", "scan-vision", "scan-queue"), "on_success"),
            **dict.fromkeys(("deploy-production", "rollback-staging", "rollback-production"), "manual"),
            "verify-production": "on_success",
        }
        assert {job.variables["IMAGE_TAG"] for job in jobs} == {"$CI_COMMIT_TAG"}
        assert next(job for job in jobs if job.name == "deploy-production").allow_failure is False

    @pytest.mark.parametrize("given", [on_main(), on_tag("v1.0.0")])
    def test_a_schedule_only_scans(self, given: dict[str, str]) -> None:
        scheduled = {**given, "CI_PIPELINE_SOURCE": "schedule"}
        assert names(scheduled) == dict.fromkeys(("scan-locks", "scan-vision", "scan-queue"), "on_success")

    def test_other_branches_have_none_until_there_is_a_merge_request(self) -> None:
        assert PIPELINES.pipeline(commit("c" * 40, CI_COMMIT_BRANCH="try-this")) is None

    @pytest.mark.parametrize("tag", ["try-this", "version-1", "vision"])
    def test_a_tag_that_is_not_protected_is_no_release(self, tag: str) -> None:
        assert PIPELINES.pipeline(on_tag(tag)) is None

    def test_a_rollback_needs_nothing_that_could_be_away(self) -> None:
        for name in ("rollback-staging", "rollback-production"):
            assert PIPELINES.jobs[name]["needs"] == []
            assert "login" not in str(PIPELINES.jobs[name]["before_script"])

    def test_conditions_are_read_as_gitlab_reads_them(self) -> None:
        known = {"A": "x", "EMPTY": ""}
        assert holds('$A == "x" && ($EMPTY || $B == null)', known)
        assert not holds("$EMPTY", known) and not holds('$B == ""', known)
        assert holds(r"$A =~ /^x$/", known) and not holds(r"$B =~ /\d/ || $A =~ /\//", known)
        assert holds('$A != "x" || $A', known) and holds('$A == "x" || $B && $EMPTY', known)
        with pytest.raises(AssertionError, match="not understood"):
            holds('$A !~ "x"', known)


class Site:
    """A host with Docker's stand-in and a runner, and what happened there, told by pipeline."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.ports = {name: Ports(free_port(), free_port(), free_port()) for name in ("staging", "production")}
        self.engine = engine
        self.state = folder / "state"
        self.secret = folder / "redis-password.txt"
        self.secret.write_text(PASSWORD)
        self.runner = Runner(folder / "jobs", engine)
        self.runner.variables["*"] = {"AI4THAI_STATE_DIR": str(self.state), "DEPLOY_WAIT": "400"}
        for name, ports in self.ports.items():
            self.runner.variables[name] = {
                "VISION_SERVICE_PORT": str(ports.vision),
                "QUEUE_WORKER_PORT": str(ports.queue),
                "REDIS_PORT": str(ports.redis),
                "REDIS_PASSWORD_FILE": str(self.secret),
                "COMPOSE_PROFILES": "cpu",  # there is no GPU here
            }

    def run(self, given: dict[str, str], *changed: str, start: tuple[str, ...] = ()) -> dict[str, Ended]:
        # What a merge request has run is not run again for main and each tag: it would be the same commands.
        shown = () if given["CI_PIPELINE_SOURCE"] == "merge_request_event" else SHOWN
        return self.runner.run(PIPELINES.pipeline(given, changed) or [], given, start, shown)

    def vision(self, environment: str) -> dict[str, Any]:
        answer = httpx.get(f"http://localhost:{self.ports[environment].vision}/info", trust_env=False, timeout=10)
        return dict(answer.json())

    def running(self, environment: str) -> str:
        return (self.state / environment / "running").read_text().strip()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with Engine(folder / "engine", LITE) as engine:
        engine.versions |= {
            "a" * 40: Version(),
            "b" * 40: Version(vision="broken", queue="changed", vision_environment=BROKEN),
            "c" * 40: Version(queue="changed"),
        }
        yield Site(folder, engine)
        assert engine.faults == []


def assert_all(ended: dict[str, Ended], status: str, *besides: str) -> None:
    other = {name: one for name, one in ended.items() if one.status != status and name not in besides}
    assert not other, "\n".join(f"--- {name}: {one.status} ({one.code})\n{one.output}" for name, one in other.items())


@pytest.mark.timeout(600)  # a machine that does other things as well
class TestEveryJob:
    """In the order of the file: each test goes on where the one before has ended."""

    def test_a_merge_request(self, site: Site) -> None:
        ended = site.run(MERGE_REQUEST, "Dockerfile", "requirements/queue.txt")

        assert_all(ended, "success")
        assert set(ended) == {"check", "validate-docker", "test", "build-vision", "build-queue", "scan-locks"}
        ran = site.runner.order
        assert max(ran.index(name) for name in SHOWN[:3]) < min(ran.index("build-vision"), ran.index("build-queue"))
        builds = site.engine.told("buildx", "build")
        assert len(builds) == 2
        for build in builds:
            assert "--push" not in build and "--cache-to" not in build and f"REVISION={'b' * 40}" in build
        assert site.engine.registry == {}
        jobs = {job.name: job for job in PIPELINES.pipeline(MERGE_REQUEST, ("requirements/queue.txt",)) or []}
        assert site.runner.reports(jobs["test"]) == {"junit": ["junit.xml"], "coverage_report": ["coverage.xml"]}
        found = re.search(PIPELINES.jobs["test"]["coverage"].strip("/"), ended["test"].output, re.MULTILINE)
        assert found is not None, ended["test"].output
        boms = site.runner.reports(jobs["scan-locks"])["cyclonedx"]
        assert {"scan/sbom-queue.cdx.json", "scan/sbom-vision-gpu.cdx.json"} <= set(boms)

    def test_main_reaches_staging(self, site: Site) -> None:
        ended = site.run(on_main())

        assert_all(ended, "success", "rollback-staging", "rollback-production")
        assert ended["rollback-production"].status == "manual"
        ran = site.runner.order
        last = ["build-vision", "build-queue", "scan-vision", "scan-queue", "deploy-staging", "verify-staging"]
        assert ran[-len(last) :] == last
        builds = {
            build[build.index("--target") + 1]: build
            for build in site.engine.told("buildx", "build")
            if "--push" in build
        }
        assert set(builds) == {"h100-optimized", "queue"}
        assert "ACCELERATOR=gpu" in builds["queue"]
        deployed = ended["deploy-staging"].output
        assert re.search(r"… vision .*(pending|loading|warming up)", deployed), deployed
        assert "is live in staging, and verified" in deployed
        for line in ("vision detection", "queue job"):
            assert f"✓ {line}" in ended["verify-staging"].output
        assert site.engine.container("team10-staging-vision").starts
        assert site.vision("staging")["ready"] is True
        # By digest: whoever moves the tag does not move what runs.
        release = (site.state / "staging/current/release.env").read_text()
        assert re.search(rf"VISION_IMAGE='{re.escape(REGISTRY)}/vision@sha256:[0-9a-f]{{64}}'", release)
        registry = site.engine.registry
        assert {registry[f"{REGISTRY}/queue:{name}{'a' * 40}"].digest for name in ("", "staged-")} == {
            registry[f"{REGISTRY}/queue:{'a' * 40}"].digest
        }
        site.engine.stop("team10-staging")

    def test_a_tag_reaches_production_when_somebody_starts_it(self, site: Site) -> None:
        waiting = site.run(on_tag("v1"))
        assert {waiting[name].status for name in ("promote", "scan-vision", "scan-queue")} == {"success"}
        assert (waiting["deploy-production"].status, waiting["verify-production"].status) == ("manual", "skipped")
        assert not (site.state / "production").exists()
        pushed = len(site.engine.told("buildx", "build"))

        ended = site.run(on_tag("v1"), start=("deploy-production",))

        assert_all(ended, "success", "rollback-staging", "rollback-production")
        assert len(site.engine.told("buildx", "build")) == pushed, "a release is not built again"
        assert site.engine.registry[f"{REGISTRY}/vision:v1"] == site.engine.registry[f"{REGISTRY}/vision:{'a' * 40}"]
        assert site.running("production") == "v1"
        assert site.vision("production")["ready"] is True
        assert "All 8 are right" in ended["verify-production"].output

    def test_a_commit_that_staging_has_not_verified_is_no_release(self, site: Site) -> None:
        # Built, but staging did not take it; the vision server's image alone would do as little.
        site.engine.push(REGISTRY, "f" * 40, Version())
        site.engine.registry[f"{REGISTRY}/vision:staged-{'f' * 40}"] = site.engine.registry[
            f"{REGISTRY}/vision:{'f' * 40}"
        ]

        ended = site.run(on_tag("v9", "f" * 40), start=("deploy-production",))

        assert ended["promote"].status == "failed"
        assert f"There is no {REGISTRY}/queue:staged-{'f' * 40}: only a commit that main's" in ended["promote"].output
        assert f"{REGISTRY}/vision:v9" not in site.engine.registry, "half a release"
        assert {ended[name].status for name in ("scan-vision", "deploy-production")} == {"skipped"}

    def test_the_first_version_has_none_before_it(self, site: Site) -> None:
        ended = site.run(on_tag("v1"), start=("rollback-production", "rollback-staging"))
        for name in ("rollback-production", "rollback-staging"):
            assert (ended[name].status, ended[name].code) == ("warning", 1)
            assert "There is nothing to go back to" in ended[name].output

    def test_a_broken_version_goes_back_by_itself(self, site: Site) -> None:
        site.engine.push(REGISTRY, f"staged-{'b' * 40}", site.engine.versions["b" * 40])
        # Redis is to have the new password, too, though nothing else about it has changed.
        site.secret.write_text(f"{PASSWORD}-another")
        redis = site.engine.container("team10-redis")

        ended = site.run(on_tag("v2", "b" * 40), start=("deploy-production",))

        output = ended["deploy-production"].output
        assert (ended["deploy-production"].status, ended["deploy-production"].code) == ("failed", 1), output
        assert ended["verify-production"].status == "skipped"
        assert re.search(r"✗ vision /health .*forgotten\.pt has FAILED", output), output
        assert "production is back at v1, verified" in output
        assert site.running("production") == "v1"
        assert [model["name"] for model in site.vision("production")["models"]] == ["shapes-detector"]
        assert site.engine.container("team10-redis") is not redis

    def test_a_version_that_is_bad_in_use_is_taken_back_by_hand(self, site: Site) -> None:
        site.engine.push(REGISTRY, f"staged-{'c' * 40}", site.engine.versions["c" * 40])
        ended = site.run(on_tag("v3", "c" * 40), start=("deploy-production",))
        assert_all(ended, "success", "rollback-staging", "rollback-production")
        assert site.running("production") == "v3"

        site.engine.away = True  # at night the registry does not answer either
        back = site.run(on_tag("v3", "c" * 40), start=("rollback-production",))["rollback-production"]
        site.engine.away = False

        assert back.status == "success", back.output
        assert "v1 is live in production, and verified" in back.output
        assert site.running("production") == "v1"
        assert site.vision("production")["ready"] is True

    def test_that_was_every_job(self, site: Site) -> None:
        assert set(site.runner.order) == set(PIPELINES.jobs)

    def test_no_secret_was_told(self, site: Site) -> None:
        assert set(site.engine.logins) == {("gitlab-ci-token", PASSWORD)}
        assert not any(PASSWORD in word for call in site.engine.calls for word in call)
        for log in (site.state).rglob("*"):
            if log.is_file() and log.parent.name != "secrets":
                assert PASSWORD not in log.read_bytes().decode("utf-8", "replace"), log
        secrets = site.state / "production/secrets"
        assert secrets.stat().st_mode & 0o777 == 0o700


class TestScans:
    @pytest.mark.parametrize(
        ("finds", "status", "words"),
        [
            ("", "success", ""),
            ("HIGH", "warning", ""),
            ("CRITICAL", "failed", "a newer version mends them"),
            ("HIGH,CRITICAL", "failed", "a newer version mends them"),
            ("secret", "failed", "Secrets: take them out of the image"),
            ("trouble", "failed", "trivy did not work on"),
        ],
    )
    def test_what_is_critical_stops_the_pipeline_the_rest_is_told(
        self, finds: str, status: str, words: str, tmp_path: Path
    ) -> None:
        with Engine(tmp_path / "engine") as engine:
            runner = Runner(tmp_path / "jobs", engine, {"*": {"TRIVY_FINDS": finds}})
            jobs = [job for job in PIPELINES.pipeline(on_tag("v1")) or [] if job.name == "scan-vision"]
            jobs[0].keys = {**jobs[0].keys, "needs": []}
            ended = runner.run(jobs, on_tag("v1"))["scan-vision"]
            assert ended.status == status, ended.output
            assert words in ended.output
            assert "scan/sbom-image-vision.cdx.json" in runner.reports(jobs[0])["cyclonedx"]


def test_missing_programs_are_told_where_they_cannot_be_installed() -> None:
    script = f"id() {{ echo 1000; }}; set -- curl no-such-program; . {ROOT / 'deploy/ci/prepare.sh'}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 1
    assert "Missing on this runner: no-such-program." in done.stderr


def test_a_library_is_found_by_users_without_sbin_on_their_path() -> None:
    script = f"id() {{ echo 1000; }}; PATH=/usr/bin:/bin; set -- libc6; . {ROOT / 'deploy/ci/prepare.sh'}"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
