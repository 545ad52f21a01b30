"""The command that exports a model for another engine, on the machine of the vision server."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from ai4thai.cli_output import err, out, print_error
from ai4thai.stack import default_data_dir


def export(
    name: Annotated[
        str, typer.Argument(help="A shipped model, one of the model directory, or one that Ultralytics publishes.")
    ],
    engine: Annotated[
        Literal["openvino", "onnx", "engine"],
        typer.Option(help="openvino: for CPUs. onnx: for ONNX Runtime. engine: TensorRT, for this machine's GPU."),
    ],
    image_size: Annotated[
        int, typer.Option(min=0, max=4096, metavar="PX", help="Side of the square. 0: as the model was trained.")
    ] = 0,
    half: Annotated[
        bool, typer.Option("--half", help="Weights of 16 bits: half the size, a little less exact.")
    ] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="AI4THAI_DATA_DIR", help="Of the server. \\[default: the user's data directory]"),
    ] = None,
) -> None:
    """Exports a model for a faster engine; the server on this machine picks it up when it loads the model next.

    A server on a CPU converts for OpenVINO by itself; an export spares it that.
    """
    if find_spec("vision_server") is None:
        print_error("The vision server is not installed here, and it does the work: pip install 'ai4thai[vision]'")
        raise typer.Exit(1)
    command = [sys.executable, "-m", "vision_server.export", name, "--engine", engine, "--image-size", str(image_size)]
    if half:
        command.append("--half")
    last = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        with (
            err.status("Starting …") as status,
            subprocess.Popen(
                command,
                env={**os.environ, "AI4THAI_DATA_DIR": str(data_dir or default_data_dir())},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip()
                status.update(f"{last[:1].upper()}{last[1:]} …")
        if process.returncode:
            said.seek(0)
            words = [line for line in said.read().splitlines() if line.strip()]
            print_error(words[-1] if words else f"the export ended with {process.returncode}")
            raise typer.Exit(1)
    out.print(last, soft_wrap=True, markup=False)
