"""Rows to proved examples: everything that happens before weights are read.

input   Recipe
does    model facts -> rows -> held-out split -> contract fitted to the rows -> examples, each
        proved -> length policy -> plan -> preflight
output  Prepared, or one error that lists all that is wrong
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from truetune.checks.conversations.rows import OPEN_ENDED, OPEN_FIX, open_reasoning
from truetune.checks.lengths import encoded_lengths, length_report
from truetune.checks.preflight import Preflight, preflight
from truetune.compute.length import Fitted, fit_length, is_text, longest
from truetune.contract.contract import PromptContract, Refused
from truetune.contract.encode import Encoded
from truetune.contract.example import SFTExample
from truetune.contract.policy import Policy
from truetune.contract.specials import find_controls
from truetune.contract.view import pictures
from truetune.data.conversation import Conversation
from truetune.data.load import Loaded, load
from truetune.data.split import HELD_OUT_FROM, hold_out, remove_overlap
from truetune.errors import CheckFailed, TruetuneError, UsageError
from truetune.findings import Finding, folded, merged, worst
from truetune.listener import Listener
from truetune.model.inspect import ModelFacts, look_at
from truetune.model.new_tokens import NewToken, add_tokens, require_room
from truetune.model.start import by_template
from truetune.model.tokenizer import num_ids
from truetune.recipe.plan import Plan, make_plan, plan_length, suggested_rate
from truetune.recipe.settings import Recipe
from truetune.run.account import (
    bad_rows_told,
    data_facts,
    length_findings,
    remarks,
    unused_tokens,
    without_effect,
)
from truetune.verification.rows import MOST_ROWS, VerifyRow


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs except the weights.

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
    """The complete survey of a planned run, whatever is wrong with it.

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
    found = survey(recipe, listener, at_once=True)
    if found.stopping:
        raise found.stopping[0]
    for finding in found.prepared.findings:
        listener.finding(finding)
    return found.prepared


@dataclass(frozen=True)
class _Read:
    """Rows as the files have them: to train, held out, and the places of held-out rows that were
    left out because they are trained."""

    train: list[Conversation]
    held_out: list[Conversation]
    loaded: Loaded
    findings: list[Finding]
    overlap: list[str]


@dataclass(frozen=True)
class _Encoded:
    """The rows that can be trained, as they were read and encoded, and one error for each other."""

    conversations: list[Conversation]
    rows: list[Encoded]
    refused: list[Finding]


@dataclass(frozen=True)
class _Planned:
    """The numbers of the run, and what the length policy leaves of the rows."""

    plan: Plan
    fitted: Fitted
    eval_fitted: Fitted
    is_text: bool
    findings: list[Finding]


def survey(recipe: Recipe, listener: Listener, *, at_once: bool = False) -> Survey:
    """Everything that can be known of a run without weights; errors are collected.

    Args:
        at_once: rows that are broken as they were read are refused before the model is opened.

    Raises:
        UsageError, InputError: options, data or model that cannot be used at all.
        BadRows: not one row can be trained.
    """
    # Rows need no torch: what is wrong with them is found before it is imported.
    read = _read(recipe, listener)
    if at_once and any(finding.level == "error" for finding in read.loaded.findings):
        _, broken = bad_rows_told(
            read.loaded.findings, recipe, len(read.train) + len(read.held_out), encoded=False
        )
        if broken:
            raise broken[0]
    if at_once and recipe.patience and not read.held_out:
        raise _nothing_to_wait_for(recipe.patience)
    listener.stage("opening the model's files")
    facts, tokenizer = look_at(str(recipe.model), recipe.revision)
    _require_rank(recipe, facts)
    new_tokens, token_findings = _new_tokens(recipe, tokenizer, facts)
    contract = contract_of(tokenizer, recipe)
    recipe = _dated(recipe, contract)

    listener.stage("encoding and checking the rows")
    contract = contract.fit(read.train, loss_on=recipe.loss_on)
    train = _encode(contract, read.train, recipe, listener)
    held_out = _encode(contract, read.held_out, recipe, listener)
    refusals = [*read.loaded.findings, *train.refused, *held_out.refused]
    # A template that refuses a row refuses others for the same reason, with different names.
    told_once = folded([*train.refused, *held_out.refused])
    found = [*read.loaded.findings, *told_once]
    bad_rows, stopping = bad_rows_told(found, recipe, len(train.rows), encoded=True)

    planned = _plan(recipe, facts, contract, read, train, held_out)
    plan, fitted = planned.plan, planned.fitted
    if plan.patience and not planned.eval_fitted.examples:
        stopping.append(_nothing_to_wait_for(plan.patience))
    if worst(planned.findings) == "error":
        stopping.append(CheckFailed("too many rows are longer than the limit", planned.findings))
    checked: list[Finding] = []
    if not recipe.no_check:
        listener.stage("checking the run")
        checked = _check(contract, facts, planned, train, held_out, new_tokens, listener)
        if worst(checked) == "error":
            errors = [finding for finding in checked if finding.level == "error"]
            stopping.append(CheckFailed("the check found errors; nothing was trained", errors))
        checked += unused_tokens(new_tokens, fitted.examples)
    findings = [
        *read.findings,
        *token_findings,
        *without_effect(recipe),
        *bad_rows,
        *contract.findings,
        *remarks([*train.rows, *held_out.rows]),
        *planned.findings,
        *checked,
    ]
    rows = encoded_lengths(train.rows, contract)
    lengths = length_report(rows, plan.max_length, facts.context_length) if len(rows) else None
    prepared = Prepared(
        contract,
        facts,
        fitted.examples,
        fitted.rows,
        planned.eval_fitted.examples,
        _answerable(held_out.conversations, planned.eval_fitted),
        plan,
        merged(findings),
        {
            **data_facts(read.loaded, fitted, planned.eval_fitted, refusals, read.overlap, lengths),
            "pictures": pictures(contract, train.rows, plan.max_length),
        },
        new_tokens,
        _verify_rows(held_out, plan, held_out=True) or _verify_rows(train, plan, held_out=False),
        planned.is_text,
    )
    return Survey(prepared, train.rows, read.train, stopping)


