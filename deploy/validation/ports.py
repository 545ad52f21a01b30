"""The two ports that are open to others, and that the servers' own settings agree with them."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.validation.findings import Finding

VISION_PORT = 2001
QUEUE_PORT = 2003


def setting_findings() -> Iterator[Finding]:
    """The servers listen there when nothing says otherwise."""
    # Here, because most checks do without the servers' packages.
    from queue_server.settings import QueueSettings
    from vision_server.settings import VisionSettings

    for path, port, wanted, variable in (
        ("vision_server/settings.py", VisionSettings.model_fields["port"].default, VISION_PORT, "VISION_SERVICE_PORT"),
        ("queue_server/settings.py", QueueSettings.model_fields["port"].default, QUEUE_PORT, "QUEUE_WORKER_PORT"),
    ):
        if port != wanted:
            wrong = f"{variable} is {port} by default, but the images expose {wanted}"
            yield Finding(
                path, 0, wrong, f"Make {wanted} the default, or change the Dockerfile, compose.yaml and this check."
            )
