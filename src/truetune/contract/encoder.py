"""Rows to token examples: rendered and tokenized in batches, every trained turn proved.

input   conversations and what is served
does    asks for the served prompt and the rendering of each trained turn, a batch ahead of the
        tokenizer; if one reasoning route fails, the row tries the next
output  `Encoded`, or `Refused` with the reason, in the place of each row
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

from truetune.contract.behaviour import Behaviour
from truetune.contract.encode import Completion, Encoded, Ends, LossOn, assemble, complete
from truetune.contract.example import SFTExample
from truetune.contract.proof import Frame, Proof
from truetune.contract.render import Rendered, RenderJob
from truetune.contract.served import Served
from truetune.contract.shape import COMPOSED, shown, split_reasoning
from truetune.contract.stops import answer_stop, call_stop
from truetune.contract.turns import Situation, TurnText, derive, trained_turns
from truetune.contract.twin import Twin
from truetune.data.conversation import Conversation
from truetune.errors import UnfaithfulTemplate

CHUNK = 256  # rows rendered together

# Messages from which a row is not encoded twice: its prompts grow with its square.
_LONG_ROW = 20

# Refusals that another route for the reasoning may mend.
_ROUTE_ERRORS = frozenset(
    {
        "target-dropped",
        "target-invented",
        "target-behind-stop",
        "template-refuses",
        "prompt-differs",
        "no-stop",
        "thinking-only",
        "thinking-off",
    }
)


@dataclass(frozen=True)
class Refused:
    """A row without a faithful completion."""

    row: str
    error: UnfaithfulTemplate


@dataclass
class _Row:
    """A conversation that is being encoded, and the reasoning routes that have not been tried yet.

    Attributes:
        ways: (messages, route of their reasoning); the first is the one that is being tried.
        history: the messages as a client sends them back.
        past: the same messages as they are passed to the template.
        shortcut: whether a served prompt may replace the rendering of the turn before it.
    """

    conversation: Conversation
    turns: list[int]
    behaviour: Behaviour
    ways: list[tuple[list[dict[str, Any]], str]]
    shortcut: bool
    history: list[dict[str, Any]]
    past: list[dict[str, Any]]
    error: UnfaithfulTemplate | None = None
    result: Encoded | None = None
    texts: list[TurnText] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.ways[0][0]

    @property
    def route(self) -> str:
        return self.ways[0][1]

    @property
    def plain(self) -> bool:
        """Nothing but text in system, user and assistant turns, in that template's own history."""
        return (
            self.shortcut
            and self.behaviour.stable
            and not self.conversation.tools
            and self.route == "none"
            and not any(
                m.get("tool_calls") or m["role"] not in ("system", "user", "assistant")
                for m in self.messages
            )
        )


_Begun: TypeAlias = tuple[
    list["Encoded | Refused | _Row"], list[list[RenderJob]], Callable[[], list[Rendered]]
]


