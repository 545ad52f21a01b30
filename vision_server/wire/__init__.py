"""Between protobuf messages and the server's own dataclasses."""

from vision_server.wire.reading import (
    check_text,
    read_aliases,
    read_detect_options,
    read_generate_options,
    read_image,
    read_interval_s,
    read_messages,
    read_priority,
    read_question,
    read_stream_config,
)
from vision_server.wire.writing import (
    DOMAIN,
    write_analysis,
    write_detections,
    write_device,
    write_generated,
    write_model,
    write_models,
    write_server_info,
    write_stream,
)

__all__ = [
    "DOMAIN",
    "check_text",
    "read_aliases",
    "read_detect_options",
    "read_generate_options",
    "read_image",
    "read_interval_s",
    "read_messages",
    "read_priority",
    "read_question",
    "read_stream_config",
    "write_analysis",
    "write_detections",
    "write_device",
    "write_generated",
    "write_model",
    "write_models",
    "write_server_info",
    "write_stream",
]
