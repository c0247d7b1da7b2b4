"""The rows that a saved model is verified on, kept in the run that trained it.

verify_rows.jsonl holds up to 32 conversations (held-out ones if there are any) with the ids
and masks they were proved with, and, in its last line, what the model in memory predicted when it
was saved (`record.py`). So a run can be verified when its data is gone, and by a process that
shares nothing with training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from truetune.data.conversation import Conversation
from truetune.errors import InputError
from truetune.run_dir import RunDir

VERIFY_ROWS = "verify_rows.jsonl"
MOST_ROWS = 32


@dataclass(frozen=True)
class VerifyRow:
    """A conversation and what became of it in training.

    Attributes:
        conversation: as it was read.
        held_out: whether it was kept out of training.
        examples: (ids, mask) of each of its examples; 1 is supervised.
    """

    conversation: Conversation
    held_out: bool
    examples: tuple[tuple[list[int], list[int]], ...]


def examples_of(rows: Sequence[VerifyRow]) -> list[tuple[list[int], list[int]]]:
    """All examples, in order."""
    return [example for row in rows for example in row.examples]


def row_as_dict(row: VerifyRow) -> dict[str, Any]:
    """A line of verify_rows.jsonl."""
    return {**dataclasses.asdict(row), "conversation": dataclasses.asdict(row.conversation)}


def conversation_from(value: dict[str, Any]) -> Conversation:
    """A conversation from what `dataclasses.asdict` and JSON made of it."""
    known = {field.name for field in dataclasses.fields(Conversation)}
    given = {name: entry for name, entry in value.items() if name in known}
    for name in ("messages", "tools"):
        if given.get(name) is not None:
            given[name] = tuple(given[name])
    return Conversation(**given)


def read_rows(run: RunDir) -> list[VerifyRow]:
    """The rows of a run; [] if it has none.

    Raises:
        InputError: the file is damaged.
    """
    rows = []
    try:
        for value in run.lines(VERIFY_ROWS):
            if "record" in value:
                continue
            rows.append(
                VerifyRow(
                    conversation_from(value["conversation"]),
                    bool(value["held_out"]),
                    tuple(
                        ([int(i) for i in ids], [int(on) for on in mask])
                        for ids, mask in value["examples"]
                    ),
                )
            )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{VERIFY_ROWS} cannot be read: {error}",
            where=str(run.file(VERIFY_ROWS)),
            why="it was edited or cut off",
            fix="copy the run again",
            code="verify-rows-unreadable",
        ) from error
    return rows
