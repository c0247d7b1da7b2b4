"""Cut completions at the stop token, and assemble them into examples.

input   the texts of a row's trained turns and their ids, the stop ids
does    cuts each completion at the first stop; joins what `proof.py` has proved
output  Encoded: one sequence with several supervised spans where each later prompt extends the
        earlier turn token for token, else branches that share a prefix
"""

from __future__ import annotations

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
    """The encoding of one row.

    Attributes:
        examples: the examples, in the order of their first turn.
        parents: for each example, the example that it branches from; None for a root.
        shared: for each example, the length in tokens of the prefix that it shares with its parent.
        turns: for each example, the indices of the messages that it supervises.
        row: the location of the row.
        remarks: observations, one word each, repeated for each turn; `remarks.REMARKS` explains
            them.
        reasons: for each example, why it does not continue the previous one: the text of history
            that the template rewrote; "" for a root.
        route: how reasoning was passed to the template; "" for a row without reasoning.
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
    """How a turn is closed where the template writes no stop after it.

    Attributes:
        answer, call: the stop that is before the next user turn and before a tool's answer;
            None if the template writes none there either.
        own: the model's own end, for templates that close answers with nothing at all.
        bare: whether the template writes nothing but whitespace after a last answer.
    """

    answer: int | None = None
    call: int | None = None
    own: int | None = None
    bare: bool = False


@dataclass(frozen=True)
class Completion:
    """What a turn is trained on after its served prompt.

    Attributes:
        text: the turn.
        prompt: ids of the served prompt.
        ids: up to and with the first stop.
        body: the text of the ids without the stop.
        stop: the text of the stop; "" if there is none.
        remarks: see `Encoded.remarks`.
        error: where no stop ends it.
    """

    text: TurnText
    prompt: Sequence[int]
    ids: Sequence[int]
    body: str
    stop: str
    remarks: tuple[str, ...] = ()
    error: UnfaithfulTemplate | None = None

    @property
    def written(self) -> str:
        """What the template writes after the prompt, to the end of its text."""
        return self.text.through[len(self.text.prompt) :]


def complete(
    text: TurnText,
    message: Mapping[str, Any],
    ids_of: Mapping[str, list[int]],
    tokens: Tokens,
    stop_ids: Sequence[int],
    ends: Ends,
) -> Completion:
    """Ids of the answer up to and with the first stop."""
    prompt, through = ids_of[text.prompt], ids_of[text.through]
    seam = through[: len(prompt)] != prompt
    remarks = [*text.remarks, *(["seam"] if seam else [])]
    written = text.through[len(text.prompt) :]
    ids = through[len(prompt) :]
    # Some tokenizers put a space before whatever follows a special token.
    gained = bool(ids) and tokens.gains_space(prompt, ids[0], written)
    if seam or gained:
        ids = tokens.encode_completion(prompt, written)
    following = ends.call if message.get("tool_calls") else ends.answer
    at = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    error = None
    if at is not None:
        ids = ids[: at + 1]
    elif following is not None and following in stop_ids:
        ids = [*ids, following]
    elif ends.own is not None and ends.bare and not message.get("tool_calls"):
        ids, remarks = [*ids, ends.own], [*remarks, "stop-appended"]
    else:
        error = _unstopped(text.number, written, stop_ids, tokens)
    body = ids if error else ids[:-1]
    stop = "" if error else tokens.decode(ids[-1:])
    return Completion(
        text, prompt, ids, tokens.decode_after(prompt, body), stop, tuple(remarks), error
    )


def assemble(
    completions: Sequence[Completion],
    *,
    tokens: Tokens,
    loss_on: LossOn,
    row: str,
    route: str = "",
) -> Encoded:
    """Examples from the proved completions of one conversation."""
    examples: list[SFTExample] = []
    parents: list[int | None] = []
    shared: list[int] = []
    turns: list[list[int]] = []
    reasons: list[str] = []
    # Per example the length that it has in common with the last one.
    common: list[int] = []
    for completion in completions:
        prompt, ids = completion.prompt, [*completion.prompt, *completion.ids]
        last = examples[-1].ids if examples else []
        if examples and prompt[: len(last)] == last:
            context = [0] * (len(prompt) - len(last))
            mask = [*examples[-1].mask, *context, *([1] * len(completion.ids))]
            examples[-1] = SFTExample(ids, mask)
            turns[-1].append(completion.text.turn)
            common[-1] = len(ids)
            continue
        now = common_prefix(last, ids)
        # What leaves the last one earlier than the new one does leaves both in one place.
        common = [
            common_prefix(example.ids, ids) if before == now else min(before, now)
            for example, before in zip(examples, common, strict=True)
        ]
        best = max(range(len(common)), key=lambda i: (common[i], i), default=None)
        parents.append(best)
        shared.append(0 if best is None else common[best])
        reasons.append(
            "" if best is None else _rewriting(completion.text.number, last, prompt, tokens)
        )
        mask = [0] * len(prompt) + [1] * len(completion.ids)
        examples.append(SFTExample(ids, mask))
        common.append(len(ids))
        turns.append([completion.text.turn])
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
        tuple(remark for completion in completions for remark in completion.remarks),
        tuple(reasons),
        route,
    )


def _unstopped(
    turn: int, written: str, stop_ids: Sequence[int], tokens: Tokens
) -> UnfaithfulTemplate:
    stops = ", ".join(repr(tokens.decode([i])) for i in stop_ids) or "none at all"
    return UnfaithfulTemplate(
        f"the answer of message {turn} does not end with a stop token",
        why=f"the stop set is {stops}; after the answer the template writes {_tail(written)}",
        fix="set the token that ends an answer with --stop (with --add-token too if the vocabulary "
        "lacks it), or use a template that writes one",
        code="no-stop",
    )


def _rewriting(turn: int, last: Sequence[int], prompt: Sequence[int], tokens: Tokens) -> str:
    """Where a later prompt leaves the sequence before it."""
    at = common_prefix(last, prompt)
    before, now = tokens.decode(last[at : at + 24]), tokens.decode(prompt[at : at + 24])
    return (
        f"the prompt of message {turn} has {excerpt(now, 40)} where the sequence before it has "
        f"{excerpt(before, 40)}"
    )


def _tail(text: str, limit: int = 30) -> str:
    return repr("\u2026" + text[-limit:] if len(text) > limit else text)
