"""A server that speaks as much of S3 as a client needs to write, read and delete objects; it keeps them in memory."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import time
from uuid import uuid4

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

LAST_MODIFIED = "Wed, 21 Oct 2015 07:28:00 GMT"


class S3Server:
    """One bucket: `bucket`."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        """The parts of each multi-part upload that has been neither completed nor aborted."""
        self.completed = 0
        routes = [
            Route("/bucket", self._bulk_delete, methods=["POST"]),
            Route("/bucket/{key:path}", self._object, methods=["GET", "HEAD", "PUT", "POST", "DELETE"]),
        ]
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_config=None, lifespan="off"))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def start(self) -> None:
        self._thread.start()
        until_s = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < until_s
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)

    @property
    def environment(self) -> dict[str, str]:
        """What an operator sets."""
        return {
            "AWS_ENDPOINT": f"http://127.0.0.1:{self._socket.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    async def _object(self, request: Request) -> Response:
        key, query = request.path_params["key"], request.query_params
        if not request.headers.get("authorization", "").startswith("AWS4-HMAC-SHA256 Credential=key/"):
            return Response("<Error><Code>AccessDenied</Code></Error>", 403)
        content = await request.body()
        match request.method:
            case "POST" if "uploads" in query:
                upload = uuid4().hex
                self.uploads[upload] = {}
                return _xml("InitiateMultipartUploadResult", UploadId=upload, Key=key, Bucket="bucket")
            case "PUT" if "uploadId" in query:
                self.uploads[query["uploadId"]][int(query["partNumber"])] = content
                return Response(headers={"etag": _etag(content)})
            case "POST" if "uploadId" in query:
                parts = self.uploads.pop(query["uploadId"])
                numbers = [int(number) for number in re.findall(r"<PartNumber>(\d+)<", content.decode())]
                self.objects[key] = b"".join(parts[number] for number in numbers)
                self.completed += 1
                return _xml("CompleteMultipartUploadResult", ETag=_etag(self.objects[key]), Key=key, Bucket="bucket")
            case "DELETE" if "uploadId" in query:
                self.uploads.pop(query["uploadId"])
                return Response(status_code=204)
            case "PUT":
                self.objects[key] = content
                return Response(headers={"etag": _etag(content)})
            case "DELETE":
                self.objects.pop(key, None)
                return Response(status_code=204)
        if key not in self.objects:
            return Response("<Error><Code>NoSuchKey</Code></Error>", 404)
        found = self.objects[key]
        headers = {"etag": _etag(found), "last-modified": LAST_MODIFIED}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", "")):
            begin, end = int(asked[1]), min(int(asked[2]) + 1, len(found))
            headers["content-range"] = f"bytes {begin}-{end - 1}/{len(found)}"
            return Response(found[begin:end], 206, headers)
        return Response(found, headers=headers)

    async def _bulk_delete(self, request: Request) -> Response:
        keys = re.findall(r"<Key>([^<]+)</Key>", (await request.body()).decode())
        for key in keys:
            self.objects.pop(key, None)
        return Response(
            "<DeleteResult>" + "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys) + "</DeleteResult>"
        )


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def _xml(name: str, **values: str) -> Response:
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in values.items())
    return Response(f"<{name}>{inner}</{name}>", media_type="application/xml")
