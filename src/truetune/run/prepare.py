"""Rows to proved examples: everything that happens before weights are read.

input   Recipe
does    model facts -> rows -> held-out split -> contract fitted to the rows -> examples, each
        proved -> length policy -> plan -> preflight
output  Prepared, or one error that lists all that is wrong
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from truetune.checks.lengths import encoded_lengths, length_report
from truetune.checks.preflight import Preflight, preflight
from truetune.compute.length import Fitted, fit_length, is_text, longest
from truetune.contract.contract import PromptContract, Refused
from truetune.contract.encode import Encoded
from truetune.contract.example import SFTExample
from truetune.contract.policy import Policy
from truetune.contract.specials import find_controls
from truetune.data.conversation import Conversation
from truetune.data.load import Loaded, load
from truetune.data.split import hold_out, remove_overlap
from truetune.errors import CheckFailed, TruetuneError, UsageError
from truetune.findings import Finding, merged, worst
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
    found = survey(recipe, listener)
    if found.stopping:
        raise found.stopping[0]
    for finding in found.prepared.findings:
        listener.finding(finding)
    return found.prepared


def survey(recipe: Recipe, listener: Listener) -> Survey:
    """Everything that can be known of a run without weights; errors are collected.

    Raises:
        UsageError, InputError: options, data or model that cannot be used at all.
        BadRows: not one row can be trained.
    """
    assert recipe.model
    assert recipe.data
    # Rows need no torch: what is wrong with them is found before it is imported.
    train, held_out, loaded, findings, overlap = _rows(recipe, listener)
    listener.stage("opening the model's files")
    facts, tokenizer = look_at(recipe.model, recipe.revision)
    new_tokens, token_findings = _new_tokens(recipe, tokenizer, facts)
    contract = contract_of(tokenizer, recipe)
    if contract.date and not recipe.date:
        # A resumed run goes on with the day on which it was started.
        origins = {**recipe.origins, "date": "the day of the start"}
        recipe = dataclasses.replace(recipe, date=contract.date, origins=origins)
    start = by_template(tokenizer)

    listener.stage("proving the rows")
    contract = contract.fit(train, loss_on=recipe.loss_on)
    taken, encoded, refused = _encode(contract, train, recipe, listener)
    eval_taken, eval_encoded, eval_refused = _encode(contract, held_out, recipe, listener)
    refusals = [*loaded.findings, *refused, *eval_refused]
    findings += [*token_findings, *without_effect(recipe)]
    bad_rows, stopping = bad_rows_told(refusals, recipe, len(encoded))
    findings += [*bad_rows, *contract.findings, *remarks([*encoded, *eval_encoded])]

    text = all(is_text(row) for row in encoded)
    limit = plan_length(
        recipe,
        longest=longest([*encoded, *eval_encoded]),
        context=facts.context_length,
        is_text=text,
    )
    fitted = fit_length(encoded, max_length=limit[0], overlong=recipe.overlong)
    eval_fitted = fit_length(eval_encoded, max_length=limit[0], overlong=recipe.overlong)
    lost = length_findings(fitted, eval_fitted, encoded, limit[0], facts, contract, recipe)
    findings += lost
    if worst(lost) == "error":
        stopping.append(CheckFailed("too many rows are longer than the limit", lost))
    plan = make_plan(
        recipe,
        model=facts,
        start="instruct" if start.kind == "instruct" else "base",
        start_reason=start.reasons[0],
        max_length=limit,
        lengths=[len(example.ids) for example in fitted.examples] or [1],
        reasoning_share=_reasoning_share(train),
    )
    lengths = None
    if plan.reasoning_share and encoded:
        # Where reasoning is cut, neither the closing marker nor the answer is left.
        rows = encoded_lengths(encoded, contract)
        lengths = length_report(rows, plan.max_length, facts.context_length)
    if not recipe.no_check:
        listener.stage("checking the run")
        told = preflight(
            _preflight(
                contract,
                fitted,
                plan,
                facts,
                text,
                taken,
                eval_taken,
                new_tokens,
            ),
            listener.progress,
        )
        findings += [*told, *unused_tokens(new_tokens, fitted.examples)]
        if worst(told) == "error":
            errors = [finding for finding in told if finding.level == "error"]
            stopping.append(CheckFailed("the check found errors; nothing was trained", errors))
    prepared = Prepared(
        contract,
        facts,
        fitted.examples,
        fitted.rows,
        eval_fitted.examples,
        _answerable(eval_taken, eval_fitted),
        plan,
        merged(findings),
        data_facts(loaded, fitted, eval_fitted, refusals, overlap, lengths),
        new_tokens,
        _verify_rows(eval_taken, eval_encoded, plan, held_out=True)
        or _verify_rows(taken, encoded, plan, held_out=False),
        text,
    )
    return Survey(prepared, encoded, train, stopping)


def _verify_rows(
    conversations: Sequence[Conversation],
    encoded: Sequence[Encoded],
    plan: Plan,
    *,
    held_out: bool,
) -> list[VerifyRow]:
    """The first rows that fit as they are: what verification can do again from the row alone."""
    fitting = (
        (conversation, row)
        for conversation, row in zip(conversations, encoded, strict=True)
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
            why="its rows are bound to the tokenizer it was trained with",
            fix=f"merge it first: truetune export {recipe.model} --merge -o MERGED",
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


def _rows(
    recipe: Recipe, listener: Listener
) -> tuple[list[Conversation], list[Conversation], Loaded, list[Finding], list[str]]:
    """Training rows, held-out rows, what was read, what to tell, and the places of held-out rows
    that were left out because they are trained."""
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
        places=(*loaded.places, *own.places),
    )
    kept = {id(conversation) for conversation in held_out}
    overlap = [c.where for c in own.conversations if id(c) not in kept]
    return loaded.conversations, held_out, both, findings, overlap


def _encode(
    contract: PromptContract,
    conversations: Sequence[Conversation],
    recipe: Recipe,
    listener: Listener,
) -> tuple[list[Conversation], list[Encoded], list[Finding]]:
    """The rows that can be trained, as they were read and encoded, and one error for each other:
    it has no faithful completion, or holds a control token where the recipe refuses those."""
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
            refused.append(result.error.finding)
        elif position in controls:
            refused.append(controls[position])
        else:
            taken.append(conversation)
            encoded.append(result)
    return taken, encoded, refused


def _preflight(
    contract: PromptContract,
    fitted: Fitted,
    plan: Plan,
    facts: ModelFacts,
    text: bool,
    train: Sequence[Conversation],
    held_out: Sequence[Conversation],
    new_tokens: Sequence[NewToken],
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
        base_stop_ids=facts.served_eos_ids,
        lora=plan.recipe.lora,
        learning_rate=plan.learning_rate,
        suggested_rate=suggested_rate(plan, facts),
        max_steps=plan.max_steps,
        warmup_steps=plan.warmup_steps,
        train=train,
        held_out=held_out,
        model=str(plan.recipe.model),
        revision=plan.recipe.revision,
        trained_tokens=[token.id for token in new_tokens],
    )


def _reasoning_share(conversations: Sequence[Conversation]) -> float:
    with_reasoning = sum(
        any(message.get("reasoning_content") for message in c.messages) for c in conversations
    )
    return with_reasoning / max(len(conversations), 1)
