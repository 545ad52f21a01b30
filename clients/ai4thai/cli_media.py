"""The commands that store and fetch files: media put, get."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ai4thai.cli_options import QUEUE, AsJson, QueueAddress
from ai4thai.cli_output import err, out, print_json
from ai4thai.queue_client import QueueClient

media = typer.Typer(help="Stores files that jobs need, and fetches those that they bring.", no_args_is_help=True)


@media.command("put")
def put(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="An image or a video; - for the input.")],
    content_type: Annotated[str, typer.Option(metavar="TYPE", help="Its media type. \\[default: by its name]")] = "",
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Stores files, and prints their ids; what the server has already is not sent again."""
    with QueueClient(queue) as client:
        for file in files:
            source = sys.stdin.buffer if file == Path("-") else file
            with progress_bar("uploading", file.name) as on_progress:
                stored = client.upload(source, content_type=content_type, on_progress=on_progress)
            if json:
                print_json(stored)
                continue
            out.print(stored.media_id, soft_wrap=True)  # alone on stdout, for scripts
            until = (
                f", kept until {stored.expire_time.astimezone():%H:%M} unless a job needs it"
                if stored.expire_time
                else ""
            )
            err.print(f"[dim]{escape(file.name)}: {stored.size_bytes:,} bytes{until}[/]", soft_wrap=True)


@media.command("get")
def get(
    media_id: Annotated[str, typer.Argument(metavar="MEDIA_ID", help="sha256:…, as `put` and `watch` print it.")],
    target: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to; - for the output. Required.")
    ],
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Fetches a file, and verifies it."""
    with QueueClient(queue) as client:
        if target == Path("-"):
            client.download(media_id, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            return
        with progress_bar("downloading", target.name) as on_progress:
            fetched = client.download(media_id, target, on_progress=on_progress)
    if json:
        print_json(fetched)
    else:
        err.print(f"[green]saved[/] {escape(str(target))} [dim]{fetched.size_bytes:,} bytes[/]", soft_wrap=True)


@contextmanager
def progress_bar(doing: str, name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for a file that goes up or down, where people look; gives what is to be told the bytes so far and in all."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as progress:
        task = progress.add_task(f"{doing} {escape(name)}", total=None, visible=False)
        yield lambda done_bytes, all_bytes: progress.update(task, completed=done_bytes, total=all_bytes, visible=True)