# Far above the ranks of any recipe.
_USUAL_RANKS = 1024


def _require_rank(recipe: Recipe, facts: ModelFacts) -> None:
    """Refuse a rank that no matrix can have, before it fills the memory."""
    rank, width = recipe.lora_r, facts.hidden_size
    # A usual rank on a tiny model, for a test of the pipeline, does no harm.
    if recipe.lora and rank > max(width, _USUAL_RANKS):
        raise UsageError(
            f"--lora-r {rank:,} is more than the width of the model, {width:,}",
            where=recipe.origin("lora_r"),
            why="the rank of an update is never more than the smaller side of the weight matrix",
            fix=f"use --lora-r 16 (at most {width}), or train all weights without --lora",
            code="lora-rank-too-large",
        )


def _nothing_to_wait_for(patience: int) -> UsageError:
    return UsageError(
        f"--patience {patience} needs a held-out loss, but no rows are held out",
        why="no rows are held out automatically if there are fewer than 100, or if too many of "
        "them share a prompt",
        fix="pass held-out rows with --eval-data",
        code="patience-without-rows",
    )


def _dated(recipe: Recipe, contract: PromptContract) -> Recipe:
    """With the day that a template writes: a resumed run goes on with the one on which it was
    started."""
    if not contract.date or recipe.date:
        return recipe
    origins = {**recipe.origins, "date": "the day of the start"}
    return dataclasses.replace(recipe, date=contract.date, origins=origins)


def _plan(
    recipe: Recipe,
    facts: ModelFacts,
    contract: PromptContract,
    read: _Read,
    train: _Encoded,
    held_out: _Encoded,
) -> _Planned:
    """Length policy, then the numbers of the run."""
    start = by_template(contract.tokenizer)
    text = all(is_text(row) for row in train.rows)
    limit = plan_length(
        recipe,
        longest=longest([*train.rows, *held_out.rows]),
        context=facts.context_length,
        is_text=text,
    )
    fitted = fit_length(train.rows, max_length=limit[0], overlong=recipe.overlong)
    eval_fitted = fit_length(held_out.rows, max_length=limit[0], overlong=recipe.overlong)
    lost = length_findings(fitted, eval_fitted, train.rows, limit[0], facts, contract, recipe)
    plan = make_plan(
        recipe,
        model=facts,
        start="instruct" if start.kind == "instruct" else "base",
        start_reason=start.reasons[0],
        max_length=limit,
        lengths=[len(example.ids) for example in fitted.examples] or [1],
        reasoning_share=_reasoning_share(read.train),
    )
    return _Planned(plan, fitted, eval_fitted, text, lost)


