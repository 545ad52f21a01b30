"""Tells what a server's JSON answer means for deploy/verify.sh: a line on stdout, good or bad by the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

GOOD, BAD, DIFFERENT = 0, 1, 3
"""Exit codes; DIFFERENT: a model that failed (`loading`), a job that has not ended (`job`). Python itself ends with 1 and a
traceback on stderr when the answer is not one of ours; verify.sh tells these apart by stderr."""


def states(info: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, state and all else of each model of /info."""
    return [(model["name"], model["state"].removeprefix("MODEL_STATE_"), model) for model in info.get("models", [])]


def on_their_way(info: dict[str, Any]) -> Iterator[str]:
    """The models that are not ready yet, with how far they are."""
    for name, state, model in states(info):
        if state == "LOADING":
            yield f"{name} loading {float(model.get('load_progress', 0)):.0%}"
        elif state not in ("READY", "FAILED", "UNLOADED"):
            yield f"{name} {state.lower().replace('_', ' ')}"


def failed(info: dict[str, Any]) -> list[str]:
    """The models that could not be loaded, with the reason."""
    return [
        f"{name} has FAILED: {model.get('state_reason') or 'no reason is given'}"
        for name, state, model in states(info)
        if state == "FAILED"
    ]


def labels(answer: dict[str, Any]) -> list[str]:
    """What was found, by name: boxes, or the classes of a classifier."""
    found = answer.get("detections") or answer.get("classes") or []
    return [one.get("label") or f"class {one.get('class_id', 0)}" for one in found]


def found(names: list[str]) -> str:
    """The same as a sentence's part."""
    return f"{len(names)} found: {', '.join(dict.fromkeys(names))}" if names else "nothing was found"


def loading(info: dict[str, Any]) -> tuple[str, int]:
    """What is still missing; DIFFERENT when it will not come by waiting, because all else is there."""
    if missing := list(on_their_way(info)):
        return ", ".join(missing + failed(info)), GOOD
    return "; ".join(failed(info)), DIFFERENT if failed(info) else GOOD


def why(health: dict[str, Any]) -> tuple[str, int]:
    """Why /health says 503."""
    return "; ".join(health.get("why") or ["it is not ready, and gives no reason"]), GOOD


def checks(detailed: dict[str, Any]) -> tuple[str, int]:
    """What /health/detailed says: every check passes, perhaps with a warning."""
    named = detailed["checks"].items()
    bad = [f"{name}: {check['detail']}" for name, check in named if check["status"] == "NOT_OK"]
    warned = [f"{name}: {check['detail']}" for name, check in named if check["status"] == "WARNING"]
    if bad or detailed["status"] != "SERVING":
        return "; ".join(bad) or why(detailed)[0], BAD
    return "; to be looked at: ".join([f"{len(named)} checks pass", *([", ".join(warned)] if warned else [])]), GOOD


def info(answer: dict[str, Any]) -> tuple[str, int]:
    """Version, device, models; every model must be ready, and there must be one."""
    ready = [name for name, state, _ in states(answer) if state == "READY"]
    wrong = failed(answer) + list(on_their_way(answer))
    if wrong or not ready:
        return "; ".join(wrong or ["no model is ready"]), BAD
    return f"version {answer['version']} on {answer['device']}; ready: {', '.join(ready)}", GOOD


def known(answer: dict[str, Any]) -> tuple[str, int]:
    """The labels of the default detector."""
    models = [model for _, _, model in states(answer) if model.get("is_default")]
    return " ".join(label for model in models for label in model.get("labels", [])), GOOD


def stats(answer: dict[str, Any]) -> tuple[str, int]:
    """Workers and jobs; bad without a worker."""
    depth, running = (sum(int(queue.get(key, 0)) for queue in answer.get("queues", [])) for key in ("depth", "running"))
    workers = int(answer["worker_count"])
    jobs = f"{depth} jobs wait, {running} run"
    if not workers:
        return f"no worker is alive; {jobs}", BAD
    return f"{workers} {'worker is' if workers == 1 else 'workers are'} alive; {jobs}", GOOD


def refusal(answer: dict[str, Any]) -> tuple[str, int]:
    """What the server said instead of doing it."""
    return str(answer["error"]["message"]), GOOD


def detection(answer: dict[str, Any]) -> tuple[str, int]:
    """What was found; bad when nothing was."""
    return found(labels(answer)), GOOD if labels(answer) else BAD


def job_id(answer: dict[str, Any]) -> tuple[str, int]:
    """The id of the job that was submitted."""
    return str(answer["job"]["job_id"]), GOOD


def job(answer: dict[str, Any]) -> tuple[str, int]:
    """How the job ended; good is SUCCEEDED with an item in which something was found."""
    told: dict[str, Any] = answer["job"]
    state = told["state"].removeprefix("JOB_STATE_")
    if state in ("QUEUED", "SCHEDULED", "RUNNING"):
        return f"still {state}" + (", held: its queue is paused" if told.get("held") else ""), DIFFERENT
    items = told.get("result", {}).get("detect", {}).get("items", [])
    names = [label for item in items for label in labels(item.get("detection", {}))]
    if state == "SUCCEEDED" and names:
        return f"{state}; {len(items)} item, {found(names)}", GOOD
    errors = [told.get("error"), *(one.get("error") for one in [*told.get("attempts", []), *items])]
    reasons = dict.fromkeys(str(error.get("message") or error) for error in errors if error)
    return f"{state}; {'; '.join(reasons) or found(names)}", BAD


READERS = {
    reader.__name__: reader for reader in (loading, why, checks, info, known, stats, refusal, detection, job_id, job)
}

if __name__ == "__main__":
    text, code = READERS[sys.argv[1]](json.load(sys.stdin))
    print(text)
    sys.exit(code)
