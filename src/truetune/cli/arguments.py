"""Arguments and options that several verbs have."""

from __future__ import annotations

from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL|FILE.gguf", help="A run, a model or adapter folder, or a GGUF file."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="Current location of the base model, if it has moved. (default: as recorded)"
    ),
]
Device = Annotated[str, typer.Option(help="Device: auto, cuda, mps or cpu.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
