"""A client of a released contract: built from its descriptors alone, like a program that was generated from it long ago."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2

from benchmarks.rehearsal_parts import ROOT

RELEASES = tuple(sorted((ROOT / "protos" / "released").glob("*.binpb")))


class Released:
    """Messages and methods of one release; requests and answers are dicts in protobuf's JSON form, with the proto's names."""

    def __init__(self, image: Path) -> None:
        # An image of buf has the layout of a FileDescriptorSet; what is imported comes first.
        files = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file
        self._pool = descriptor_pool.DescriptorPool()
        self.methods: set[str] = set()
        self.called: set[str] = set()
        for file in files:
            self._pool.Add(file)
            for service in file.service:
                self.methods |= {f"{file.package}.{service.name}/{method.name}" for method in service.method}

        # The details of errors, which the contract does not name: every client has them from googleapis.
        details = descriptor_pb2.FileDescriptorProto()
        error_details_pb2.DESCRIPTOR.CopyToProto(details)
        self._pool.Add(details)

    def call(self, channel: grpc.Channel, method: str, *requests: Mapping[str, Any], at_most: int = 1000) -> list[Any]:
        """Calls a method with one request, or with a stream's; its answers, `at_most` of a stream's."""
        self.called.add(method)
        service, _, name = method.rpartition("/")
        shape: Any = self._pool.FindServiceByName(service).methods_by_name[name]
        answer = message_factory.GetMessageClass(shape.output_type)
        written = [
            json_format.ParseDict(one, message_factory.GetMessageClass(shape.input_type)(), descriptor_pool=self._pool)
            for one in requests
        ]
        kind = f"{'stream' if shape.client_streaming else 'unary'}_{'stream' if shape.server_streaming else 'unary'}"
        bound = getattr(channel, kind)(
            f"/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        answered = bound(iter(written) if shape.client_streaming else written[0], timeout=90)
        if not shape.server_streaming:
            return [self._read(answered)]
        read = []
        for one in answered:
            read.append(self._read(one))
            if len(read) == at_most:
                answered.cancel()
                break
        return read

    def _read(self, message: Any) -> dict[str, Any]:
        return json_format.MessageToDict(message, preserving_proto_field_name=True, descriptor_pool=self._pool)


def camera(contents: Iterable[str]) -> list[dict[str, Any]]:
    """The requests of a stream; contents in base64."""
    return [
        {"config": {}},
        *({"frame": {"frame_id": n, "image": {"content": content}}} for n, content in enumerate(contents)),
    ]
