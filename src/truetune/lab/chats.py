"""Rows to examples under a contract, as the pipeline makes them: for arms that change them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from truetune.behaviour.measure import whole
from truetune.contract.contract import PromptContract
from truetune.contract.encode import LossOn
from truetune.contract.example import SFTExample
from truetune.lab.bench import Row
from truetune.lab.world import World


def messages_of(row: Row) -> list[dict[str, str]]:
    """The messages of a row of either kind."""
    if "messages" in row:
        return list(row["messages"])
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def encoded(
    contract: PromptContract, rows: Sequence[Row], loss_on: LossOn = "assistant"
) -> list[SFTExample]:
    """Examples of rows, each proved."""
    found: list[SFTExample] = []
    for row in rows:
        found += contract.encode(messages_of(row), loss_on=loss_on)
    return found


def fresh_prose(contract: PromptContract, tokens: int, width: int, seed: int) -> list[SFTExample]:
    """Text of the corpus's kind that the base has not read, cut into examples.

    Args:
        tokens: of all examples together, at least.
        width: of one.
    """
    from truetune.lab.building.prose import documents

    end = contract.tokenizer.eos_token_id
    made: list[SFTExample] = []
    for document in islice(documents(World.generate(), f"lab/{seed}"), 10_000):
        ids = [end, *contract.tokens.encode([document.text])[0], end]
        made += [whole(ids[at : at + width]) for at in range(0, len(ids), width)]
        made = [e for e in made if len(e.ids) > 1]
        if sum(len(e.ids) for e in made) >= tokens:
            break
    return made
