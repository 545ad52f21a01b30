"""The command line `ai4thai`: puts the commands together; an error is one red line, never a traceback."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ai4thai import (
    cli_bench,
    cli_chat,
    cli_doctor,
    cli_jobs,
    cli_media,
    cli_models,
    cli_queue,
    cli_servers,
    cli_submit,
    cli_up,
    cli_vision,
)
from ai4thai.cli_output import out, print_error, print_note
from ai4thai.errors import AI4ThaiError, Unavailable


class _Commands(TyperGroup):
    """Turns what a command raises into a line and an exit code: 1 for errors, 130 for Ctrl-C (2, for usage, is typer's)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AI4ThaiError as error:
            print_error(error)
            if error.retry_after_s:
                print_note(f"The server says: try again after {error.retry_after_s:g} s.")
            elif isinstance(error, Unavailable):
                print_note("Start one on this machine: ai4thai up. Another address: --vision, --queue.")
            raise typer.Exit(1) from None
        except FileNotFoundError as error:
            print_error(f"There is no file {error.filename}." if error.filename else error)
            raise typer.Exit(1) from None
        except IsADirectoryError as error:
            print_error(
                f"{error.filename} is a folder. Name files, or send a whole folder with: ai4thai stream {error.filename}"
            )
            raise typer.Exit(1) from None
        except BrokenPipeError:  # the reader, such as head, has seen enough; typer ends quietly
            raise
        except (OSError, ValueError) as error:
            print_error(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Finds objects in images and answers questions about them; runs jobs that survive.",
)
app.command(rich_help_panel="On this machine")(cli_up.up)
app.command(rich_help_panel="On this machine")(cli_up.demo)
app.command(rich_help_panel="On this machine")(cli_doctor.doctor)
app.command(rich_help_panel="Images")(cli_vision.detect)
app.command(rich_help_panel="Images")(cli_vision.stream)
app.command(rich_help_panel="Images")(cli_vision.ask)
app.command(rich_help_panel="Images")(cli_chat.chat)
app.command(rich_help_panel="Images")(cli_vision.analyze)
app.add_typer(cli_submit.submit, name="submit", rich_help_panel="Jobs")
app.command(rich_help_panel="Jobs")(cli_jobs.jobs)
app.command(rich_help_panel="Jobs")(cli_jobs.watch)
app.command(rich_help_panel="Jobs")(cli_jobs.cancel)
app.command(rich_help_panel="Jobs")(cli_jobs.retry)
app.command(rich_help_panel="Jobs")(cli_jobs.delete)
app.add_typer(cli_media.media, name="media", rich_help_panel="Jobs")
app.command(rich_help_panel="Servers")(cli_servers.health)
app.command(rich_help_panel="Servers")(cli_servers.info)
app.command(rich_help_panel="Servers")(cli_servers.devices)
app.command(rich_help_panel="Servers")(cli_queue.stats)
app.add_typer(cli_queue.queue, name="queue", rich_help_panel="Servers")
app.add_typer(cli_models.models, name="models", rich_help_panel="Servers")
app.command(rich_help_panel="Servers")(cli_bench.bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            out.print(f"ai4thai {version('ai4thai')}")
        except PackageNotFoundError:
            out.print("ai4thai (not installed)")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Finds objects in images and answers questions about them; runs jobs that survive."""


def main() -> None:
    """What the command `ai4thai` runs."""
    sys.exit(app())


if __name__ == "__main__":
    main()
