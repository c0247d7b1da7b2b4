"""The errors of the proof: what a template does wrong to a turn, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from truetune.contract.defects import Defect
from truetune.contract.encode import Completion
from truetune.contract.turns import excerpt
from truetune.contract.twin import Leaf, Twin, twin_of
from truetune.errors import UnfaithfulTemplate

_WOULD_BE = "the completion would be {body}"
AS_THEY_ARE = "use a template that renders the arguments as they are"
# By the defect: what, why, fix, code. A part that is missing has a refusal of its own.
_REFUSALS: dict[str, tuple[str, str, str, str]] = {
    "added": (
        "the template adds the argument {text!r} to a tool call of message {turn}",
        "only text from the data may be a target",
        AS_THEY_ARE,
        "target-invented",
    ),
    "quoted": (
        "the template writes {label} of message {turn} as text, between quotes",
        f"{_WOULD_BE}: a server returns a string there",
        "use a template that keeps numbers, true, false and null as they are, or make it a string "
        "in the row",
        "target-dropped",
    ),
    "text": (
        "the arguments of a tool call of message {turn} are text, not a JSON object, and the "
        "template writes them between quotes",
        f"{_WOULD_BE}: a client also receives the quotes",
        'write the arguments as an object: {{"code": "..."}}',
        "target-dropped",
    ),
    "filled": (
        "the template writes something for an empty {text} in a tool call of message {turn}",
        _WOULD_BE,
        "use a template that renders empty arguments as they are, or leave them out of the row",
        "target-invented",
    ),
    "called": (
        "the template adds a tool call to message {turn}",
        _WOULD_BE,
        "use a template that renders the calls of the row and no others",
        "target-invented",
    ),
    "moved": (
        "the template writes arguments other than the row's next to the name of a tool call of "
        "message {turn}",
        _WOULD_BE,
        AS_THEY_ARE,
        "target-dropped",
    ),
    "unreadable": (
        "the template writes a tool call of message {turn} as JSON that cannot be read",
        "at {label} the completion would be {body}",
        "use a template that renders names and arguments with tojson",
        "target-dropped",
    ),
    "stripped": (
        "the template strips the outer whitespace of {label} of message {turn}",
        "a client receives a different value from the row's",
        AS_THEY_ARE,
        "target-dropped",
    ),
    "listed": (
        "the template writes the arguments of a tool call of message {turn} as pairs",
        f"{_WOULD_BE}: a server returns a list of them, not an object",
        AS_THEY_ARE,
        "target-dropped",
    ),
    "behind": (
        "the template writes the content of message {turn} after its tool calls",
        f"{_WOULD_BE}: a server that parses the calls takes the content from before them",
        "move the content into a turn of its own, or use a template that writes it first",
        "target-dropped",
    ),
    "glued": (
        "the template turns {label} of message {turn} into a different {kind}",
        _WOULD_BE,
        AS_THEY_ARE,
        "target-dropped",
    ),
    "whole": (
        "the template writes something next to {label} of message {turn}, inside its quotes or "
        "tags",
        f"{_WOULD_BE}: a client receives a different {{kind}}",
        "use a template whose tags hold names, keys and values and nothing else",
        "target-dropped",
    ),
    "repeated": (
        "the template writes {label} of message {turn} more than once",
        _WOULD_BE,
        "use a template that renders each part of a turn once",
        "target-invented",
    ),
    "order": (
        "the template writes {label} of message {turn} in a different place from the row",
        _WOULD_BE,
        "use a template that keeps the order of reasoning, content and tool calls",
        "target-dropped",
    ),
}


def defective(
    defect: Defect, twin: Twin, completion: Completion, message: Mapping[str, Any]
) -> UnfaithfulTemplate:
    turn = completion.text.number
    leaf = twin.leaves[defect.leaf] if defect.leaf is not None else None
    label = leaf.label if leaf else f"{defect.text} of a tool call" if defect.text else "a part"
    if defect.what == "missing":
        return missing(leaf, label, completion, message)
    said = {
        "turn": turn,
        "text": defect.text,
        "label": label,
        "kind": _kind(leaf, defect.text),
        "body": around(completion.body, leaf.forms if leaf else (defect.text.strip("'"),)),
    }
    what, why, fix, code = (part.format(**said) for part in _REFUSALS[defect.what])
    return UnfaithfulTemplate(what, why=why, fix=fix, code=code)


def missing(
    leaf: Leaf | None, label: str, completion: Completion, message: Mapping[str, Any]
) -> UnfaithfulTemplate:
    if not (message.get("reasoning_content") or message.get("tool_calls")):
        return rewritten(completion, message)
    turn, body = completion.text.number, completion.body
    kind = leaf.kind if leaf is not None else ""
    return UnfaithfulTemplate(
        f"the template drops {label} of message {turn}",
        why=f"the completion would be {excerpt(body)}",
        fix="write it between think markers with --reasoning inline, or leave it out with "
        "--reasoning drop"
        if kind == "reasoning"
        else "use a template that writes it next to calls, or omit the content of such turns"
        if kind == "content"
        else "use a template that renders it, or put it into the content",
        code="target-dropped",
    )


def behind_stop(
    leaf: Leaf | None, completion: Completion, message: Mapping[str, Any]
) -> UnfaithfulTemplate:
    """A part of the target is after the stop."""
    turn, body = completion.text.number, completion.body
    content = str(message.get("content") or "")
    if leaf and leaf.kind == "content" and completion.stop and completion.stop in content:
        return stop_in_answer(completion)
    return UnfaithfulTemplate(
        f"the template ends the turn before {leaf.label if leaf else 'a tool call'} of message "
        f"{turn}",
        why=f"a stop token follows {excerpt(body)}: a server would end the answer there"
        if body
        else "a stop token precedes it: a server would end the answer there",
        fix="move it into a turn of its own, or use a template that ends a turn only once",
        code="target-behind-stop",
    )


def unlike(
    completion: Completion, message: Mapping[str, Any], marks: Sequence[str]
) -> UnfaithfulTemplate:
    """The completion is not what the template writes around such parts, filled with them."""
    if completion.error is not None:
        return completion.error
    if not (message.get("reasoning_content") or message.get("tool_calls")):
        return rewritten(completion, message)
    turn, body = completion.text.number, completion.body
    start = 0
    for leaf in twin_of(message, marks).leaves:
        ends = [at + len(f) for f in leaf.forms if (at := body.find(f, start)) >= 0]
        if not ends and leaf.kind != "key":
            return missing(leaf, leaf.label, completion, message)
        start = min(ends, default=start)
    return UnfaithfulTemplate(
        f"the template rewrites a part of message {turn}",
        why=f"the completion would be {excerpt(body)}",
        fix="use a template that renders reasoning, content and tool calls unchanged",
        code="target-dropped",
    )


def rewritten(completion: Completion, message: Mapping[str, Any]) -> UnfaithfulTemplate:
    """An answer of plain text that is different in the completion."""
    if completion.error is not None:
        return completion.error
    turn, body = completion.text.number, completion.body
    content = str(message.get("content") or "")
    if content.strip() and content.strip() in body:
        return worded(turn, body.replace(content.strip(), "\u2026", 1), False, False)
    if completion.stop and completion.stop in content:
        return stop_in_answer(completion)
    return UnfaithfulTemplate(
        f"the template rewrites the answer of message {turn}",
        why=f"the data has {excerpt(content)}, the completion {excerpt(body)}",
        fix="use a template that renders the answer unchanged",
        code="target-dropped",
    )


def stop_in_answer(completion: Completion) -> UnfaithfulTemplate:
    return UnfaithfulTemplate(
        f"the answer of message {completion.text.number} contains the stop token "
        f"{completion.stop!r}",
        why="a server would end the answer there",
        fix="remove the control token from the row",
        code="stop-in-answer",
    )


def would_be(completion: Completion, part: str = "") -> str:
    return _WOULD_BE.format(body=around(completion.body, (part,)))


def around(body: str, forms: Sequence[str]) -> str:
    """The stretch of a completion in which a part stands, its beginning where it stands nowhere."""
    at = next((at for form in forms if form and (at := body.find(form)) >= 0), 0)
    # What stands against the part is to be seen too.
    return "..." + excerpt(body[at - 30 :], 80) if at > 40 else excerpt(body)


def _kind(leaf: Leaf | None, text: str) -> str:
    """What a part of a call is, in a word."""
    if leaf is None:
        return "number" if text.isdigit() else "value"
    return "text" if isinstance(leaf.value, str) else "number"


def cut_at(turn: int, label: str, marker: str) -> UnfaithfulTemplate:
    return UnfaithfulTemplate(
        f"{label} of message {turn} holds {marker!r}, which is a marker in the template's format",
        why="a server that parses the answer would cut it there",
        fix="remove the marker from the row",
        code="target-dropped",
    )


def worded(turn: int, words: str, behind: bool, calls: bool) -> UnfaithfulTemplate:
    where = "after" if behind else "next to" if calls else "around"
    return UnfaithfulTemplate(
        f"the template adds {excerpt(words)} {where} the answer of message {turn}",
        why="only text from the data may be a target",
        fix="set the template argument that leaves it out, use another template, or train on "
        "the words too with --template-words keep",
        code="target-invented",
    )


def unannounced(turn: int, header: str) -> UnfaithfulTemplate:
    """A header that the served prompt lacks, so that the model would have to write it."""
    return UnfaithfulTemplate(
        "the template has no generation prompt: the served prompt ends before "
        f"{excerpt(header)} of message {turn}",
        why="the model would have to write it, and a server would return it with the answer",
        fix="end the template with {%- if add_generation_prompt -%}{{- "
        f"{json.dumps(header, ensure_ascii=False)} -}}}}{{%- endif -%}}, or train on the header "
        "too with --template-words keep",
        code="generation-prompt-missing",
    )


def cut_short(turn: int, label: str, sign: str) -> UnfaithfulTemplate:
    """A name or key that the format of a template cannot hold."""
    return UnfaithfulTemplate(
        f"the template's format cannot represent {label} of message {turn}",
        why=f"{sign!r} ends it early or is not allowed in a name: a server reads a different one",
        fix="rename it in the row, or use a template that writes arguments as JSON",
        code="target-dropped",
    )


def loose(wrong: str, completion: Completion) -> UnfaithfulTemplate:
    """Reasoning that a server's parser does not find where the row has it."""
    return UnfaithfulTemplate(
        f"the reasoning of message {completion.text.number} is not between its markers: {wrong}",
        why=f"{would_be(completion)}: a server that splits there returns different reasoning and "
        "a different answer",
        fix="use a template that closes its think block before the answer and the calls",
        code="target-dropped",
    )
