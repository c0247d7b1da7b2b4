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
from truetune.contract.render import Renderer
from truetune.contract.tokens import Tokens, common_prefix
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
            normaliser changed it), "seam" (joint encoding would have merged prompt and answer).
    """

    examples: tuple[SFTExample, ...]
    parents: tuple[int | None, ...]
    shared: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]
    row: str = ""
    remarks: tuple[str, ...] = ()

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
class TurnText:
    """One trained turn as text: the served prompt, and the template's rendering through it."""

    turn: int
    prompt: str
    through: str


def trained_turns(messages: Sequence[Mapping[str, Any]], loss_on: LossOn) -> list[int]:
    """Indices of the assistant turns that are targets.

    Raises:
        UnfaithfulTemplate: there is none.
    """
    turns = [
        index
        for index, message in enumerate(messages)
        if message.get("role") == "assistant" and message.get("train") is not False
    ]
    if not turns:
        raise UnfaithfulTemplate(
            "the conversation has no assistant turn to train",
            fix="add an answer, or leave the row out with --bad-rows drop",
            code="no-assistant-turn",
        )
    return turns[-1:] if loss_on == "last" else turns


def turn_texts(
    renderer: Renderer,
    messages: Sequence[Mapping[str, Any]],
    turns: Sequence[int],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    arguments: Mapping[str, Any] | None,
) -> list[TurnText]:
    """Render the two texts of each turn.

    Raises:
        UnfaithfulTemplate: the template refuses the messages, or writes something else before an
            answer in history than the server sends, or nothing stands before an answer.
    """
    visible = [{k: v for k, v in message.items() if k != "train"} for message in messages]
    texts = []
    for turn in turns:
        if turn == 0:
            raise UnfaithfulTemplate(
                "the conversation begins with an answer to train",
                why="a server has no prompt to send before it: it takes no empty conversation",
                fix="put a message before it, or set train: false on it",
                code="no-prompt",
            )
        prompt = renderer.render(
            visible[:turn], tools=tools, add_generation_prompt=True, arguments=arguments
        )
        through = renderer.render(visible[: turn + 1], tools=tools, arguments=arguments)
        if not through.startswith(prompt):
            raise _diverging(turn, prompt, through)
        texts.append(TurnText(turn, prompt, through))
    return texts


def assemble(
    texts: Sequence[TurnText],
    ids_of: Mapping[str, list[int]],
    messages: Sequence[Mapping[str, Any]],
    *,
    tokens: Tokens,
    stop_ids: Sequence[int],
    loss_on: LossOn,
    row: str,
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
    for text in texts:
        prompt = ids_of[text.prompt]
        completion, seam = _completion(text, ids_of, tokens, stop_ids)
        remarks += ["seam"] * seam
        remarks += _prove(text.turn, messages[text.turn], prompt, completion, tokens)
        last = examples[-1].ids if examples else []
        if examples and prompt[: len(last)] == last:
            context = [0] * (len(prompt) - len(last))
            mask = [*examples[-1].mask, *context, *([1] * len(completion))]
            examples[-1] = SFTExample([*prompt, *completion], mask)
            turns[-1].append(text.turn)
            continue
        parents.append(len(examples) - 1 if examples else None)
        shared.append(common_prefix(last, [*prompt, *completion]))
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
    )


def _completion(
    text: TurnText, ids_of: Mapping[str, list[int]], tokens: Tokens, stop_ids: Sequence[int]
) -> tuple[list[int], bool]:
    """Ids of the answer up to and with the first stop, and whether the seam would have merged."""
    prompt, through = ids_of[text.prompt], ids_of[text.through]
    seam = through[: len(prompt)] != prompt
    written = text.through[len(text.prompt) :]
    ids = through[len(prompt) :]
    # Some tokenizers put a space before whatever follows a special token.
    gained = tokens.decode_after(prompt, ids[:1])[:1] == " " != written[:1]
    if seam or gained:
        ids = tokens.encode_completion(prompt, written)
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[: position + 1], seam
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
        _prove_parts(turn, message, body, tokens)
        return []
    if body == content:
        return []
    if body.strip() == content.strip():
        return ["stripped"]
    if body.strip() == tokens.normalised(content).strip():
        return ["normalised"]
    raise _rewritten(turn, content, body, tokens, completion[-1])


def _prove_parts(turn: int, message: Mapping[str, Any], body: str, tokens: Tokens) -> None:
    """Reasoning, content and tool calls must all be in the completion, reasoning first."""
    start = 0
    for name in ("reasoning_content", "content"):
        part = str(message.get(name) or "").strip()
        found = _find(part, body, start, tokens)
        if found is None:
            raise UnfaithfulTemplate(
                f"the template drops the {name.replace('_', ' ')} of message {turn}",
                why=f"the completion would be {_excerpt(body)}",
                fix="use a template that renders it, or put it into the content",
                code="target-dropped",
            )
        start = found
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        for leaf in [function.get("name", ""), *_leaves(function.get("arguments", {}))]:
            if not any(_find(form, body, 0, tokens) is not None for form in _json_forms(leaf)):
                raise UnfaithfulTemplate(
                    f"the template drops {leaf!r} of a tool call of message {turn}",
                    why=f"the completion would be {_excerpt(body)}",
                    fix="use a template that renders tool calls",
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


def _diverging(turn: int, prompt: str, through: str) -> UnfaithfulTemplate:
    at = next(
        (i for i, (a, b) in enumerate(zip(prompt, through, strict=False)) if a != b),
        min(len(prompt), len(through)),
    )
    return UnfaithfulTemplate(
        f"what the server sends before message {turn} is not what the template writes before it",
        why=f"the served prompt goes on with {_excerpt(prompt[at:])}, the rendered conversation "
        f"with {_excerpt(through[at:])}",
        fix="use a template whose history equals its prompts, or set the template's arguments",
        code="prompt-differs",
    )


def _rewritten(turn: int, content: str, body: str, tokens: Tokens, stop: int) -> UnfaithfulTemplate:
    if content.strip() in body:
        added = body.replace(content.strip(), "\u2026", 1)
        return UnfaithfulTemplate(
            f"the template adds {_excerpt(added)} around the answer of message {turn}",
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
        why=f"the data says {_excerpt(content)}, the completion {_excerpt(body)}",
        fix="use a template that renders the answer as it is",
        code="target-dropped",
    )


def _excerpt(text: str, limit: int = 60) -> str:
    """A quoted beginning, control characters shown."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "\u2026") if text else "nothing"


def _tail(text: str, limit: int = 30) -> str:
    return repr("\u2026" + text[-limit:] if len(text) > limit else text)
