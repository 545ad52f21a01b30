"""How the command line shows what the servers answer: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import Enum
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ai4thai.errors import AI4ThaiError
from ai4thai.results import Analysis, Answer, Detection, DetectResult
from ai4thai.server_info import Device, Model, ModelState, Task

out: Final = Console(highlight=False, soft_wrap=False)
"""What was asked for."""
err: Final = Console(stderr=True, highlight=False)
"""Progress, notes, errors: never mixed into what another program reads."""

# All of C0 and C1 but tab and line feed.
_CONTROL_CHARACTERS: Final = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def print_error(error: object) -> None:
    """One red line that says what was wrong."""
    err.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)


def print_note(text: str) -> None:
    """One dim line beside what was asked for."""
    err.print(f"[dim]{escape(text)}[/]", soft_wrap=True)


def print_piece(text: str) -> None:
    """A piece of an answer, at once. A terminal gets no control characters: what a model writes must not move its cursor."""
    sys.stdout.write(text.translate(_CONTROL_CHARACTERS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_json(value: object) -> None:
    """One value as JSON, a line to itself."""
    sys.stdout.write(json.dumps(as_json(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def plain_table(*columns: str) -> Table:
    """A table without lines, narrow enough for 80 columns; of its columns only the last one breaks its lines."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column != columns[-1])
    return table


def as_json(value: object) -> Any:
    """A result as JSON knows it: pictures left out, errors as code, reason and message, times in ISO 8601."""
    if isinstance(value, AI4ThaiError):
        return {"code": value.code, "reason": value.reason, "message": value.message, "metadata": value.metadata}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: as_json(inner) for name, inner in fields.items() if not isinstance(inner, bytes)}
    if isinstance(value, Mapping):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Enum):
        return value.value
    return value


def print_detection(name: str, result: DetectResult) -> None:
    """The objects of one image as a table."""
    notes = f"{result.width_px} x {result.height_px} px · {result.timings.total_ms:.0f} ms · {result.model}"
    out.print(f"[bold]{escape(name)}[/]  [dim]{escape(notes)}[/]", soft_wrap=True)
    if not result.detections and not result.classes:
        out.print("  nothing found\n")
        return
    more = [_more(item) for item in result.detections]
    table = plain_table("label", "confidence", "left, top – right, bottom (px)", *(["more"] if any(more) else []))
    for item, rest in zip(result.detections, more, strict=True):
        box = item.box
        number = "" if item.track_id is None else f"#{item.track_id} "
        place = f"{box.x_min_px:.0f}, {box.y_min_px:.0f} – {box.x_max_px:.0f}, {box.y_max_px:.0f}"
        table.add_row(number + escape(item.label), f"{item.confidence:.2f}", place, *([rest] if any(more) else []))
    for kind in result.classes:
        table.add_row(escape(kind.label), f"{kind.confidence:.2f}", "the whole image")
    out.print(table)
    out.print()


def _more(item: Detection) -> str:
    """What a model tells of an object beyond its box, in a few words."""
    words = []
    if item.oriented_box is not None:
        turned = item.oriented_box
        words.append(f"{turned.width_px:.0f} × {turned.height_px:.0f} turned by {turned.angle_degrees:.0f}°")
    if item.mask is not None:
        words.append(f"mask of {item.mask.area_px:.0f} px²")
    words += [f"{escape(point.name)} {point.x_px:.0f}, {point.y_px:.0f}" for point in item.keypoints]
    return "; ".join(words)


def print_analysis(name: str, result: Analysis) -> None:
    """The answer about one image, then its objects."""
    out.print(f"[bold]{escape(result.text)}[/]")
    print_detection(name, result.detection)


def in_words(labels: Iterable[str]) -> str:
    """Labels counted: `2 × circle, star`; `nothing` without any. (They are a model's own words: nobody knows their plurals.)"""
    counted = Counter(labels)
    return (
        ", ".join(label if count == 1 else f"{count} × {label}" for label, count in sorted(counted.items()))
        or "nothing"
    )


def print_answer_notes(answer: Answer) -> None:
    """How a text came about, one dim line."""
    speed = ""
    writing_ms = answer.timings.total_ms - answer.timings.time_to_first_token_ms
    if answer.usage.completion_tokens > 1 and writing_ms > 0:
        speed = f" · {(answer.usage.completion_tokens - 1) / writing_ms * 1000:.0f} tokens/s"
    err.print(
        f"[dim]{answer.model} · {answer.usage.completion_tokens} tokens{speed} · first after "
        f"{answer.timings.time_to_first_token_ms:.0f} ms · {answer.finish_reason.value.lower()}[/]"
    )


def print_models(models: Iterable[Model]) -> None:
    """Models as a table; a star marks those that answer when a request names none."""
    table = plain_table("model", "task", "state", "runs on", "labels")
    for model in models:
        about = escape(model.state_reason or ", ".join(model.labels[:6]) + (" …" if len(model.labels) > 6 else ""))
        task = "" if model.task == Task.UNSPECIFIED else model.task.value.lower()
        name = escape(model.name) + (" *" if model.is_default else "")
        runs_on = f"{model.engine} {model.precision} {model.device}".strip()
        table.add_row(name, task, model_state(model), runs_on, about)
    out.print(table)


def model_state(model: Model) -> str:
    """Where a model is in its life, with markup."""
    styles = {ModelState.READY: "green", ModelState.FAILED: "red", ModelState.UNLOADED: "dim"}
    state = f"[{styles.get(model.state, 'yellow')}]{model.state.value}[/]"
    if model.state.is_on_its_way:
        return f"{state} {model.load_progress:.0%}"
    if model.state == ModelState.READY and model.load_progress < 1:
        return f"{state} [yellow]newer weights {model.load_progress:.0%}[/]"
    return state


def print_devices(devices: Iterable[Device]) -> None:
    """Devices as a table; what a device can't tell stays empty."""
    out.print(devices_table(devices))


def devices_table(devices: Iterable[Device]) -> Table:
    """A row for each device."""
    table = plain_table("device", "memory", "busy", "utilization", "temperature", "power", "name")
    for device in devices:
        table.add_row(
            device.kind if device.kind == "cpu" else f"{device.kind}:{device.index}",
            f"{device.memory_used_bytes / 2**30:.1f} of {device.memory_total_bytes / 2**30:.1f} GiB",
            f"{device.busy_ratio:.0%}",
            "" if device.utilization is None else f"{device.utilization:.0%}",
            "" if device.temperature_celsius is None else f"{device.temperature_celsius:.0f} °C",
            "" if device.power_watts is None else f"{device.power_watts:.0f} W",
            escape(" ".join(filter(None, (device.name, device.mig_profile)))),
        )
    return table
