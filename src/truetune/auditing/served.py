"""Compare rows with the data that they were made from, if the dataset still has it.

A trainer's dataset often keeps its columns (`messages`, `prompt` and `completion`) beside the ids.
Then two things can be shown that ids alone cannot: that the ids before an answer are those that a
server would send, and that nothing of an answer was lost on the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from truetune.auditing.model import new_token_ids
from truetune.auditing.read import IGNORED, Reading, ReadRow
from truetune.auditing.subject import Subject
from truetune.checks.conversations.content import control_tokens_absent
from truetune.checks.conversations.rows import DataFacts
from truetune.checks.labels.facts import LabelFacts
from truetune.checks.labels.markers import nested_rows
from truetune.checks.labels.served import ROLES
from truetune.checks.labels.stops import stops_trained
from truetune.contract.contract import PromptContract
from truetune.contract.specials import control_tokens
from truetune.contract.tokens import common_prefix
from truetune.data.conversation import Conversation
from truetune.errors import TruetuneError
from truetune.findings import MOST_ROWS, Finding, rows_finding, share

# Rows compared with their columns, evenly over all: rendering costs a millisecond a turn.
_MOST = 2_000


def served_findings(subject: Subject, reading: Reading, facts: LabelFacts) -> Iterator[Finding]:
    """Run the checks that need the dataset's columns; nothing if it has none."""
    columns = set(getattr(subject.rows, "column_names", None) or ())
    rows = [r for r in reading.rows if r.index is not None]
    rows = [rows[i * len(rows) // _MOST] for i in range(_MOST)] if len(rows) > _MOST else rows
    if columns & {"messages", "prompt"}:
        data = [(row, subject.rows[row.index]) for row in rows]
        talks = [(row, talk) for row, cells in data if (talk := _conversation(cells)) is not None]
        if talks:
            yield from _conversations(subject, talks, facts)
        texts = [
            (row, cells["prompt"], cells["completion"])
            for row, cells in data
            if isinstance(cells.get("prompt"), str) and isinstance(cells.get("completion"), str)
        ]
        if texts:
            yield from _prompt_texts(subject, texts)


def has_conversations(subject: Subject, reading: Reading) -> bool:
    """Whether the dataset still has the messages of its rows."""
    columns = set(getattr(subject.rows, "column_names", None) or ())
    index = next((r.index for r in reading.rows if r.index is not None), None)
    if index is None or not columns & {"messages", "prompt"}:
        return False
    return _conversation(subject.rows[index]) is not None


@dataclass(frozen=True)
class _Talk:
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    kwargs: dict[str, Any]


def _conversation(cells: Mapping[str, Any]) -> _Talk | None:
    messages = cells.get("messages")
    if messages is None and isinstance(cells.get("prompt"), list):
        messages = [*cells["prompt"], *(cells.get("completion") or [])]
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], Mapping):
        return None
    if "role" not in messages[0] or "content" not in messages[0]:
        return None
    tools = cells.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        tools = None
    kwargs = cells.get("chat_template_kwargs") or {}
    # A table fills fields that a row does not have with None.
    kept = [{k: v for k, v in m.items() if v is not None} for m in messages]
    return _Talk(kept, tools or None, {k: v for k, v in kwargs.items() if v is not None})


def stop_findings(subject: Subject, facts: LabelFacts) -> Iterator[Finding]:
    """The model's generation config contains the end token that answers are trained with."""
    if facts.plain or facts.is_stream or subject.model is None or not subject.served:
        return
    trained = stops_trained(facts) & set(subject.said) - set(subject.served)
    if not trained:
        return
    tokens = facts.tokens
    ends, known = (tokens.named(sorted(ids)) for ids in (trained, subject.served))
    yield Finding(
        code="stop-not-served",
        level="warning",
        what=f"the model is trained to end answers with {ends}, but its generation config stops "
        f"only on {known}",
        where="model.generation_config.eos_token_id",
        count=len(facts.table),
        why="the tokenizer knows the end token, but the generation config does not: `generate` "
        "continues after it, and so does a server that reads the saved generation_config",
        fix=f"model.generation_config.eos_token_id = {sorted({*subject.served, *trained})}",
        rows=tuple(facts.names[:MOST_ROWS]),
    )


