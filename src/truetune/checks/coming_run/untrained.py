"""Find tokens whose embeddings were never trained and would stay untrained.

input   the examples, and the weights if they are on this machine
does    judges the embeddings of the special tokens that occur, by norm and nearest neighbour
output  a finding; nothing if there are no weights to read
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from truetune.checks.registry import check
from truetune.errors import TruetuneError
from truetune.findings import Finding
from truetune.model.embeddings import judge_rows, read_tables
from truetune.model.source import locate
from truetune.model.tokenizer import locate_base, num_ids

if TYPE_CHECKING:
    from truetune.checks.preflight import Preflight

# Rows that are looked at: what a template writes is in each of them.
_LOOKED_AT = 200


@check(lambda facts: facts.lora and facts.model is not None)
def untrained_rows(facts: Preflight) -> Iterator[Finding]:
    """Examples use no chat token whose embedding is untrained and stays so in this run."""
    contract = facts.contract
    used = {i for example in facts.examples[:_LOOKED_AT] for i in example.ids}
    known = {contract.tokenizer.bos_token_id, *facts.trained_tokens}
    ids = sorted((used & contract.tokens.special_ids) - known)
    if not ids:
        return
    try:
        files = locate(str(facts.model), facts.revision, weights=False)
        base = locate_base(files, weights=False) if files.is_adapter else files
        tables = read_tables(base, ids)
    except TruetuneError:
        return  # no weights here: nothing can be judged
    found = [judge_rows(t, ids, num_ids(contract.tokenizer)) for t in tables.values()]
    why = {i: why for rows in found if not rows.random for i, why in rows.why.items()}
    if not why:
        return
    lost = sorted(why)
    named = contract.tokens.named(lost, 4)
    yield Finding(
        "rows-untrained",
        "error",
        f"examples use {named}, whose embeddings were never trained, and LoRA does not train them",
        str(facts.model),
        len(lost),
        why=f"{why[lost[0]]}: the model cannot distinguish them from unused tokens, and would not "
        "learn to end an answer",
        fix="train their embeddings with --add-token, train all weights, or use a template whose "
        "tokens were trained (--chat-template instruction-response)",
    )