class Encoder:
    """Encodes rows under one contract."""

    def __init__(self, contract: Served) -> None:
        self.contract = contract
        self.policy, self.renderer = contract.policy, contract.renderer
        self._proof = Proof(contract.tokens)
        # Rows that were encoded while template arguments were chosen.
        self.kept: dict[tuple[str, str], tuple[Conversation, Encoded | Refused]] = {}

    def batches(
        self, conversations: Sequence[Conversation], loss_on: LossOn
    ) -> Iterator[list[Encoded | Refused]]:
        """The rows' outcomes, batch by batch, in order."""
        chunks = [conversations[i : i + CHUNK] for i in range(0, len(conversations), CHUNK)]
        # Templates are rendered in another process: the next chunk's, while this one is tokenized.
        with ThreadPoolExecutor(1) as ahead:
            begun = None
            for chunk in [*chunks, None]:
                next_one = self._begin(chunk, loss_on, ahead) if chunk is not None else None
                if begun is not None:
                    yield self._finish(*begun, loss_on)
                begun = next_one

    def few(
        self, conversations: Sequence[Conversation], loss_on: LossOn
    ) -> list[Encoded | Refused]:
        """The same in one batch, in this thread; long rows are remembered."""
        # What refuses a row mostly refuses its first answers, which are cheap to ask for.
        starts = [_beginning(c, loss_on) for c in conversations]
        tried = iter(self._at_once([start for start in starts if start], loss_on))
        made = [next(tried) if start else None for start in starts]
        left = [
            c
            for c, found in zip(conversations, made, strict=True)
            if not isinstance(found, Refused)
        ]
        whole = iter(self._at_once(left, loss_on))
        results = [found if isinstance(found, Refused) else next(whole) for found in made]
        for conversation, result in zip(conversations, results, strict=True):
            if len(conversation.messages) >= _LONG_ROW:
                self.kept[loss_on, conversation.where] = conversation, result
        return results

    def _at_once(
        self, conversations: Sequence[Conversation], loss_on: LossOn
    ) -> list[Encoded | Refused]:
        return self._finish(*self._begin(conversations, loss_on, None), loss_on)

    def _begin(
        self,
        conversations: Sequence[Conversation],
        loss_on: LossOn,
        ahead: ThreadPoolExecutor | None,
    ) -> _Begun:
        """Return what is known without rendering, the texts that the rows need, and a function that
        waits for them."""
        results: list[Encoded | Refused | _Row] = []
        for conversation in conversations:
            known = self.kept.get((loss_on, conversation.where))
            if known and known[0] == conversation:
                results.append(known[1])
                continue
            try:
                if conversation.text is not None:
                    results.append(self._encode_text(conversation))
                else:
                    results.append(self._row(conversation, loss_on))
            except UnfaithfulTemplate as error:
                results.append(refused(conversation, error))
        jobs = [self._jobs(row) for row in results if isinstance(row, _Row)]
        flat = [job for some in jobs for job in some]
        if ahead is None:
            return results, jobs, lambda: self.renderer.render_many(flat)
        return results, jobs, ahead.submit(self.renderer.render_many, flat).result

    def _finish(
        self,
        results: list[Encoded | Refused | _Row],
        jobs: list[list[RenderJob]],
        rendered: Callable[[], list[Rendered]],
        loss_on: LossOn,
    ) -> list[Encoded | Refused]:
        rows = [row for row in results if isinstance(row, _Row)]
        self._attempt(rows, jobs, rendered(), loss_on)
        while pending := [row for row in rows if row.result is None and row.ways]:
            jobs = [self._jobs(row) for row in pending]
            flat = [job for some in jobs for job in some]
            self._attempt(pending, jobs, self.renderer.render_many(flat), loss_on)
        return [_outcome(item) if isinstance(item, _Row) else item for item in results]

    def _row(self, conversation: Conversation, loss_on: LossOn) -> _Row:
        """Raises UnfaithfulTemplate if there is nothing to train."""
        contract, policy = self.contract, self.policy
        messages = contract.prepared(conversation.messages)
        turns = trained_turns(messages, loss_on)
        seen = contract.behaviour(conversation.template_kwargs)
        ways = [(messages, route) for route in policy.routes(seen, messages)]
        # Where the template has no place for a think block inside the content, it may have one for
        # the reasoning that the block holds.
        apart = [split_reasoning(message, seen.pairs) for message in messages]
        if apart != messages:
            ways += [(apart, route) for route in policy.routes(seen, apart)]
        history = policy.past(messages)
        past = contract.past(history, seen)
        return _Row(conversation, turns, seen, ways, self._closes_itself, history, past)

    def _attempt(
        self,
        rows: Sequence[_Row],
        jobs: Sequence[Sequence[RenderJob]],
        texts: Sequence[Rendered],
        loss_on: LossOn,
    ) -> None:
        """Tokenize and prove each row with its current reasoning route."""
        rendered = iter(texts)
        pairs: list[tuple[str, str]] = []
        for row, some in zip(rows, jobs, strict=True):
            made = [next(rendered) for _ in some]
            try:
                row.texts = self._turn_texts(row, made)
                pairs += [(turn.prompt, turn.through) for turn in row.texts]
            except UnfaithfulTemplate as error:
                _failed(row, error)
        ids_of = self.contract.tokens.encode_turns(pairs)
        tokens, stop_ids = self.contract.tokens, self.contract.stop_ids
        for row in rows:
            row.completions = [
                complete(text, row.messages[text.turn], ids_of, tokens, stop_ids, self._ends)
                for text in row.texts
            ]
        # One turn of each structure, then each in its own place, then with the row's own names.
        for each, named in ((False, False), (True, False), (True, True)):
            self._learn(rows, each=each, named=named)
        for row in rows:
            if not row.texts:
                continue
            merged = _merged(row)
            try:
                encoded = assemble(
                    [self._proved(row, completion) for completion in row.completions],
                    tokens=tokens,
                    loss_on=loss_on,
                    row=row.conversation.where,
                    route="" if row.route == "none" else row.route,
                )
                turns = tuple(tuple(t + merged for t in some) for some in encoded.turns)
                row.result = replace(
                    encoded, turns=turns, remarks=(*encoded.remarks, *self._differs(row))
                )
            except UnfaithfulTemplate as error:
                _failed(row, error)

    def _differs(self, row: _Row) -> list[str]:
        """A remark where what a later prompt holds depends on the server's reasoning parser."""
        thought = any(m.get("reasoning_content") for m in row.history[: row.turns[-1]])
        return ["history-parsed"] if thought and row.behaviour.parsed_differs else []

    def _proved(self, row: _Row, completion: Completion) -> Completion:
        found = self._proof.require(
            completion, row.messages[completion.text.turn], self._frame(row)
        )
        # Whitespace between a block in the content and the answer, where the two went apart.
        content = str(row.history[completion.text.turn].get("content") or "").strip()
        if content != str(row.messages[completion.text.turn].get("content") or "").strip() and (
            content not in completion.body
        ):
            found = [*found, "respaced"]
        return replace(completion, remarks=(*completion.remarks, *found)) if found else completion

    def _learn(self, rows: Sequence[_Row], *, each: bool, named: bool) -> None:
        """Render the twins of turns that cannot be judged yet.

        Args:
            each: whether every such turn is rendered, or one of each structure.
            named: whether names and keys stay, where the template wrote something else without.
        """
        asked: dict[tuple[str, str], tuple[_Row, TurnText, Twin]] = {}
        for row in rows:
            for done in row.completions:
                message = row.messages[done.text.turn]
                twin = self._proof.unproved(done, message, self._frame(row), named=named)
                if twin and (not named or message.get("tool_calls")):
                    place = (done.text.prompt, twin.keys[1]) if each else ("", twin.keys[0])
                    asked.setdefault(place, (row, done.text, twin))
        jobs = [
            self._through(row, text.turn, message)
            for row, text, twin in asked.values()
            for message in twin.variants
        ]
        rendered = iter(self.renderer.render_many(jobs))
        for row, text, twin in asked.values():
            texts = [self._behind(row, text, message, next(rendered)) for message in twin.variants]
            if texts[0] is not None:
                self._proof.learn(twin, texts)

    def _behind(
        self, row: _Row, text: TurnText, message: dict[str, Any], rendered: Rendered
    ) -> str | None:
        """What is after the served prompt where the turn is different; None for nothing."""
        if isinstance(rendered, UnfaithfulTemplate):
            return None
        turn, situation = text.turn, self._situation(row)
        try:
            made = derive(turn, message, row.history[turn - 1], text.prompt, rendered, situation)
        except UnfaithfulTemplate:
            return None
        return made.through[len(made.prompt) :]

    def _frame(self, row: _Row) -> Frame:
        seen, markers = row.behaviour, self.policy.markers(row.behaviour)
        marks = (markers.open, markers.close, *seen.marks)
        pairs = ((markers.open, markers.close), *seen.pairs)
        used = seen.pairs if row.route == "none" else pairs
        header = seen.headers[bool(row.conversation.tools)]
        keeps = self.policy.template_words == "keep"
        return Frame(marks, pairs, used, seen.recipient, header, keeps)

    def _jobs(self, row: _Row) -> list[RenderJob]:
        """The served prompt of each trained turn, and the rendering through it.

        Where the template is known to leave history as it was, the next served prompt holds the
        turn before it, and only the last turn is rendered for itself.
        """
        row.texts = []
        plain = row.plain
        tools, kwargs = row.conversation.tools, row.conversation.template_kwargs
        jobs = []
        for turn in row.turns:
            jobs.append(RenderJob(row.past[:turn], tools, prompt=True, arguments=kwargs))
            if plain and turn != row.turns[-1]:
                continue
            jobs.append(self._through(row, turn, row.messages[turn]))
        return jobs

    def _through(self, row: _Row, turn: int, message: dict[str, Any]) -> RenderJob:
        """The conversation through a turn, which may be another one than the row's."""
        route, markers, shape = row.route, self.policy.markers(row.behaviour), row.behaviour.shape
        how = "none" if route in COMPOSED else route
        return RenderJob(
            [*row.past[:turn], *shown([message], shape, how, markers)],
            row.conversation.tools,
            arguments=row.conversation.template_kwargs,
        )

    def _turn_texts(self, row: _Row, rendered: list[Rendered]) -> list[TurnText]:
        situation = self._situation(row)
        texts = []
        for text in rendered:
            if isinstance(text, UnfaithfulTemplate):
                raise text
            texts.append(text)
        if row.plain:
            # Each prompt is followed by the next one, the last by the whole.
            pairs = list(itertools.pairwise(texts))
        else:
            pairs = list(zip(texts[::2], texts[1::2], strict=True))
        made = [
            derive(turn, row.messages[turn], row.history[turn - 1], prompt, through, situation)
            for turn, (prompt, through) in zip(row.turns, pairs, strict=True)
        ]
        merged = situation.merged
        return [replace(text, merged=merged) for text in made] if merged else made

    def _situation(self, row: _Row) -> Situation:
        return Situation(
            row.behaviour,
            row.route,
            self.policy.markers(row.behaviour),
            self.policy.reasoning == "empty",
            _merged(row),
            lambda: self.contract.is_switched(row.conversation.template_kwargs),
        )

    def _encode_text(self, conversation: Conversation) -> Encoded:
        """Plain text: every token trained, closed by the tokenizer's end token."""
        tokenizer = self.contract.tokenizer
        ids = list(tokenizer(conversation.text, verbose=False)["input_ids"])
        end = tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        example = SFTExample(ids, [1] * len(ids))
        return Encoded((example,), (None,), (0,), ((),), conversation.where)

    @cached_property
    def _ends(self) -> Ends:
        contract = self.contract
        seen, tokens, stop_ids = contract.behaviour(), contract.tokens, contract.stop_ids
        return Ends(
            answer_stop(seen, tokens, stop_ids),
            call_stop(seen, tokens, stop_ids),
            stop_ids[0] if stop_ids else None,
            not seen.answer_end[0].strip(),
        )

    @cached_property
    def _closes_itself(self) -> bool:
        """Whether a stop is after a last answer, so that history holds it as well."""
        tail = self.contract.behaviour().answer_end[0]
        ids = self.contract.tokens.encode([tail])[0] if tail else []
        return any(token in self.contract.stop_ids for token in ids)


