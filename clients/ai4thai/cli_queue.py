"""The operator's commands: queue stats (also stats alone), pause, resume, purge."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from ai4thai.cli_job_output import print_stats
from ai4thai.cli_options import QUEUE, AsJson, QueueAddress
from ai4thai.cli_output import err, out, print_json
from ai4thai.queue_client import QueueClient

Name = Annotated[str, typer.Argument(metavar="NAME", help="The queue's name, such as default.")]

queue = typer.Typer(help="Counts, pauses, resumes and empties queues.", no_args_is_help=True)


@queue.command("stats")
def stats(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Only this queue.")] = "",
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Counts the jobs of each queue, and lists the workers."""
    with QueueClient(queue) as client:
        counts, workers = client.stats(name), client.workers()
    if json:
        print_json({"stats": counts, "workers": workers})
    else:
        print_stats(counts, workers)


@queue.command("pause")
def pause(name: Name, queue: QueueAddress = QUEUE) -> None:
    """Stops handing out a queue's jobs; those that run go on, new ones are accepted and wait."""
    with QueueClient(queue) as client:
        client.pause(name)
    out.print(f"{escape(name)} is paused")
    err.print(f"[dim]Go on with: ai4thai queue resume {escape(name)}[/]")


@queue.command("resume")
def resume(name: Name, queue: QueueAddress = QUEUE) -> None:
    """Hands out a paused queue's jobs again, in their order."""
    with QueueClient(queue) as client:
        client.resume(name)
    out.print(f"{escape(name)} goes on")


@queue.command("purge")
def purge(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Cancels all jobs that wait in a queue; those that run go on."""
    if not yes:
        typer.confirm(f"Cancel all jobs that wait in {name}?", abort=True, err=True)
    with QueueClient(queue) as client:
        count = client.purge(name)
    if json:
        print_json({"cancelled_count": count})
    else:
        out.print(f"{count} jobs cancelled" if count != 1 else "1 job cancelled")
