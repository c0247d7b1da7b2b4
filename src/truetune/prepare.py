"""Rows to proved examples: everything that happens before weights are read.

input   Recipe
does    model facts -> rows -> held-out split -> contract fitted to the rows -> examples, each
        proved -> length policy -> plan -> preflight
output  Prepared, or one error that lists all that is wrong
who     pipeline.train
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from truetune.check import Preflight, damage, encoded_lengths, limit_keeping, preflight
from truetune.compute.length import Fitted, fit_length, is_text, length_table, longest
from truetune.contract import (
    Encoded,
    Policy,
    PromptContract,
    Refused,
    SFTExample,
    find_controls,
)
from truetune.data import Conversation, Loaded, hold_out, load, remove_overlap
from truetune.errors import BadRows, CheckFailed, DataError, RecipeError, TruetuneError, UsageError
from truetune.findings import Finding, merged, worst
from truetune.listener import Listener
from truetune.model import (
    ModelFacts,
    NewToken,
    add_tokens,
    describe,
    load_tokenizer,
    num_ids,
    require_room,
    require_weights,
)
from truetune.plan import Plan, make_plan, plan_length, starting_point, suggested_rate
from truetune.recipe import Recipe
from truetune.verify import MOST_ROWS, VerifyRow

# What an encoded row may remark, as a note: (what, why).
_REMARKS = {
    "stripped": (
        "the template strips outer whitespace of answers",
        "the model is trained on the answer as the template writes it",
    ),
    "normalised": (
        "the tokenizer's own normaliser changes characters of answers",
        "the model cannot write what its tokenizer has no form for",
    ),
    "framed": (
        "the template writes markers of its own around answers; the model learns to write them",
        "a format may name a channel or a recipient before it answers",
    ),
    "stop-appended": (
        "the template closes answers with nothing; the model's own end token closes them",
        "without an end a served answer would go on",
    ),
    "reasoning-empty": (
        "the think block that the prompt opens is closed at once, as --reasoning empty asks",
        "the model learns not to think",
    ),
    "thinking-unlearned": (
        "answers without reasoning are trained where the template would have the model think",
        "thinking will be unlearned there",
    ),
    "prompt-realigned": (
        "the template renders earlier turns of a finished conversation unlike it serves them; the "
        "served prompt is trained",
        "a server sends the prompt",
    ),
    "seam": (
        "prompt and answer would have merged into one token; they are kept apart",
        "a server sends the prompt alone, so the answer starts a token of its own",
    ),
}

_LORA_ONLY = ("lora_r", "lora_alpha", "lora_dropout", "target_modules", "full_fingerprint")


@dataclass(frozen=True)
class Prepared:
    """All that a run needs beside the weights.

    Attributes:
        contract: with the template arguments that fit the rows.
        model: facts of the model, from its small files.
        examples, rows: what is trained, and where each example came from.
        eval_examples: held-out examples; may be empty.
        eval_conversations: the rows behind them, for samples.
        plan: the numbers of the run.
        findings: everything found on the way, no error among them.
        data: what data.json holds.
        new_tokens: whose rows are trained; the contract's tokenizer has them already.
        verify_rows: rows that the saved model will be verified on.
        is_text: plain text, no conversation.
    """

    contract: PromptContract
    model: ModelFacts
    examples: list[SFTExample]
    rows: list[str]
    eval_examples: list[SFTExample]
    eval_conversations: list[Conversation]
    plan: Plan
    findings: list[Finding]
    data: dict[str, Any]
    new_tokens: list[NewToken]
    verify_rows: list[VerifyRow]
    is_text: bool


@dataclass(frozen=True)
class Survey:
    """A coming run looked at whole, whatever is wrong with it.

    Attributes:
        prepared: what would be trained; its findings hold errors too.
        encoded: the rows before the length policy.
        train: their conversations.
        stopping: what keeps the run from being trained, in the order it was found.
    """

    prepared: Prepared
    encoded: list[Encoded]
    train: list[Conversation]
    stopping: list[TruetuneError]


def prepare(recipe: Recipe, listener: Listener) -> Prepared:
    """Do everything that can be done without weights.

    Raises:
        UsageError, InputError: options, data or model that cannot be used at all.
        BadRows: rows that cannot be trained, all of them, unless --bad-rows drop.
        CheckFailed: the preflight found an error, or too much would be lost to the length limit.
    """
    found = survey(recipe, listener, with_weights=True)
    if found.stopping:
        raise found.stopping[0]
    for finding in found.prepared.findings:
        listener.finding(finding)
    return found.prepared


def survey(recipe: Recipe, listener: Listener, *, with_weights: bool = False) -> Survey:
    """Everything that can be known of a run without weights; errors are collected.

    Args:
        with_weights: refuse a model without weights at once, as training would.

    Raises:
        UsageError, InputError: options, data or model that cannot be used at all.
        BadRows: not one row can be trained.
    """
    require_settings(recipe)
    assert recipe.model
    listener.stage("model files")
    facts = describe(recipe.model, recipe.revision)
    if with_weights:
        require_weights(recipe.model, recipe.revision)
    tokenizer = load_tokenizer(recipe.model, recipe.revision)
    new_tokens, token_findings = _new_tokens(recipe, tokenizer, facts)
    contract = contract_of(tokenizer, recipe)
    if contract.date and not recipe.date:
        # A resumed run goes on with the day on which it was started.
        origins = {**recipe.origins, "date": "the day of the start"}
        recipe = dataclasses.replace(recipe, date=contract.date, origins=origins)
    start, start_reason = starting_point(tokenizer, facts.has_chat_template)

    train, held_out, loaded, findings, overlap = _rows(recipe, listener)
    listener.stage("template and proof")
    contract = contract.fit(train, loss_on=recipe.loss_on)
    encoded, refused = _encode(contract, train, recipe, listener)
    eval_encoded, eval_refused = _encode(contract, held_out, recipe, listener)
    if recipe.content_specials == "error":
        controls = find_controls(contract, [*train, *held_out], refuse=True)
        already = {finding.where.partition(",")[0] for finding in [*refused, *eval_refused]}
        refused += [c for c in controls if c.where.partition(",")[0] not in already]
        held = {finding.where.partition(",")[0] for finding in controls}
        encoded = [row for row in encoded if row.row not in held]
        eval_encoded = [row for row in eval_encoded if row.row not in held]
    refusals = [*loaded.findings, *refused, *eval_refused]
    findings += [*token_findings, *_without_effect(recipe)]
    bad_rows, stopping = _bad_rows(refusals, recipe, len(encoded))
    findings += [*bad_rows, *contract.findings, *_remarks([*encoded, *eval_encoded])]

    text = all(is_text(row) for row in encoded)
    limit = plan_length(
        recipe,
        longest=longest([*encoded, *eval_encoded]),
        context=facts.context_length,
        is_text=text,
    )
    fitted = fit_length(encoded, max_length=limit[0], overlong=recipe.overlong)
    eval_fitted = fit_length(eval_encoded, max_length=limit[0], overlong=recipe.overlong)
    lost = _length_findings(fitted, eval_fitted, encoded, limit[0], facts, contract, recipe)
    findings += lost
    if worst(lost) == "error":
        stopping.append(CheckFailed("too many rows are longer than the limit", lost))
    plan = make_plan(
        recipe,
        model=facts,
        start=start,
        start_reason=start_reason,
        max_length=limit,
        lengths=[len(example.ids) for example in fitted.examples] or [1],
        reasoning_share=_reasoning_share(train),
    )
    if not recipe.no_check:
        listener.stage("check")
        told = preflight(
            _preflight(
                contract,
                fitted,
                plan,
                facts,
                text,
                _taken(train, encoded),
                _taken(held_out, eval_encoded),
            ),
            listener.progress,
        )
        findings += [*told, *_unused_tokens(new_tokens, fitted.examples)]
        if worst(told) == "error":
            errors = [finding for finding in told if finding.level == "error"]
            stopping.append(CheckFailed("the check found errors; nothing was trained", errors))
    prepared = Prepared(
        contract,
        facts,
        fitted.examples,
        fitted.rows,
        eval_fitted.examples,
        _answerable(held_out, eval_fitted),
        plan,
        merged(findings),
        _data_facts(loaded, fitted, eval_fitted, refusals, overlap),
        new_tokens,
        _verify_rows(held_out, eval_encoded, plan, held_out=True)
        or _verify_rows(train, encoded, plan, held_out=False),
        text,
    )
    return Survey(prepared, encoded, train, stopping)


def _taken(conversations: Sequence[Conversation], encoded: Sequence[Encoded]) -> list[Conversation]:
    """Without those refused: what is wrong with them is told already."""
    kept = {row.row for row in encoded}
    return [conversation for conversation in conversations if conversation.where in kept]


def _verify_rows(
    conversations: Sequence[Conversation],
    encoded: Sequence[Encoded],
    plan: Plan,
    *,
    held_out: bool,
) -> list[VerifyRow]:
    """The first rows that fit as they are: what verification can do again from the row alone."""
    by_place = {conversation.where: conversation for conversation in conversations}
    fitting = (
        row
        for row in encoded
        if row.row in by_place and all(len(e.ids) <= plan.max_length for e in row)
    )
    return [
        VerifyRow(by_place[row.row], held_out, tuple((list(e.ids), list(e.mask)) for e in row))
        for row in itertools.islice(fitting, MOST_ROWS)
    ]


def _new_tokens(
    recipe: Recipe, tokenizer: Any, facts: ModelFacts
) -> tuple[list[NewToken], list[Finding]]:
    """Extend the tokenizer, where that was asked for.

    Raises:
        UsageError: a text that cannot be a token, or an adapter to start from.
    """
    if not recipe.add_token:
        return [], []
    if facts.base is not None:
        raise UsageError(
            "tokens cannot be added to an adapter",
            where=str(recipe.model),
            why="its rows are bound to the tokenizer it was trained with",
            fix=f"merge it first: truetune export {recipe.model} --merge -o MERGED",
            code="add-token-adapter",
        )
    tokens, findings = add_tokens(tokenizer, recipe.add_token)
    require_room(facts.head_rows, tokenizer, tokens)
    return tokens, findings


def _unused_tokens(tokens: Sequence[NewToken], examples: Sequence[SFTExample]) -> list[Finding]:
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
                f"{token.text!r} is in prompts only: the model reads it and never writes it"
                if known
                else f"{token.text!r} is in no training row",
                why="its row in the head is never a target" if known else "its row stays as it is",
                fix="leave --add-token out for it, or write it into the answers",
            )
        )
    return findings


def _answerable(held_out: Sequence[Conversation], fitted: Fitted) -> list[Conversation]:
    """The held-out conversations that are measured: those refused or too long have no prompt to
    answer either."""
    kept = set(fitted.rows) - {where for where, _ in fitted.dropped}
    return [conversation for conversation in held_out if conversation.where in kept]


def require_settings(recipe: Recipe, *others: str) -> None:
    """Raise where something that has no default was not given.

    Raises:
        RecipeError: naming all that is missing.
    """
    missing = [name for name in ("model", "data", *others) if not getattr(recipe, name)]
    if missing:
        raise RecipeError(
            f"not given: {', '.join(missing)}",
            fix="truetune train MODEL DATA -o RUN, or set it in a recipe",
        )


def contract_of(tokenizer: Any, recipe: Recipe) -> PromptContract:
    """The contract that a recipe asks for, not yet fitted to rows."""
    return PromptContract.load(
        tokenizer,
        recipe.chat_template,
        None if recipe.stop is None else list(recipe.stop),
        recipe.template_arg,
        policy=Policy(
            recipe.reasoning,
            (recipe.think_markers[0], recipe.think_markers[1]) if recipe.think_markers else None,
            recipe.history,
            "merge" if recipe.merge_system else "keep",
        ),
        date=recipe.date,
    )


def _rows(
    recipe: Recipe, listener: Listener
) -> tuple[list[Conversation], list[Conversation], Loaded, list[Finding], list[str]]:
    """Training rows, held-out rows, what was read, what to tell, and the places of held-out rows
    that were left out because they are trained."""
    listener.stage("rows")
    assert recipe.data
    loaded = load(
        recipe.data,
        schema=recipe.schema,
        columns=recipe.columns,
        split=recipe.split,
        limit=recipe.max_train_samples,
        on_progress=listener.progress,
    )
    if not recipe.eval_data and not recipe.eval_split:
        train, held_out = hold_out(loaded.conversations, seed=recipe.seed)
        return train, held_out, loaded, [], []
    own = load(
        recipe.eval_data or recipe.data,
        schema=recipe.schema,
        columns=recipe.columns,
        split=recipe.eval_split,
        on_progress=listener.progress,
    )
    held_out, findings = remove_overlap(loaded.conversations, own.conversations)
    both = dataclasses.replace(
        loaded,
        findings=[*loaded.findings, *own.findings],
        files=(*loaded.files, *own.files),
        num_rows=loaded.num_rows + own.num_rows,
    )
    kept = {id(conversation) for conversation in held_out}
    overlap = [c.where for c in own.conversations if id(c) not in kept]
    return loaded.conversations, held_out, both, findings, overlap


def _encode(
    contract: PromptContract,
    conversations: Sequence[Conversation],
    recipe: Recipe,
    listener: Listener,
) -> tuple[list[Encoded], list[Finding]]:
    """Proved rows, and one error per row that has no faithful completion."""
    total = len(conversations)
    results = contract.encode_all(
        conversations,
        loss_on=recipe.loss_on,
        on_progress=lambda done: listener.progress(done, total),
    )
    encoded = [result for result in results if isinstance(result, Encoded)]
    refused = [_refusal(result) for result in results if isinstance(result, Refused)]
    return encoded, refused


def _refusal(refused: Refused) -> Finding:
    error = refused.error
    return Finding(error.code, "error", error.what, error.where, 1, error.why, error.fix)


def _bad_rows(
    found: Sequence[Finding], recipe: Recipe, num_left: int
) -> tuple[list[Finding], list[TruetuneError]]:
    """Findings on rows, and what stops the run: errors do, or become warnings with their count
    under --bad-rows drop.

    Raises:
        BadRows: no row is left.
        DataError: there was no row to begin with.
    """
    bad = [finding for finding in found if finding.level == "error"]
    others = [finding for finding in found if finding.level != "error"]
    if not bad and not num_left:
        raise DataError("there is no row to train", where=str(recipe.data))
    if not bad:
        return others, []
    error = BadRows(
        f"{len(bad):,} row{'s' if len(bad) > 1 else ''} cannot be trained"
        + ("" if num_left else "; no row is left to train"),
        merged(bad),
        fix="mend them, or leave them out with --bad-rows drop"
        if num_left
        else "mend them, or name the right --schema, --columns or --chat-template",
    )
    if not num_left:
        raise error
    if recipe.bad_rows == "error":
        return [*bad, *others], [error]
    return others + [
        dataclasses.replace(finding, level="warning", what=f"dropped: {finding.what}")
        for finding in bad
    ], []


def _without_effect(recipe: Recipe) -> list[Finding]:
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


def _remarks(encoded: Sequence[Encoded]) -> list[Finding]:
    counts: Counter[str] = Counter(remark for row in encoded for remark in row.remarks)
    first: dict[str, str] = {}
    for row in encoded:
        for remark in row.remarks:
            first.setdefault(remark, row.row)
    return [
        Finding(f"answer-{name}", "note", _REMARKS[name][0], first[name], count, _REMARKS[name][1])
        for name, count in counts.items()
    ]


def _length_findings(
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
                f"--max-length {limit:,} is beyond the model's context of "
                f"{facts.context_length:,} tokens",
                why="positions that the model never saw",
                fix=f"--max-length {facts.context_length}",
            )
        )
    counts = ((fitted.num_truncated, "truncated"), (fitted.num_split, "split"))
    for count, how in counts:
        if count:
            what = {
                "truncated": "prompts lost their beginning to the length limit",
                "split": "plain texts were split into blocks; every token is trained",
            }[how]
            findings.append(Finding(f"rows-{how}", "note", what, str(recipe.data), count))
    if not fitted.dropped and not eval_fitted.dropped:
        return findings
    dropped = [*fitted.dropped, *eval_fitted.dropped]
    where, tokens = dropped[0]
    total = sum(len(row) for row in encoded)
    share = max(len(fitted.dropped) / max(total, 1), fitted.dropped_share)
    table = ", ".join(
        f"{size:,} keeps {kept:,} examples and {100 * part:.1f} % of the answers"
        for size, kept, part in length_table(encoded)[-3:]
    )
    rows = encoded_lengths(encoded, contract)
    refused = recipe.overlong == "error" or share > recipe.max_dropped or not fitted.examples
    finding = Finding(
        code="rows-overlong",
        level="error" if refused else "warning",
        what=f"{len(dropped):,} examples are longer than {limit:,} tokens and "
        f"{'would be' if refused else 'are'} dropped: "
        f"{100 * len(fitted.dropped) / max(total, 1):.1f} % of the examples, "
        f"{100 * fitted.dropped_share:.1f} % of the supervised tokens",
        where=f"{where} ({tokens:,} tokens)",
        count=len(dropped),
        why=f"in a trainer that cuts rows, {damage(rows, limit).line()}; {table}",
        fix=f"--max-length {limit_keeping(rows)} keeps 99 % of the rows whole; or cut prompts with "
        "--overlong truncate-prompt, or accept the loss with --max-dropped",
    )
    return [*findings, finding]


def _preflight(
    contract: PromptContract,
    fitted: Fitted,
    plan: Plan,
    facts: ModelFacts,
    text: bool,
    train: Sequence[Conversation],
    held_out: Sequence[Conversation],
) -> Preflight:
    return Preflight(
        contract=contract,
        examples=fitted.examples,
        rows=fitted.rows,
        is_text=text,
        loss_on=plan.recipe.loss_on,
        head_rows=max(facts.head_rows, num_ids(contract.tokenizer))
        if plan.recipe.add_token
        else facts.head_rows,
        base_stop_ids=facts.generation_eos_ids or facts.config_eos_ids,
        lora=plan.recipe.lora,
        learning_rate=plan.learning_rate,
        suggested_rate=suggested_rate(plan, facts),
        max_steps=plan.max_steps,
        warmup_steps=plan.warmup_steps,
        train=train,
        held_out=held_out,
    )


def _reasoning_share(conversations: Sequence[Conversation]) -> float:
    with_reasoning = sum(
        any(message.get("reasoning_content") for message in c.messages) for c in conversations
    )
    return with_reasoning / max(len(conversations), 1)


def _data_facts(
    loaded: Loaded,
    fitted: Fitted,
    eval_fitted: Fitted,
    found: Sequence[Finding],
    overlap: Sequence[str],
) -> dict[str, Any]:
    """What data.json holds: files, counts, every drop with its reason."""
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
            "what": "a held-out row whose prompt is trained",
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