# ------------------------------------------------------------------ conversations


def _conversations(
    subject: Subject, talks: Sequence[tuple[ReadRow, _Talk]], facts: LabelFacts
) -> Iterator[Finding]:
    names = [row.name for row, _ in talks]
    yield from _control_tokens(subject, talks, facts)
    contract = facts.frame.contract
    if contract is None:
        return
    yield from _foreign_roles(contract, talks, names)
    differ: list[int] = []
    lost: list[int] = []
    shown = ""
    for number, (row, talk) in enumerate(talks):
        judged = _judge_row(contract, row, talk, facts)
        if judged is None:
            continue
        difference, missing = judged
        if difference:
            differ.append(number)
            shown = shown or difference
        if missing:
            lost.append(number)
    if differ:
        yield rows_finding(
            names,
            differ,
            code="prompt-differs",
            level="error",
            what=f"in {share(len(differ), len(names))}, answers follow a prompt that a server "
            "with this tokenizer does not send",
            why=shown,
            fix="render the rows with the tokenizer's chat template, as it is saved; if it "
            "deletes earlier reasoning, train one row per turn",
        )
    if lost:
        yield rows_finding(
            names,
            lost,
            code="answer-text-lost",
            level="warning",
            what=f"parts of the answers of {share(len(lost), len(names))} are missing from their "
            "ids",
            why="the chat template drops them (usually the reasoning of earlier turns), so the "
            "model does not learn what the data says",
            fix="train one row per turn, so that each answer is rendered as the last one; or use "
            "a template that writes them",
        )


def _foreign_roles(
    contract: PromptContract, talks: Sequence[tuple[ReadRow, _Talk]], names: Sequence[str]
) -> Iterator[Finding]:
    """All roles are ones that servers send or that the template names."""
    known = {*ROLES, None}
    found: dict[int, str] = {}
    shown = True
    for number, (row, talk) in enumerate(talks):
        for role in dict.fromkeys(message.get("role") for message in talk.messages):
            if role not in known and str(role) not in contract.renderer.literals:
                written = str(role) in contract.tokens.decode(row.ids.tolist())
                shown, _ = shown and written, found.setdefault(number, str(role))
    if found:
        role = next(iter(found.values()))
        yield rows_finding(
            names,
            found,
            code="prompt-differs",
            level="error",
            what=f"{share(len(found), len(names))} contain turns of the role {role!r}, which no "
            "server sends",
            why=f"the template writes {role!r} where a served prompt has 'user' or 'assistant': "
            "what is learned after it has no effect when the model is served"
            if shown
            else f"the template does not know {role!r} and drops those turns: their text is not in "
            "the ids",
            fix="rename the roles to user and assistant before the rows are rendered with the "
            "tokenizer's chat template",
        )


def _judge_row(
    contract: PromptContract, row: ReadRow, talk: _Talk, facts: LabelFacts
) -> tuple[str, bool] | None:
    """(how the prompt of the last trained answer differs from the served one, whether text of an
    answer is missing); None if the row cannot be compared."""
    ids = row.ids[row.real != 0].tolist()
    labels = row.labels[row.real != 0]
    turns = [i for i, m in enumerate(talk.messages) if m.get("role") == "assistant"]
    if not turns:
        return None
    at_limit = facts.cut_at is not None and len(ids) >= facts.cut_at
    text = contract.tokens.decode(ids)
    missing = False
    for turn in turns:
        for key in ("content", "reasoning_content"):
            part = talk.messages[turn].get(key)
            # What the length limit took is reported where lengths are judged.
            if isinstance(part, str) and not at_limit and _gone(contract, part, text):
                missing = True
    try:
        served = _served(contract, talk, turns[-1])
    except TruetuneError:
        return "", missing
    same = common_prefix(ids, served)
    if (at_limit and not same) or same >= len(served) or not (labels[same:] != IGNORED).any():
        return "", missing
    said = talk.messages[turns[-1]].get("content")
    spaced = isinstance(said, str) and said[:1].isspace() and same >= len(served) - 1
    if spaced and text.startswith(contract.tokens.decode(served)):
        # The answer's own white space became one token with that of the prompt.
        return "", missing
    ours = contract.tokens.decode(ids[same : same + 6])
    theirs = contract.tokens.decode(served[same : same + 6])
    return f"from token {same} on, the row has {ours!r}, but a server sends {theirs!r}", missing


