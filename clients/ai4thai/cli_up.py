"""The commands that run the platform on this machine: up, demo."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.markup import escape

from ai4thai.cli_output import err, out, print_error
from ai4thai.part import PartEnded
from ai4thai.stack import Ports, PortTaken, Stack, default_data_dir

FREE_PORT_TRIES: Final = 4
"""A port that was free a moment ago can be taken by the time a server binds it."""

_STYLES = {"broker": "magenta", "vision": "cyan", "queue": "green", "worker": "yellow"}


def up(
    vision_port: Annotated[int, typer.Option(envvar="VISION_SERVICE_PORT", min=1, max=65535)] = 2001,
    queue_port: Annotated[int, typer.Option(envvar="QUEUE_WORKER_PORT", min=1, max=65535)] = 2003,
    redis_port: Annotated[
        int, typer.Option(envvar="REDIS_PORT", min=1, max=65535, help="Of the embedded broker.")
    ] = 6379,
    free_ports: Annotated[bool, typer.Option("--free-ports", help="Take ports that nobody uses.")] = False,
    host: Annotated[
        str, typer.Option(envvar="SERVING_HOST", help="Where to listen; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="AI4THAI_DATA_DIR", help="Jobs, logs, models. \\[default: the user's data directory]"),
    ] = None,
    redis_url: Annotated[
        str, typer.Option(envvar="REDIS_URL", help="Use this Redis. \\[default: an embedded broker]")
    ] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the processes log.")] = False,
) -> None:
    """Starts broker, vision server, queue server and worker, and again what dies; Ctrl-C stops them in order."""
    ports = Ports.free() if free_ports else Ports(vision_port, queue_port, redis_port)
    env = {} if "SERVING_LOG_FORMAT" in os.environ else {"SERVING_LOG_FORMAT": "console"}
    stack = Stack(ports, data_dir or default_data_dir(), host, redis_url, env)
    exit_code = 0
    with interruptible():
        try:
            run_stack(stack, verbose=verbose)
        except KeyboardInterrupt:
            pass
        except (PartEnded, PortTaken) as error:
            print_error(error)
            exit_code = 1
        finally:
            stopped_cleanly = stop_stack(stack)
    raise typer.Exit(exit_code if stopped_cleanly else 1)


def run_stack(stack: Stack, *, verbose: bool) -> None:
    """Starts the stack, tells how to use it, then mends it until someone interrupts."""
    begun_s = time.monotonic()
    bring_up(stack, verbose=verbose)
    _tell_ready(stack, time.monotonic() - begun_s)
    while True:
        for part, news in stack.mend():
            err.print(f"[{_STYLES[part.name]}]{part.name}[/] {news}. [dim]{escape(str(part.log))}[/]", soft_wrap=True)
        time.sleep(0.3)


def demo(
    save: Annotated[
        Path, typer.Option(help="Where the annotated picture goes (JPEG); the clip goes beside it (MP4).")
    ] = Path(".demo/annotated.jpg"),
) -> None:
    """Starts everything on free ports, shows what it can do, stops it again."""
    from ai4thai.demo import run_demo  # only this command needs it

    with interruptible():
        try:
            run_demo(save)
        except (PartEnded, PortTaken) as error:
            print_error(error)
            raise typer.Exit(1) from None


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does: it raises KeyboardInterrupt."""
    # SIGINT too: a shell without job control starts background commands with it ignored.
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bring_up(stack: Stack, *, verbose: bool = False) -> None:
    """Starts the processes and returns when they are ready; if free ports were taken meanwhile, tries a few others.

    Raises:
        PartEnded, PortTaken: it did not come to that.
    """
    for tries_left in reversed(range(FREE_PORT_TRIES)):
        try:
            _start(stack)
            if verbose:
                show_logs(stack)
            _wait_until_ready(stack)
        except (PartEnded, PortTaken):
            if not tries_left or not stack.lost_a_port():
                raise
            err.print("[yellow]A port that was free has been taken meanwhile;[/] starting again on others.")
            stack.move()
        else:
            return


def _start(stack: Stack) -> None:
    """Starts the processes and says which."""
    stack.start()
    names = ", ".join(f"[{_STYLES[part.name]}]{part.name}[/]" for part in stack.parts)
    err.print(f"Started {names}. [dim]Logs: {escape(str(stack.log_dir))}[/]", soft_wrap=True)


def _wait_until_ready(stack: Stack) -> None:
    """Shows what is still missing until nothing is."""
    begun_s = time.monotonic()
    told: set[str] = set()
    with err.status("Starting …") as status:
        for missing in stack.waiting_for():
            for name in ("vision", "queue", "worker"):
                if name not in missing and name not in told:
                    told.add(name)
                    err.print(
                        f"  [green]✓[/] [{_STYLES[name]}]{name:<7}[/] ready after {time.monotonic() - begun_s:.1f} s"
                    )
            waiting = " · ".join(f"{name}: {word}" for name, word in missing.items())
            status.update(f"{waiting}  [dim]{time.monotonic() - begun_s:.0f} s[/]")
    for name, why in stack.failed_models().items():
        err.print(f"  [red]✗ the model {escape(name)} could not be loaded:[/] {escape(why)}", soft_wrap=True)


def stop_stack(stack: Stack) -> bool:
    """Stops the processes in order, whether all stopped cleanly; a second Ctrl-C ends them at once."""
    try:
        with err.status("Stopping …") as status:
            unclean = stack.stop(lambda name: status.update(f"Stopping {name} … [dim](Ctrl-C again: at once)[/]"))
    except KeyboardInterrupt:
        stack.kill()
        err.print("[yellow]Ended at once, without draining.[/]")
        return False
    for part in unclean:
        print_error(f"{part.name} ended with {part.exit_code} when it was stopped: {part.log}")
    if stack.parts:
        err.print("Stopped.")
    return not unclean


def show_logs(stack: Stack) -> None:
    """Repeats what the processes log on this terminal, from now on, each line with its process's name."""
    for part in stack.parts:
        threading.Thread(target=_follow, args=(part.name, part.log), daemon=True).start()


def _follow(name: str, path: Path) -> None:
    with path.open(errors="replace") as log:
        while True:
            line = log.readline()
            if line:
                err.print(f"[{_STYLES[name]}]{name:<7}[/] {escape(line.rstrip())}", soft_wrap=True)
            else:
                time.sleep(0.1)


def _tell_ready(stack: Stack, took_s: float) -> None:
    broker = "an embedded broker" if not stack.redis_url else "your Redis"
    out.print(f"\n[bold green]Ready[/] after {took_s:.1f} s. Jobs are kept in {broker}.\n")
    out.print(f"  vision  [bold]{stack.vision_address}[/]   gRPC, and http://{stack.vision_address}/info")
    out.print(f"  queue   [bold]{stack.queue_address}[/]   gRPC, and http://{stack.queue_address}/queue/stats\n")
    if stack.ports != Ports():
        out.print("Tell the command line in another terminal where they are:")
        where = f"AI4THAI_VISION_ADDRESS={stack.vision_address} AI4THAI_QUEUE_ADDRESS={stack.queue_address}"
        out.print(f"  export {where}\n", soft_wrap=True)  # to be copied whole
    out.print("Then try:")
    out.print("  ai4thai detect IMAGE --save out.jpg")
    out.print('  ai4thai ask IMAGE "What is in the picture?"')
    out.print("  ai4thai submit detect IMAGE --wait")
    out.print("  ai4thai health\n")
    out.print("[dim]Ctrl-C stops everything.[/]")
