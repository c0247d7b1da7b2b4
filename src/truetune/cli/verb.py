"""What every verb of the command line shares: how its help looks, and the screen."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer
import typer.core

from truetune.findings import near

if TYPE_CHECKING:
    from truetune.cli.screen import Screen


class Verb(typer.core.TyperCommand):
    """A verb whose help is plain text with grouped options and complete names."""

    # typer keeps click's types to itself, so there is nothing to annotate these with.
    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            # click finds every word with a few letters in common alike.
            if getattr(error, "possibilities", None):
                everything: list[Any] = self.get_params(ctx)
                shown = [p for p in everything if not p.hidden]
                there = [opt for p in shown for opt in p.opts if opt.startswith("--")]
                error.possibilities = near(error.option_name, there)  # type: ignore[attr-defined]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        parameters: list[Any] = self.get_params(ctx)
        for parameter in parameters:
            if parameter.param_type_name == "argument":
                groups.setdefault("Arguments", []).append(
                    (parameter.display_name_raw, parameter.help)
                )
                continue
            parameter.metavar = parameter.metavar or _METAVARS.get(parameter.bare_type())
            if record := parameter.get_help_record(ctx):
                groups.setdefault(parameter.rich_help_panel or "Options", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


_METAVARS = {"str": "TEXT", "int": "INT", "float": "FLOAT"}
CONTEXT = {"help_option_names": ["-h", "--help"]}


def open_screen() -> Screen:
    """Open the terminal for output. If torchrun started several processes, only the first one
    prints."""
    from truetune.cli.screen import Screen

    return Screen(quiet=os.environ.get("RANK", "0") != "0")