def _check(
    contract: PromptContract,
    facts: ModelFacts,
    planned: _Planned,
    train: _Encoded,
    held_out: _Encoded,
    new_tokens: Sequence[NewToken],
    listener: Listener,
) -> list[Finding]:
    """What every family of checks says of the run."""
    plan, fitted = planned.plan, planned.fitted
    return preflight(
        Preflight(
            contract=contract,
            examples=fitted.examples,
            rows=fitted.rows,
            is_text=planned.is_text,
            loss_on=plan.loss_on,
            head_rows=max(facts.head_rows, num_ids(contract.tokenizer))
            if plan.add_token
            else facts.head_rows,
            base_stop_ids=facts.served_eos_ids,
            lora=plan.lora,
            learning_rate=plan.learning_rate,
            suggested_rate=suggested_rate(plan, facts),
            max_steps=plan.max_steps,
            warmup_steps=plan.warmup_steps,
            train=train.conversations,
            held_out=held_out.conversations,
            model=str(plan.model),
            revision=plan.revision,
            trained_tokens=[token.id for token in new_tokens],
        ),
        listener.progress,
    )


def _verify_rows(encoded: _Encoded, plan: Plan, *, held_out: bool) -> list[VerifyRow]:
    """The first rows that fit as they are: what verification can do again from the row alone."""
    fitting = (
        (conversation, row)
        for conversation, row in zip(encoded.conversations, encoded.rows, strict=True)
        if all(len(e.ids) <= plan.max_length for e in row)
    )
    return [
        VerifyRow(conversation, held_out, tuple((list(e.ids), list(e.mask)) for e in row))
        for conversation, row in itertools.islice(fitting, MOST_ROWS)
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
            why="its embeddings belong to the tokenizer that it was trained with",
            fix="merge it first: truetune export "
            f"{shlex.quote(str(recipe.model))} --merge -o MERGED",
            code="add-token-adapter",
        )
    tokens, findings = add_tokens(tokenizer, recipe.add_token)
    require_room(facts.head_rows, tokenizer, tokens)
    return tokens, findings


def _answerable(held_out: Sequence[Conversation], fitted: Fitted) -> list[Conversation]:
    """The held-out conversations that are measured: those refused or too long have no prompt to
    answer either."""
    kept = set(fitted.rows) - {where for where, _ in fitted.dropped}
    return [conversation for conversation in held_out if conversation.where in kept]


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
            recipe.template_words,
        ),
        date=recipe.date,
    )


def _read(recipe: Recipe, listener: Listener) -> _Read:
    listener.stage("reading the rows")
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
        none = len(train) >= HELD_OUT_FROM and not held_out
        return _Read(train, held_out, loaded, [_none_held_out(train)] if none else [], [])
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
        places=(*loaded.places, *own.places),
    )
    kept = {id(conversation) for conversation in held_out}
    overlap = [c.where for c in own.conversations if id(c) not in kept]
    return _Read(loaded.conversations, held_out, both, findings, overlap)


def _none_held_out(train: Sequence[Conversation]) -> Finding:
    prompts = len({conversation.key() for conversation in train})
    return Finding(
        code="none-held-out",
        level="note",
        what=f"no rows are held out: {len(train):,} rows have {prompts:,} different prompts",
        where=train[0].where,
        count=len(train),
        why="rows that share a prompt, or are parts of one conversation, stay together, and each "
        "such group is larger than what may be held out (5 % of the rows, at most 200)",
        fix="pass held-out rows with --eval-data",
    )


def _encode(
    contract: PromptContract,
    conversations: Sequence[Conversation],
    recipe: Recipe,
    listener: Listener,
) -> _Encoded:
    """Each row's examples, or why it has none: no faithful completion, or a control token where the
    recipe refuses those."""
    total = len(conversations)
    results = contract.encode_all(
        conversations,
        loss_on=recipe.loss_on,
        on_progress=lambda done: listener.progress(done, total),
    )
    refused: list[Finding] = []
    controls: dict[int, Finding] = {}
    if recipe.content_specials == "error":
        controls = find_controls(contract, conversations, refuse=True)
    taken, encoded = [], []
    for position, (conversation, result) in enumerate(zip(conversations, results, strict=True)):
        if isinstance(result, Refused):
            refused.append(_cause(conversation) or result.error.finding)
        elif position in controls:
            refused.append(controls[position])
        else:
            taken.append(conversation)
            encoded.append(result)
    return _Encoded(taken, encoded, refused)


def _cause(conversation: Conversation) -> Finding | None:
    """What is wrong with the row itself, where a template's complaint would hide it."""
    marker = open_reasoning(conversation)
    if not marker:
        return None
    return Finding(
        code="reasoning-unclosed",
        level="error",
        what=f"an answer opens its reasoning with {marker!r} and never closes it",
        where=conversation.where,
        why=f"a limit cut it before the answer, or the closing marker was lost: {OPEN_ENDED}",
        fix=OPEN_FIX,
    )


def _reasoning_share(conversations: Sequence[Conversation]) -> float:
    with_reasoning = sum(
        any(message.get("reasoning_content") for message in c.messages) for c in conversations
    )
    return with_reasoning / max(len(conversations), 1)
