"""The commands that load and unload a vision server's models: models list, show, load, unload, export."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ai4thai import cli_export
from ai4thai.cli_options import VISION, AsJson, VisionAddress
from ai4thai.cli_output import err, model_state, out, print_json, print_models
from ai4thai.errors import AI4ThaiError
from ai4thai.server_info import Model
from ai4thai.vision_client import VisionClient

_LOOK_EVERY_S: Final = 0.25
_PATIENCE_S: Final = 3600.0
"""How long a command waits for a model at most; the largest ones take minutes."""

models = typer.Typer(help="Lists, loads and unloads the models of a vision server.", no_args_is_help=True)

Name = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Its name, with or without @VERSION; an alias; as `models list` prints it."),
]


@models.command("list")
def list_models(json: AsJson = False, vision: VisionAddress = VISION) -> None:
    """Lists the models: those that the server was told to serve, then the others that it has or could load."""
    with VisionClient(vision) as client:
        found = client.list_models()
    if json:
        for model in found:
            print_json(model)
    else:
        print_models(found)


@models.command()
def show(name: Name, json: AsJson = False, vision: VisionAddress = VISION) -> None:
    """Tells all about one model."""
    with VisionClient(vision) as client:
        _print(client.get_model(name), json)


@models.command()
def load(
    name: Name,
    alias: Annotated[
        list[str] | None,
        typer.Option(help="Another name that it shall answer to, taken from the model that has it; may be repeated."),
    ] = None,
    json: AsJson = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Wait no longer.")] = _PATIENCE_S,
    vision: VisionAddress = VISION,
) -> None:
    """Loads a model of the server's model directory, or anew when its weights have changed, and waits until it is ready.

    Until then the one in memory answers. Ctrl-C stops the waiting, not the loading.
    """
    with VisionClient(vision) as client, ThreadPoolExecutor(1) as beside:
        loading = beside.submit(client.load_model, name, alias or [], timeout_s=timeout)
        try:
            _watch(client, name, loading)
        except KeyboardInterrupt:
            client.close()  # ends the call that the thread waits for
            raise
        _print(loading.result(), json)


@models.command()
def unload(
    name: Name,
    json: AsJson = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Wait no longer.")] = _PATIENCE_S,
    vision: VisionAddress = VISION,
) -> None:
    """Has a model finish its calls and leave the memory."""
    with VisionClient(vision) as client:
        _print(client.unload_model(name, timeout_s=timeout), json)


models.command()(cli_export.export)


def _watch(client: VisionClient, name: str, loading: Future[Model]) -> None:
    """Shows how far the model is until the call has ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task(name, total=1.0)
        while not loading.done():
            try:
                model = client.get_model(name)
            except AI4ThaiError:
                pass  # what is wrong is told by the call itself
            else:
                state = model.state.value.lower().replace("_", " ")
                progress.update(bar, completed=model.load_progress, description=f"{name}: {state}")
            time.sleep(_LOOK_EVERY_S)


def _print(model: Model, json: bool) -> None:
    if json:
        print_json(model)
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = {
        "version": escape(model.version),
        "aliases": escape(", ".join(model.aliases)),
        "why": escape(model.state_reason),
        "task": "" if model.task == "UNSPECIFIED" else model.task.value.lower(),
        "runs on": escape(f"{model.engine} {model.precision} {model.device}".strip()),
        "input": f"{model.input_size_px} px" if model.input_size_px else "",
        "weights": f"{model.memory_bytes / 1e6:.1f} MB" if model.memory_bytes else "",
        "labels": escape(", ".join(model.labels)),
        "keypoints": escape(", ".join(model.keypoint_names)),
        "default": "answers requests that name no model" if model.is_default else "",
    }
    table.add_row("[bold]model[/]", f"[bold]{escape(model.name)}[/] {model_state(model)}")
    for title, text in rows.items():
        if text:
            table.add_row(f"[dim]{title}[/]", text)
    out.print(table)
