"""Report and record what happens to the rows: nothing is lost without a count and a reason.

input   rows as they were read, encoded and fitted to the length limit
does    turns what happened to them into findings, and into data.json's counts
output  findings, errors among them; `data_facts`; `digest` of what is trained
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from truetune.checks.lengths import damage, encoded_lengths, limit_keeping
from truetune.compute.length import Fitted, is_text, length_table
from truetune.contract.contract import PromptContract
from truetune.contract.encode import Encoded
from truetune.contract.example import SFTExample
from truetune.contract.remarks import REMARKS
from truetune.data.load import Loaded
from truetune.errors import BadRows, DataError, TruetuneError
from truetune.findings import Finding, counted, merged
from truetune.model.inspect import ModelFacts
from truetune.model.new_tokens import NewToken
from truetune.recipe.settings import Recipe

# Tokens of a row beyond which a longer limit is no advice where the model states no context.
_LONGEST = 262_144
_LORA_ONLY = ("lora_r", "lora_alpha", "lora_dropout", "target_modules", "full_fingerprint")


def unused_tokens(tokens: Sequence[NewToken], examples: Sequence[SFTExample]) -> list[Finding]:
    """New tokens that training will never see, or never ask for."""
    present = {i for example in examples for i in example.ids}
    targets = {i for ids, mask in examples for i, on in zip(ids, mask, strict=True) if on}
    findings = []
    for token in tokens:
        if token.id in targets:
            continue
        known = token.id in present
        findings.append(
            Finding(
                "new-token-untrained",
                "warning",
                f"{token.text!r} occurs only in prompts: the model reads it but never writes it"
                if known
                else f"{token.text!r} does not occur in the training rows",
                why="its output embedding is never a target"
                if known
                else "its embedding stays unchanged",
                fix="remove its --add-token, or use it in the answers",
            )
        )
    return findings


def bad_rows_told(
    found: Sequence[Finding], recipe: Recipe, num_left: int, *, encoded: bool
) -> tuple[list[Finding], list[TruetuneError]]:
    """Findings on rows, and what stops the run: errors do, or become warnings with their count
    under --bad-rows drop.

    Args:
        encoded: whether the template was tried on the rows that are left.

    Raises:
        BadRows: no row is left.
        DataError: there was no row to begin with.
    """
    bad = [finding for finding in found if finding.level == "error"]
    others = [finding for finding in found if finding.level != "error"]
    if not bad and not num_left:
        raise DataError("there are no rows to train on", where=str(recipe.data))
    if not bad:
        return others, []
    number = sum(finding.count for finding in bad)
    error = BadRows(
        f"{number:,} row{'s' if number > 1 else ''} cannot be trained on"
        + ("" if num_left else "; no row is left to train on"),
        merged(bad),
        why=""
        if encoded or not num_left
        else "they are wrong before any template is applied; `truetune check` also lists the rows "
        "that the chat template refuses",
        fix="correct them, or leave them out with --bad-rows drop"
        if num_left
        else "correct them, or set the right --schema, --columns or --chat-template",
    )
    if not num_left:
        raise error
    if recipe.bad_rows == "error":
        return [*bad, *others], [error]
    return others + [
        dataclasses.replace(finding, level="warning", what=f"dropped: {finding.what}")
        for finding in bad
    ], []


def without_effect(recipe: Recipe) -> list[Finding]:
    """Settings that another one would have to make use of."""
    needs = [(name, "--lora") for name in _LORA_ONLY if not recipe.lora]
    needs += [("think_markers", "--reasoning inline")] * (recipe.reasoning != "inline")
    return [
        Finding(
            "setting-without-effect",
            "warning",
            f"{name} has no effect without {other}",
            where=recipe.origin(name),
            fix=f"add {other}, or leave it out",
        )
        for name, other in needs
        if recipe.given(name)
    ]


def remarks(encoded: Sequence[Encoded]) -> list[Finding]:
    counts: Counter[str] = Counter(remark for row in encoded for remark in row.remarks)
    first: dict[str, str] = {}
    for row in encoded:
        for remark in row.remarks:
            first.setdefault(remark, row.row)
    return [
        dataclasses.replace(REMARKS[name], where=first[name], count=count)
        for name, count in counts.items()
    ]


def length_findings(
    fitted: Fitted,
    eval_fitted: Fitted,
    encoded: Sequence[Encoded],
    limit: int,
    facts: ModelFacts,
    contract: PromptContract,
    recipe: Recipe,
) -> list[Finding]:
    """What the length limit costs: an error where rows are too long under --overlong error, or too
    much would be dropped."""
    findings = []
    if facts.context_length and limit > facts.context_length:
        findings.append(
            Finding(
                "length-beyond-context",
                "warning",
                f"--max-length {limit:,} exceeds the model's context of "
                f"{facts.context_length:,} tokens",
                why="the model was never trained on positions beyond its context",
                fix=f"use --max-length {facts.context_length}",
            )
        )
    if fitted.num_truncated:
        findings.append(
            Finding(
                "rows-truncated",
                "note",
                "prompts lost their beginning because of the length limit",
                _first_longer(encoded, limit, text=False),
                fitted.num_truncated,
            )
        )
    if fitted.num_split:
        findings.append(
            Finding(
                "rows-split",
                "note",
                "plain texts were split into blocks; every token is supervised",
                _first_longer(encoded, limit, text=True),
                fitted.num_split,
            )
        )
    if not fitted.dropped and not eval_fitted.dropped:
        return findings
    dropped = [*fitted.dropped, *eval_fitted.dropped]
    where, tokens = dropped[0]
    total = sum(len(row) for row in encoded)
    share = max(len(fitted.dropped) / max(total, 1), fitted.dropped_share)
    # What a higher limit would keep, as far as the model can take it.
    most = facts.context_length or _LONGEST
    higher = [
        f"{size:,} keeps {kept:,} examples and {100 * part:.1f} % of the answers"
        for size, kept, part in length_table(encoded)
        if limit < size <= most
    ]
    rows = encoded_lengths(encoded, contract)
    refused = recipe.overlong == "error" or share > recipe.max_dropped or not fitted.examples
    finding = Finding(
        code="rows-overlong",
        level="error" if refused else "warning",
        what=f"{counted(len(dropped), 'example')} of more than {limit:,} tokens "
        f"{'would be' if refused else 'was' if len(dropped) == 1 else 'were'} dropped: "
        f"{100 * len(fitted.dropped) / max(total, 1):.1f} % of the examples, "
        f"{100 * fitted.dropped_share:.1f} % of the supervised tokens",
        where=f"{where} ({tokens:,} tokens)",
        count=len(dropped),
        why=f"in a trainer that truncates rows, {damage(rows, limit).line()}"
        + (f"; {', '.join(higher[-3:])}" if higher else ""),
        fix="; or ".join(
            [
                _room_for(limit_keeping(rows), limit, facts.context_length),
                *_ways_to_fit(fitted, recipe, share if refused else 0.0),
            ]
        ),
    )
    return [*findings, finding]


def _first_longer(encoded: Sequence[Encoded], limit: int, *, text: bool) -> str:
    rows = (row for row in encoded if is_text(row) == text)
    return next((row.row for row in rows if any(len(e.ids) > limit for e in row)), "")


def _room_for(needed: int, limit: int, context: int | None) -> str:
    """A longer limit as advice, where one would help and the model can take it."""
    # Without a stated context: what no model is trained on in one piece.
    most = context or _LONGEST
    if limit < needed <= most:
        return f"--max-length {needed} keeps 99 % of the rows whole"
    if needed > most and limit < most:
        return f"--max-length {most} is the model's maximum; split longer rows"
    return "split the rows that exceed the model's context"


def _ways_to_fit(fitted: Fitted, recipe: Recipe, lost: float) -> Iterator[str]:
    """What else helps: shorter prompts, where they are what is long, and consent to a loss that
    is refused."""
    if fitted.num_cuttable:
        yield (
            f"cut the beginning of {counted(fitted.num_cuttable, 'prompt')} with --overlong "
            "truncate-prompt"
        )
    if recipe.overlong == "error":
        yield "drop them with --overlong drop"
    elif lost and fitted.examples:
        yield f"accept the loss with --max-dropped {min(math.ceil(100 * lost) / 100, 1.0):g}"


def data_facts(
    loaded: Loaded,
    fitted: Fitted,
    eval_fitted: Fitted,
    found: Sequence[Finding],
    overlap: Sequence[str],
    lengths: dict[str, Any] | None,
) -> dict[str, Any]:
    """What data.json holds: files, counts, every drop with its reason, the length report of rows
    with reasoning."""
    drops = [
        {"where": finding.where, "code": finding.code, "what": finding.what}
        for finding in found
        if finding.level == "error"
    ]
    drops += [
        {"where": where, "code": "rows-overlong", "what": f"{tokens} tokens"}
        for where, tokens in [*fitted.dropped, *eval_fitted.dropped]
    ]
    drops += [
        {
            "where": where,
            "code": "eval-overlaps-train",
            "what": "a held-out row whose prompt also occurs in the training rows",
        }
        for where in overlap
    ]
    return {
        "schema": loaded.schema,
        "files": [dataclasses.asdict(file) for file in loaded.files],
        "rows_read": loaded.num_rows,
        "train": _counts(fitted),
        "held_out": _counts(eval_fitted),
        "dropped": drops,
        **({"lengths": lengths} if lengths else {}),
    }


def _counts(fitted: Fitted) -> dict[str, Any]:
    examples = fitted.examples
    return {
        "examples": len(examples),
        "tokens": sum(len(e.ids) for e in examples),
        "supervised_tokens": sum(e.num_supervised for e in examples),
        "longest": max((len(e.ids) for e in examples), default=0),
        "truncated_prompts": fitted.num_truncated,
        "split_texts": fitted.num_split,
        "sha256": digest(examples),
    }


def digest(examples: Sequence[SFTExample]) -> str:
    """sha256 over ids and masks, in order: equal exactly where the same thing is trained."""
    hashed = hashlib.sha256()
    for ids, mask in examples:
        hashed.update(repr((ids, mask)).encode())
    return hashed.hexdigest()
