"""Tokens of the rows whose own rows in embedding and head were never trained, and stay so.

input   the examples, and the weights where they lie on this machine
does    judges the rows of the special tokens that occur, by norm and nearest neighbour
output  a finding; nothing where there are no weights to read
who     the preflight of a LoRA run
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from truetune.checks.start import judge_rows
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.contract.tokens import Tokens
from truetune.errors import TruetuneError
from truetune.findings import Finding
from truetune.model.source import locate
from truetune.model.tables import read_tables
from truetune.model.tokenizer import locate_base, num_ids

# Rows that are looked at: what a template writes is in each of them.
_LOOKED_AT = 200


def untrained_rows(
    contract: PromptContract,
    examples: Sequence[SFTExample],
    model: str,
    revision: str | None,
    trained: Collection[int],
) -> list[Finding]:
    """Chat tokens whose rows nobody trained, under a method that does not train them either.

    Args:
        model: that an adapter is trained on.
        trained: ids whose rows this run trains.
    """
    tokens = Tokens(contract.tokenizer)
    used = {i for example in examples[:_LOOKED_AT] for i in example.ids}
    ids = sorted((used & tokens.special_ids) - {contract.tokenizer.bos_token_id} - set(trained))
    if not ids:
        return []
    try:
        files = locate(model, revision, weights=False)
        base = locate_base(files, weights=False) if files.is_adapter else files
        tables = read_tables(base, ids)
    except TruetuneError:
        return []  # no weights here: nothing can be told
    judged = [judge_rows(t, ids, num_ids(contract.tokenizer)) for t in tables.values()]
    lost = sorted({i for rows in judged for i in rows.untrained})
    if not lost:
        return []
    named = ", ".join(f"{contract.tokens.decode([i])!r} ({i})" for i in lost[:4])
    why = next(rows.why[lost[0]] for rows in judged if lost[0] in rows.why)
    return [
        Finding(
            "rows-untrained",
            "error",
            f"the rows carry {named}, whose rows in the model were never trained, and LoRA leaves "
            "them as they are",
            model,
            len(lost),
            why=f"{why}: the model cannot tell them from unused tokens, and would not learn to "
            "end an answer",
            fix="train their rows with --add-token, train all weights, or use a template of "
            "trained tokens (--chat-template instruction-response)",
        )
    ]
