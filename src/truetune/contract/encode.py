"""Conversations to token examples, with the proof of every turn.

input   messages, a renderer, a tokenizer, the stop ids
does    per trained turn: render what the server would send and what the template makes of the
        answer; tokenize; cut the completion at the first stop; decode it and compare with the data
output  Encoded: one sequence with several supervised spans where each later prompt extends the
        earlier turn token for token, else branches that share a prefix
who     PromptContract; nothing here pads, shifts or cuts for length
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

from truetune.contract.example import SFTExample
from truetune.contract.tokens import Tokens, common_prefix
from truetune.contract.turns import TurnText, excerpt
from truetune.errors import UnfaithfulTemplate

LossOn = Literal["assistant", "last", "all"]
LOSS_ON: tuple[LossOn, ...] = get_args(LossOn)


@dataclass(frozen=True)
class Encoded(Sequence[SFTExample]):
    """What one row became.

    Attributes:
        examples: in order of their first turn.
        parents: per example the example it branches from, None for a root.
        shared: per example the length in tokens of the prefix it shares with its parent.
        turns: per example the message indices that it supervises.
        row: where the row came from.
        remarks: what was found on the way, one word each, repeated per turn: "stripped" (the
            template strips outer whitespace of the answer), "normalised" (the tokenizer's own
            normaliser changed it), "seam" (joint encoding would have merged prompt and answer),
            "framed" (the template writes control tokens around the answer, which are learned),
            "stop-appended" (the template closes answers with nothing: the model's own end does),
            "reasoning-empty" (the block that the prompt opens is closed at once),
            "thinking-unlearned" (an answer without reasoning where the template would think),
            "prompt-realigned" (the served prompt's earlier part differs from the rendering's).
        reasons: per example why it is none with the one before: which text of history the template
            wrote anew; "" for a root.
        route: how reasoning reached the template, "" for a row without.
    """

    examples: tuple[SFTExample, ...]
    parents: tuple[int | None, ...]
    shared: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]
    row: str = ""
    remarks: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    route: str = ""

    @overload
    def __getitem__(self, index: int) -> SFTExample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SFTExample, ...]: ...
    def __getitem__(self, index: int | slice) -> SFTExample | tuple[SFTExample, ...]:
        return self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[SFTExample]:
        return iter(self.examples)


@dataclass(frozen=True)
class Ends:
    """How a turn is closed where the template writes no stop behind it.

    Attributes:
        answer, call: the stop that stands before the next user turn and before a tool's answer;
            None where the template writes none there either.
        own: the model's own end, for templates that close answers with nothing at all.
        lead: what the template writes before every answer: a format may name a recipient or a
            channel first.
        bare: whether the template writes nothing but whitespace behind a last answer.
    """

    answer: int | None = None
    call: int | None = None
    own: int | None = None
    lead: str = ""
    bare: bool = False


def assemble(
    texts: Sequence[TurnText],
    ids_of: Mapping[str, list[int]],
    messages: Sequence[Mapping[str, Any]],
    *,
    tokens: Tokens,
    stop_ids: Sequence[int],
    ends: Ends,
    loss_on: LossOn,
    row: str,
    route: str = "",
) -> Encoded:
    """Examples from the tokenized texts of one conversation, each turn proved.

    Raises:
        UnfaithfulTemplate: an answer does not survive, gains something, or ends on no stop.
    """
    examples: list[SFTExample] = []
    parents: list[int | None] = []
    shared: list[int] = []
    turns: list[list[int]] = []
    remarks: list[str] = []
    reasons: list[str] = []
    for text in texts:
        prompt = ids_of[text.prompt]
        message = messages[text.turn]
        completion, how = _completion(text, message, ids_of, tokens, stop_ids, ends)
        remarks += [*text.remarks, *how]
        rest = text.through[len(text.prompt) :]
        lead = text.lead or ends.lead
        found = _prove(text.turn, message, prompt, completion, rest, lead, tokens)
        remarks += [remark for remark in found if not (remark == "framed" and text.lead)]
        last = examples[-1].ids if examples else []
        if examples and prompt[: len(last)] == last:
            context = [0] * (len(prompt) - len(last))
            mask = [*examples[-1].mask, *context, *([1] * len(completion))]
            examples[-1] = SFTExample([*prompt, *completion], mask)
            turns[-1].append(text.turn)
            continue
        ids = [*prompt, *completion]
        common = [common_prefix(example.ids, ids) for example in examples]
        best = max(range(len(common)), key=lambda i: (common[i], i), default=None)
        parents.append(best)
        shared.append(0 if best is None else common[best])
        reasons.append("" if best is None else _rewriting(text.turn, last, prompt, tokens))
        mask = [0] * len(prompt) + [1] * len(completion)
        examples.append(SFTExample([*prompt, *completion], mask))
        turns.append([text.turn])
    if loss_on == "all":
        # A shared prefix is a target in the branch that it comes from, once.
        examples = [
            SFTExample(e.ids, [0] * start + [1] * (len(e.ids) - start))
            for e, start in zip(examples, shared, strict=True)
        ]
    return Encoded(
        tuple(examples),
        tuple(parents),
        tuple(shared),
        tuple(map(tuple, turns)),
        row,
        tuple(remarks),
        tuple(reasons),
        route,
    )


def _completion(
    text: TurnText,
    message: Mapping[str, Any],
    ids_of: Mapping[str, list[int]],
    tokens: Tokens,
    stop_ids: Sequence[int],
    ends: Ends,
) -> tuple[list[int], list[str]]:
    """Ids of the answer up to and with the first stop, and remarks."""
    prompt, through = ids_of[text.prompt], ids_of[text.through]
    seam = through[: len(prompt)] != prompt
    remarks = ["seam"] if seam else []
    written = text.through[len(text.prompt) :]
    ids = through[len(prompt) :]
    # Some tokenizers put a space before whatever follows a special token.
    gained = bool(ids) and tokens.gains_space(prompt, ids[0], written)
    if seam or gained:
        ids = tokens.encode_completion(prompt, written)
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[: position + 1], remarks
    following = ends.call if message.get("tool_calls") else ends.answer
    if following is not None and following in stop_ids:
        return [*ids, following], remarks
    if ends.own is not None and ends.bare and not message.get("tool_calls"):
        return [*ids, ends.own], [*remarks, "stop-appended"]
    if message.get("reasoning_content") or message.get("tool_calls"):
        # What the template leaves out is the truer reason.
        _prove_parts(text.turn, message, tokens.decode_after(prompt, ids), written, tokens)
    stops = ", ".join(repr(tokens.decode([i])) for i in stop_ids) or "none at all"
    raise UnfaithfulTemplate(
        f"the answer of message {text.turn} ends on no stop token",
        why=f"the stop set is {stops}; after the answer the template writes {_tail(written)}",
        fix="name the token that ends an answer with --stop, or use a template that writes one",
        code="no-stop",
    )


def _prove(
    turn: int,
    message: Mapping[str, Any],
    prompt: Sequence[int],
    completion: Sequence[int],
    written: str,
    lead: str,
    tokens: Tokens,
) -> list[str]:
    """Compare the decoded completion with the data; returns remarks.

    Raises:
        UnfaithfulTemplate: something of the answer is missing, or something is added to it.
    """
    body = tokens.decode_after(prompt, completion[:-1])
    content = str(message.get("content") or "")
    # Some tokenizers (GPT-2's) have one token for unknown, begin and end: at the end it is a stop.
    if tokens.unknown_id is not None and tokens.unknown_id in completion[:-1]:
        raise UnfaithfulTemplate(
            f"the tokenizer has no token for a part of the answer of message {turn}",
            why="it encodes to the unknown token, which decodes to something else",
            code="unknown-token",
        )
    if message.get("reasoning_content") or message.get("tool_calls"):
        # Before any comparison with the content: a template that drops both leaves the content.
        _prove_parts(turn, message, body, written, tokens)
        return []
    if body == content:
        return []
    if body.strip() == content.strip():
        return ["stripped"]
    if body.strip() == tokens.normalised(content).strip():
        return ["normalised"]
    if _framed(content, body.strip().removeprefix(lead.strip()), completion[:-1], tokens):
        return ["framed"]
    raise _rewritten(turn, content, body, tokens, completion[-1])


def _framed(content: str, body: str, ids: Sequence[int], tokens: Tokens) -> bool:
    """Whether nothing but control tokens of the template stand around the whole answer.

    A format may have the model name its channel before it answers, which the template then writes
    before every answer (`Ends.lead`, taken off here). Words behind an answer are no format: they
    would be invented. So each piece beside the answer must touch a control token.
    """
    for part in dict.fromkeys((content.strip(), tokens.normalised(content).strip())):
        before, found, after = body.rpartition(part) if part else (body, "", "")
        if part and not found:
            continue
        pieces = [piece for piece in (before.strip(), after.strip()) if piece]
        marks = [tokens.decode([token]).strip() for token in ids if token in tokens.special_ids]
        if all(
            any(piece.startswith(m) or piece.endswith(m) for m in marks if m) for piece in pieces
        ):
            return True
    return False


def _prove_parts(
    turn: int, message: Mapping[str, Any], body: str, written: str, tokens: Tokens
) -> None:
    """Reasoning, content and tool calls must all be in the completion, reasoning first."""
    start = 0
    for name, label in (("reasoning_content", "the reasoning"), ("content", "the content")):
        part = str(message.get(name) or "").strip()
        found = _find(part, body, start, tokens)
        if found is None:
            raise _missing(turn, label, part, body, written)
        start = found
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        for leaf in [function.get("name", ""), *_leaves(function.get("arguments", {}))]:
            forms = _json_forms(leaf)
            if not any(_find(form, body, 0, tokens) is not None for form in forms):
                label = f"{leaf!r} of a tool call"
                raise _missing(turn, label, str(leaf), body, written)


def _missing(turn: int, label: str, part: str, body: str, written: str) -> UnfaithfulTemplate:
    """A part of the target that is not in the completion: behind its end, or nowhere."""
    if part and part in written:
        return UnfaithfulTemplate(
            f"the template ends the turn before {label} of message {turn}",
            why=f"a stop token stands behind {excerpt(body)}: a server would end the answer there"
            if body
            else "a stop token stands in front of it: a server would end the answer there",
            fix="put it into a turn of its own, or use a template that keeps a turn in one piece",
            code="target-behind-stop",
        )
    reasoning = label == "the reasoning"
    return UnfaithfulTemplate(
        f"the template drops {label} of message {turn}",
        why=f"the completion would be {excerpt(body)}",
        fix="write it between think markers with --reasoning inline, or leave it out of the data "
        "with --reasoning drop"
        if reasoning
        else "use a template that renders it, or put it into the content",
        code="target-dropped",
    )


def _find(part: str, body: str, start: int, tokens: Tokens) -> int | None:
    """End of `part` in `body` after `start`, as it is or as the normaliser leaves it."""
    for form in (part, tokens.normalised(part).strip()):
        at = body.find(form, start)
        if at >= 0:
            return at + len(form)
    return None


def _leaves(value: Any) -> Iterator[Any]:
    """Names and scalar values of a tool call's arguments."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _json_forms(leaf: Any) -> list[str]:
    """The ways in which templates write a scalar."""
    if isinstance(leaf, str):
        quoted = (json.dumps(leaf, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
        return [leaf, *quoted, repr(leaf)[1:-1]]
    return [json.dumps(leaf), str(leaf)]


def _rewriting(turn: int, last: Sequence[int], prompt: Sequence[int], tokens: Tokens) -> str:
    """Where a later prompt leaves the sequence before it."""
    at = common_prefix(last, prompt)
    before, now = tokens.decode(last[at : at + 24]), tokens.decode(prompt[at : at + 24])
    return (
        f"the prompt of message {turn} has {excerpt(now, 40)} where the sequence before it has "
        f"{excerpt(before, 40)}"
    )


def _rewritten(turn: int, content: str, body: str, tokens: Tokens, stop: int) -> UnfaithfulTemplate:
    if content.strip() in body:
        added = body.replace(content.strip(), "\u2026", 1)
        return UnfaithfulTemplate(
            f"the template adds {excerpt(added)} around the answer of message {turn}",
            why="nothing that is not in the data may become a target",
            fix="set the template argument that leaves it out, or use another template",
            code="target-invented",
        )
    stop_text = tokens.decode([stop])
    if stop_text and stop_text in content:
        return UnfaithfulTemplate(
            f"the answer of message {turn} contains the stop token {stop_text!r}",
            why="a server would end the answer there",
            fix="take the control token out of the row",
            code="stop-in-answer",
        )
    return UnfaithfulTemplate(
        f"the template rewrites the answer of message {turn}",
        why=f"the data says {excerpt(content)}, the completion {excerpt(body)}",
        fix="use a template that renders the answer as it is",
        code="target-dropped",
    )


def _tail(text: str, limit: int = 30) -> str:
    return repr("\u2026" + text[-limit:] if len(text) > limit else text)
