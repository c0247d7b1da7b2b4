"""What `truetune inspect MODEL --data DATA` shows: rows as they are trained, token for token."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.text import Text

from truetune.cli.screen import Screen
from truetune.contract.contract import PromptContract, Refused
from truetune.contract.encode import Encoded
from truetune.contract.specials import find_controls
from truetune.contract.view import KINDS, Kind, pieces, story
from truetune.data.conversation import Conversation
from truetune.data.load import Loaded, load
from truetune.errors import UsageError
from truetune.findings import Finding, escaped, visible
from truetune.model.tokenizer import load_tokenizer
from truetune.recipe.settings import Recipe
from truetune.reporting.html import document, legend, token_spans
from truetune.run.prepare import contract_of
from truetune.run_dir import opened

_STYLES: dict[Kind, str] = {
    "shared": "bright_black",
    "prompt": "blue",
    "context": "cyan",
    "supervised": "green",
    "stop": "bold white on red",
}


@dataclass(frozen=True)
class RowView:
    """A row and its encoding."""

    number: int
    conversation: Conversation
    result: Encoded | Refused
    findings: tuple[Finding, ...] = ()


def view_rows(
    recipe: Recipe, row: str | None, most: int = 1
) -> tuple[PromptContract, list[RowView], int]:
    """(contract, rows, how many rows were read): the rows asked for, encoded as a run would.

    Args:
        recipe: with model and data.
        row: its number in the data, from 1, or its place as findings name it
            (`rows.jsonl:17`, `rows.json row 3`); None takes the first.
        most: how many where none was named.

    Raises:
        UsageError: there is no such row, or it cannot be read.
        TruetuneError: model or data that cannot be read.
    """
    assert recipe.model
    assert recipe.data
    tokenizer = load_tokenizer(opened(recipe.model), recipe.revision)
    loaded = load(
        recipe.data,
        schema=recipe.schema,
        columns=recipe.columns,
        split=recipe.split,
        limit=recipe.max_train_samples,
    )
    chosen = loaded.conversations[:most] if row is None else _named(loaded, row, str(recipe.data))
    if not chosen:
        raise _no_such_row("there are no readable rows", loaded, str(recipe.data))
    contract = contract_of(tokenizer, recipe).fit(loaded.conversations, loss_on=recipe.loss_on)
    results = contract.encode_all(chosen, loss_on=recipe.loss_on)
    controls = find_controls(contract, chosen, refuse=recipe.content_specials == "error")
    numbers = {place: number for number, place in enumerate(loaded.places, 1)}
    views = [
        RowView(
            numbers[_row_place(shown, numbers)],
            shown,
            result,
            (controls[at],) if at in controls else (),
        )
        for at, (shown, result) in enumerate(zip(chosen, results, strict=True))
    ]
    return contract, views, len(loaded.places)


def _named(loaded: Loaded, row: str, source: str) -> list[Conversation]:
    """The conversations of the row that a number or a place names.

    Raises:
        UsageError: there is no such row, or it was refused when it was read.
    """
    if row.isdecimal():
        number = int(row)
        places = list(loaded.places[number - 1 : number]) if number else []
    else:
        # A finding names a place inside the row as well, and may be typed without its folder.
        wanted = row.strip()
        places = [
            place
            for place in loaded.places
            if wanted == place
            or wanted.startswith(f"{place}, ")
            or (wanted and place.endswith((f"/{wanted}", f"{os.sep}{wanted}")))
            or (wanted[:1] == ":" and place.endswith(wanted))
        ]
    if not places:
        raise _no_such_row(f"there is no row {row}", loaded, source)
    if len(places) > 1:
        raise _no_such_row(f"{row} names {len(places):,} rows, but one is shown", loaded, source)
    known = set(loaded.places)
    chosen = [c for c in loaded.conversations if _row_place(c, known) == places[0]]
    if not chosen:
        refused = (f for f in loaded.findings if f.where.startswith(places[0]))
        why = next((f.what for f in refused if f.level == "error"), "its text is empty")
        raise UsageError(
            f"row {row} cannot be used for training: {why}",
            where=places[0],
            fix="correct the row, or specify --set schema=... or --set columns=...",
            code="no-such-row",
        )
    return chosen


def _row_place(conversation: Conversation, places: Collection[str]) -> str:
    """The place of the row that a conversation, or an instance of one, came from."""
    if conversation.where in places:
        return conversation.where
    return conversation.where.rpartition(", instances[")[0]


def _no_such_row(what: str, loaded: Loaded, source: str) -> UsageError:
    there = len(loaded.places)
    return UsageError(
        f"{what}: the data has {there:,} rows",
        where=source,
        fix=f"pass a number from 1 to {there} with --row, or a location as shown in findings: "
        f"{loaded.places[0]}"
        if there
        else "pass other data, or specify its schema with --set schema=...",
        code="no-such-row",
    )


def show_rows(
    screen: Screen,
    contract: PromptContract,
    views: Sequence[RowView],
    total: int,
    *,
    with_ids: bool = False,
) -> None:
    """Draw rows on the terminal."""
    kinds = Text()
    for kind, words in KINDS.items():
        kinds.append(f" {words} ", style=_STYLES[kind])
        kinds.append("  ")
    screen.console.print(kinds)
    for note in contract.findings:
        screen.line(f"note: {note.what}", "cyan")
    for view in views:
        screen.line()
        screen.line(f"row {view.number:,} of {total:,}  {view.conversation.where}", "bold")
        if isinstance(view.result, Refused):
            screen.line(str(view.result.error), "yellow")
            continue
        for line in story(view.result):
            screen.line(f"  {line}", "dim")
        for finding in view.findings:
            screen.line(f"  {finding.level}: {finding.what} ({finding.where})", "yellow")
        for index in range(len(view.result)):
            _show_example(screen, contract, view.result, index, with_ids)


def _show_example(
    screen: Screen, contract: PromptContract, encoded: Encoded, index: int, with_ids: bool
) -> None:
    example = encoded[index]
    if len(encoded) > 1:
        parent = encoded.parents[index]
        of = (
            ""
            if parent is None
            else f", from sequence {parent + 1} at token {encoded.shared[index]}"
        )
        screen.line()
        screen.line(f"  sequence {index + 1}{of}", "bold")
    screen.line(f"  {len(example.ids):,} tokens, {sum(example.mask):,} supervised", "dim")
    text = Text()
    for piece in pieces(contract, encoded, index):
        text.append(visible(piece.text), style=_STYLES[piece.kind])
        if with_ids:
            text.append(f" {list(piece.ids)} ", style="dim")
    screen.console.print(text)


def rows_page(contract: PromptContract, views: Sequence[RowView], total: int, title: str) -> str:
    """The same as one HTML page."""
    return document(
        title,
        [
            f"<h1>{escaped(title)}</h1>",
            f'{legend()}<p class="dim">Hover over a token for its id. Stop tokens: '
            f"{escaped(_stops(contract))}.</p>",
            *(f"<p>note: {escaped(note.what)}</p>" for note in contract.findings),
            *(_row_html(contract, view, total) for view in views),
        ],
    )


def _stops(contract: PromptContract) -> str:
    return ", ".join(f"{contract.tokens.decode([i])} ({i})" for i in contract.stop_ids) or "empty"


def _row_html(contract: PromptContract, view: RowView, total: int) -> str:
    head = f"<h2>Row {view.number:,} of {total:,}</h2>"
    head += f'<p class="dim">{escaped(view.conversation.where)}</p>'
    if isinstance(view.result, Refused):
        return f'{head}<p class="refused">{escaped(str(view.result.error))}</p>'
    encoded = view.result
    head += "".join(f"<p>{escaped(line)}</p>" for line in story(encoded))
    head += "".join(
        f'<p class="refused">{escaped(f"{f.level}: {f.what} ({f.where})")}</p>'
        for f in view.findings
    )
    for index, example in enumerate(encoded):
        name = f"sequence {index + 1}: " if len(encoded) > 1 else ""
        counts = f"{len(example.ids):,} tokens, {sum(example.mask):,} supervised"
        spans = "".join(
            token_spans(piece.kind, piece.ids, piece.texts)
            for piece in pieces(contract, encoded, index)
        )
        head += f'<p class="dim">{name}{counts}</p><pre>{spans}</pre>'
    return head