def _beginning(conversation: Conversation, loss_on: LossOn) -> Conversation | None:
    """A long row through its second answer; None for a short one."""
    messages = conversation.messages
    if len(messages) < _LONG_ROW or loss_on == "last":
        return None
    with contextlib.suppress(UnfaithfulTemplate):
        turns = trained_turns(messages, loss_on)
        if len(turns) > 2:
            return replace(conversation, messages=messages[: turns[1] + 1])
    return None


def _merged(row: _Row) -> int:
    """Return by how many messages merging the system turn into a question shortens the
    conversation."""
    return len(row.conversation.messages) - len(row.messages)


def _failed(row: _Row, error: UnfaithfulTemplate) -> None:
    """Keep the first reason: later routes are less likely."""
    row.texts, row.completions = [], []
    if row.plain and len(row.turns) > 1:
        row.shortcut = False  # this row's history may be rewritten where others' is not
        return
    row.error = row.error or error
    row.ways = row.ways[1:] if error.code in _ROUTE_ERRORS else []


def _outcome(row: _Row) -> Encoded | Refused:
    if row.result is not None:
        return row.result
    assert row.error
    return refused(row.conversation, row.error)


def refused(conversation: Conversation, error: UnfaithfulTemplate) -> Refused:
    """With the row's place in the error."""
    if conversation.where:
        where = f"{conversation.where}{', ' + error.where if error.where else ''}"
        error = UnfaithfulTemplate(**{**error.words, "where": where})
    return Refused(conversation.where, error)


@dataclass(frozen=True, eq=False)
class Encoding(Served):
    """What is served, with the encoder that keeps what it has seen."""

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self)
