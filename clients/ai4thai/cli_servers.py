"""The commands that ask the servers about themselves: health, info, devices."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ai4thai import probe, queue_client, vision_client
from ai4thai.cli_options import QUEUE, VISION, AsJson, QueueAddress, TimeoutS, VisionAddress
from ai4thai.cli_output import devices_table, out, print_devices, print_json, print_models
from ai4thai.errors import AI4ThaiError
from ai4thai.queue_client import QueueClient
from ai4thai.server_info import Health
from ai4thai.vision_client import VisionClient


def health(
    grpc: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Ask this server alone, for health checks: one line, quick.")
    ] = "",
    service: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --grpc: one name of grpc.health.v1; '' is the process. \\[default: all that makes it ready]",
        ),
    ] = None,
    worker: Annotated[
        bool, typer.Option("--worker", help="Ask the workers of this machine or container, for health checks.")
    ] = False,
    timeout: TimeoutS = probe.DEFAULT_TIMEOUT_S,
    json: AsJson = False,
    vision: VisionAddress = VISION,
    queue: QueueAddress = QUEUE,
) -> None:
    """Tells whether both servers are ready, or one of them, or the worker here; exits 0 when so."""
    if grpc or worker:  # usually answered before all this was imported: __main__.py
        finding = probe.ask_worker() if worker else probe.ask_server(grpc, service, timeout)
        out.print(finding.line, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(0 if finding.is_well else 1)
    with VisionClient(vision, timeout_s=timeout) as seeing, QueueClient(queue, timeout_s=timeout) as queueing:
        answers = {
            "vision": (vision, _ask_health(seeing, vision_client.SERVICE_NAME)),
            "queue": (queue, _ask_health(queueing, queue_client.SERVICE_NAME)),
        }
    if json:
        print_json({name: {"address": address, "health": answer[0]} for name, (address, answer) in answers.items()})
    else:
        table = Table(box=None, show_header=False)
        for name, (address, (state, why)) in answers.items():
            style = "green" if state == Health.SERVING else "red"
            table.add_row(name, address, f"[{style}]{state}[/]", f"[dim]{escape(why)}[/]")
        out.print(table)
    if any(state != Health.SERVING for _, (state, _) in answers.values()):
        raise typer.Exit(1)


def info(json: AsJson = False, vision: VisionAddress = VISION) -> None:
    """Tells what the vision server is, what it has loaded and what it runs on."""
    with VisionClient(vision) as client:
        server, devices = client.info(), client.devices()
    if json:
        print_json({"server": server, "devices": devices})
        return
    state = "[green]ready[/]" if server.ready else "[yellow]not ready[/]"
    out.print(f"vision server {server.version} at {escape(vision)}: {state}, up for {_duration(server.uptime_s)}")
    out.print(f"[dim]can:[/] {', '.join(server.capabilities)}")
    limits = server.limits
    out.print(
        f"[dim]takes:[/] images up to {limits.max_image_bytes / 1e6:.0f} MB and {limits.max_image_pixels / 1e6:.0f} megapixels, "
        f"{limits.max_new_tokens} new tokens, {limits.max_stream_in_flight} pictures of a stream at once\n"
    )
    print_models(server.models)
    out.print()
    print_devices(devices)


def devices(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until Ctrl-C.")] = False,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=3600, help="With --watch: the time in between.")
    ] = 1.0,
    json: AsJson = False,
    vision: VisionAddress = VISION,
) -> None:
    """Tells of the devices that the vision server's models run on, and how busy they are."""
    with VisionClient(vision) as client:
        if not watch:
            found = client.devices()
            print_json(found) if json else print_devices(found)
        elif json:
            for moment in client.watch_devices(interval):
                print_json(moment)
        else:
            with Live(console=out, auto_refresh=False) as live:
                for moment in client.watch_devices(interval):
                    live.update(devices_table(moment), refresh=True)


def _ask_health(client: VisionClient | QueueClient, service: str) -> tuple[str, str]:
    try:
        state = client.health(service)
    except AI4ThaiError as error:
        return "UNREACHABLE", str(error)
    return state.value, "" if state == Health.SERVING else "curl its /health/detailed for the reasons"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
