"""The queue's methods from programs that are not ours: grpcurl, buf curl, curl."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.calling import Server
from tests.end_to_end.foreign_programs import assert_found, output_of
from tests.end_to_end.pictures import Picture, jpeg
from tests.end_to_end.test_foreign_clients import grpcurl, values

BIN = Path(sys.executable).parent
QUEUE = "ai4thai.queue.v1.QueueService"


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def media_id_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def curl(queue: Server, path: str, *arguments: str | Path, stdin: str | None = None) -> str:
    return output_of("curl", "-sS", *arguments, f"http://{queue.address}{path}", stdin=stdin)


def post(queue: Server, path: str, body: Any) -> Any:
    answer = curl(queue, path, "-H", "content-type: application/json", "-d", "@-", stdin=json.dumps(body))
    return json.loads(answer)


@pytest.fixture
def queue_name() -> str:
    """A queue that no other test uses."""
    return f"foreign-{os.urandom(4).hex()}"


def test_grpcurl_uploads_in_pieces_and_reads_it_again(queue: Server) -> None:
    content = os.urandom(700_000)
    pieces = [content[begin : begin + 200_000] for begin in range(0, len(content), 200_000)]
    config = {"config": {"content_type": "video/mp4", "media_id": media_id_of(content), "size_bytes": len(content)}}
    messages = "\n".join(json.dumps(one) for one in [config, *({"chunk": encoded(piece)} for piece in pieces)])

    stored = json.loads(grpcurl("-d", "@", queue.address, f"{QUEUE}/UploadMedia", stdin=messages))

    assert stored["media"]["media_id"] == media_id_of(content)
    assert (stored["media"]["size_bytes"], stored["media"]["content_type"]) == ("700000", "video/mp4")
    asked = json.dumps({"media_id": media_id_of(content), "offset_bytes": 100_000})
    first, *rest = values(grpcurl("-d", asked, queue.address, f"{QUEUE}/GetMedia"))
    assert first["media"]["size_bytes"] == "700000"
    assert b"".join(base64.b64decode(one["chunk"]) for one in rest) == content[100_000:]


def test_buf_curl_uploads_too(queue: Server) -> None:
    messages = "\n".join(json.dumps(one) for one in [{"config": {}}, {"chunk": encoded(b"a picture")}])
    command = [BIN / "buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", "@-"]
    url = f"http://{queue.address}/{QUEUE}/UploadMedia"
    assert json.loads(output_of(*command, url, stdin=messages))["media"]["mediaId"] == media_id_of(b"a picture")


def test_curl_uploads_a_file_for_a_job(queue: Server, workers: object, picture: Picture, tmp_path: Path) -> None:
    file = tmp_path / "ภาพ.jpg"
    file.write_bytes(jpeg(picture.image))

    stored = json.loads(curl(queue, "/v1/media", "-T", file, "-H", "content-type: image/jpeg"))
    media_id = stored["media"]["media_id"]
    job = post(queue, "/v1/jobs", {"work": {"detect": {"images": [{"media_id": media_id}]}}})["job"]
    *_, last = [json.loads(line) for line in curl(queue, f"/v1/jobs/{job['job_id']}:watch", "-N").splitlines()]
    ended = json.loads(curl(queue, f"/v1/jobs/{job['job_id']}"))["job"]

    assert media_id == media_id_of(file.read_bytes())
    assert last["job"]["state"] == ended["state"] == "JOB_STATE_SUCCEEDED"
    assert_found(ended["result"]["detect"]["items"][0]["detection"], picture)
    copy = tmp_path / "copy"
    curl(queue, f"/v1/media/{media_id}:download", "-o", copy)
    assert copy.read_bytes() == file.read_bytes()
    curl(queue, f"/v1/media/{media_id}:download", "-r", "100-199", "-o", copy)
    assert copy.read_bytes() == file.read_bytes()[100:200]


def test_many_jobs_in_one_call(queue: Server, queue_name: str, picture: Picture) -> None:
    def request(number: int, images: int) -> dict[str, Any]:
        work = {"detect": {"images": [{"content": encoded(jpeg(picture.image))}] * images}}
        return {"request_id": f"{queue_name}-{number}", "queue": queue_name, "work": work}

    curl(queue, f"/v1/queues/{queue_name}:pause", "-X", "POST")
    body = {"requests": [request(0, 1), request(1, 0), request(2, 1)]}

    answer = post(queue, "/v1/jobs:batch", body)
    again = json.loads(grpcurl("-d", "@", queue.address, f"{QUEUE}/BatchSubmitJobs", stdin=json.dumps(body)))

    assert ["error" in item for item in answer["items"]] == [False, True, False]
    assert answer["items"][1]["error"]["details"][0]["reason"] == "INVALID_FIELD"
    for first, second in ((answer["items"][place], again["items"][place]) for place in (0, 2)):
        assert first["accepted"]["created"] and "created" not in second["accepted"]
        assert first["accepted"]["job"]["job_id"] == second["accepted"]["job"]["job_id"]
    assert json.loads(curl(queue, f"/v1/queues/{queue_name}:purge", "-X", "POST")) == {"cancelled_count": "2"}
    curl(queue, f"/v1/queues/{queue_name}:resume", "-X", "POST")


def test_a_queue_is_paused_emptied_and_resumed(
    queue: Server, workers: object, queue_name: str, picture: Picture
) -> None:
    named = json.dumps({"queue": queue_name})
    assert json.loads(grpcurl("-d", named, queue.address, f"{QUEUE}/PauseQueue")) == {}
    image = {"content": encoded(jpeg(picture.image))}
    asked = {"queue": queue_name, "client": "ทีม".encode().hex(), "work": {"detect": {"images": [image]}}}
    job = post(queue, "/v1/jobs", asked)["job"]

    told = json.loads(curl(queue, f"/queue/stats?queue={queue_name}"))["queues"][0]
    assert (told["paused"], told["held"], told["depth"]) == (True, "1", "1")
    assert told["clients"] == [{"client": asked["client"], "waiting": "1"}]
    purged = json.loads(grpcurl("-d", named, queue.address, f"{QUEUE}/PurgeQueue"))
    assert purged == {"cancelled_count": "1"}
    retried = json.loads(curl(queue, f"/v1/jobs/{job['job_id']}:retry", "-X", "POST"))["job"]
    assert retried["state"] == "JOB_STATE_QUEUED" and retried["held"]

    assert json.loads(grpcurl("-d", named, queue.address, f"{QUEUE}/ResumeQueue")) == {}

    *_, last = curl(queue, f"/v1/jobs/{job['job_id']}:watch", "-N").splitlines()
    assert json.loads(last)["job"]["state"] == "JOB_STATE_SUCCEEDED"
    listed = json.loads(curl(queue, f"/v1/jobs?client={asked['client']}&queue={queue_name}"))["jobs"]
    assert [one["job_id"] for one in listed] == [job["job_id"]]


def test_refusals_are_the_same_in_json(queue: Server) -> None:
    answer = json.loads(curl(queue, "/v1/queues/never-heard-of:purge", "-X", "POST"))
    assert "never-heard-of" in answer["error"]["message"]
    unknown = json.loads(curl(queue, f"/v1/media/{media_id_of(b'never stored')}:download"))
    assert "MEDIA_NOT_FOUND" in json.dumps(unknown)