def _served(contract: PromptContract, talk: _Talk, turn: int) -> list[int]:
    if talk.kwargs:
        contract = PromptContract.load(contract.tokenizer, template_kwargs=talk.kwargs)
    return contract.prompt_ids(talk.messages[:turn], talk.tools)


def _gone(contract: PromptContract, part: str, text: str) -> bool:
    """Whether a text of the data is not in the decoded row, spaces and normal forms aside."""
    wanted = "".join(contract.tokens.normalised(part).split())
    return bool(wanted) and wanted not in "".join(text.split())


def _control_tokens(
    subject: Subject, talks: Sequence[tuple[ReadRow, _Talk]], facts: LabelFacts
) -> Iterator[Finding]:
    """Special tokens, and what the template writes before a turn, in what people wrote."""
    tokenizer, contract = subject.tokenizer, facts.frame.contract
    texts = set(control_tokens(contract) if contract else tokenizer.all_special_tokens)
    # Tokens that were added since the tokenizer was loaded are meant to be written.
    texts -= {tokenizer.convert_ids_to_tokens(i) for i in new_token_ids(tokenizer)}
    starts = (facts.frame.answer_start, facts.frame.user_start)
    # A header in plain letters (`### Response:`) is a marker; a role alone (`assistant`) is not.
    texts |= {t for t in starts if len(t) > 4 and not t.replace(" ", "").isalpha()}
    # Tokens of a conversation that was rendered twice are reported as that.
    nested = {facts.names[row] for row in nested_rows(facts)}
    said = [
        Conversation(tuple(map(_in_text, talk.messages)), row.name)
        for row, talk in talks
        if row.name not in nested
    ]
    yield from control_tokens_absent(DataFacts(said, control=sorted(texts)))


def _in_text(message: dict[str, Any]) -> dict[str, Any]:
    """Content in parts has no text to look at."""
    return message if isinstance(message.get("content"), str) else {**message, "content": ""}


# ------------------------------------------------------------------ prompt and completion


def _prompt_texts(subject: Subject, texts: Sequence[tuple[ReadRow, str, str]]) -> Iterator[Finding]:
    """The ids before the answer are those of the prompt alone, as a server tokenizes it."""
    tokenizer = subject.tokenizer
    encoded = tokenizer([prompt for _, prompt, _ in texts], truncation=False, verbose=False)
    bad, shown = [], ""
    for number, ((row, _, _), prompt) in enumerate(zip(texts, encoded["input_ids"], strict=True)):
        prompt = list(prompt)
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt.pop()
        ids, labels = row.ids[row.real != 0].tolist(), row.labels[row.real != 0]
        supervised = np.flatnonzero(labels != IGNORED)
        same = common_prefix(ids, prompt)
        if same >= len(prompt) or not len(supervised) or len(ids) <= same:
            continue
        bad.append(number)
        ours = tokenizer.decode(ids[same : same + 2])
        theirs = tokenizer.decode(prompt[same : same + 2])
        shown = shown or f"the row continues with {ours!r} where the prompt alone has {theirs!r}"
    if bad:
        yield rows_finding(
            [row.name for row, _, _ in texts],
            bad,
            code="prompt-merged",
            level="warning",
            what=f"in {share(len(bad), len(texts))}, the prompt ends with a different token than "
            "when it is tokenized alone",
            why=f"{shown}: prompt and completion were tokenized together and merged at the "
            "boundary, so the model is trained on a prompt that no server sends",
            fix="move the space from the end of the prompt to the beginning of the completion",
        )
