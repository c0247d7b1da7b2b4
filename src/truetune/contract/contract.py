"""PromptContract: template, tokenizer, stop set and template arguments as one value.

It owns the central equation: for each trained assistant turn t,

    prompt_ids(messages[:t]) + completion(t)  ==  the ids the model is trained on through turn t
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from truetune.contract import sandbox
from truetune.contract.behaviour import Behaviour, answer, observe, tail_of, user
from truetune.contract.builtin import DEFAULT, NAMES, builtin_template
from truetune.contract.encode import LOSS_ON, Encoded, Ends, LossOn, assemble
from truetune.contract.example import SFTExample
from truetune.contract.policy import Policy
from truetune.contract.render import Job, Rendered, Renderer
from truetune.contract.shape import COMPOSED, Markers, canonical, shown, split_reasoning
from truetune.contract.stops import answer_stop, call_stop, own_stop_ids, stop_set
from truetune.contract.tokens import Tokens
from truetune.contract.turns import Situation, TurnText, derive, trained_turns
from truetune.data.conversation import Conversation
from truetune.data.rows import BadRow
from truetune.data.tools import tools_of
from truetune.errors import UnfaithfulTemplate, UsageError
from truetune.findings import Finding

Messages: TypeAlias = Sequence[Mapping[str, Any]]
ToolList: TypeAlias = Sequence[Mapping[str, Any]]

_CHUNK = 256
# Rows looked at when template arguments are chosen: enough to see every kind of row, cheap.
_FIT_ROWS = 200
# Values of one argument that are tried, and values in all: each is tried on the sample of rows.
_MOST_CHOICES, _MOST_CANDIDATES = 8, 32
# Refusals that another route for the reasoning may mend.
_ROUTE_ERRORS = frozenset(
    {
        "target-dropped",
        "target-behind-stop",
        "template-refuses",
        "prompt-differs",
        "no-stop",
        "thinking-only",
        "thinking-off",
    }
)
# Refusals that a template argument may mend.
_ARGUMENT_ERRORS = frozenset({"target-invented", "target-dropped", "thinking-only", "thinking-off"})


@dataclass(frozen=True)
class Refused:
    """A row without a faithful completion."""

    row: str
    error: UnfaithfulTemplate


@dataclass
class _Row:
    """A conversation on its way to examples, and the ways for it that are not tried yet.

    Attributes:
        ways: (messages, route of their reasoning); the first is the one in hand.
        shortcut: whether a served prompt may stand for the rendering of the turn before it.
    """

    conversation: Conversation
    turns: list[int]
    behaviour: Behaviour
    ways: list[tuple[list[dict[str, Any]], str]]
    shortcut: bool
    error: UnfaithfulTemplate | None = None
    result: Encoded | None = None
    texts: list[TurnText] = field(default_factory=list)

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


@dataclass(frozen=True, eq=False)
class PromptContract:
    """How prompts are made and where answers end, for training, chat and serving alike.

    Make one with `load`, then choose its template arguments on the rows with `fit`.

    Attributes:
        tokenizer: a transformers tokenizer.
        chat_template: Jinja source.
        stop_ids: ids on which a server ends an answer, the model's own first.
        template_kwargs: template arguments of the run.
        origin: where the template came from, in words.
        findings: what was decided on the way and must be told.
        explicit_kwargs: whether somebody set template arguments; those stay.
        tool_template: Jinja source for conversations with tools, where the model has another.
        policy: what happens to rows that the template has no place for.
        date: ISO date that templates take for today; None where they do not ask.
    """

    tokenizer: Any
    chat_template: str
    stop_ids: tuple[int, ...]
    template_kwargs: dict[str, Any]
    origin: str
    findings: tuple[Finding, ...] = ()
    explicit_kwargs: bool = False
    tool_template: str | None = None
    policy: Policy = field(default_factory=Policy)
    date: str | None = None

    @classmethod
    def load(
        cls,
        source: str | Path | Any,
        chat_template: str | None = None,
        stop: str | Sequence[str | int] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        revision: str | None = None,
        policy: Policy | None = None,
        date: str | None = None,
    ) -> PromptContract:
        """A contract for a model folder, a Hub id or a tokenizer.

        Args:
            source: folder, Hub id, or a loaded tokenizer.
            chat_template: a built-in name, the name of one of the model's own, a file with Jinja,
                or Jinja source; None takes the tokenizer's own, or the built-in
                Instruction/Response where it has none.
            stop: None or "auto", or tokens to add to the model's own stop set.
            template_kwargs: template arguments; None leaves them to `fit`.
            revision: of a Hub id.
            policy: see `Policy`.
            date: ISO date for templates that write today's; None is today.

        Raises:
            UsageError: a template or stop token that does not exist.
            UnfaithfulTemplate: the template is not valid Jinja.
        """
        sandbox.start()
        if isinstance(source, str | Path):
            from transformers import AutoTokenizer

            name: str | None = str(source)
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        else:
            tokenizer = source
            name = str(getattr(tokenizer, "name_or_path", "") or "") or None
        text, tool_text, origin = _template(chat_template, tokenizer)
        kwargs = dict(template_kwargs or {})
        # A tokenizer that was handed over has its model's files at hand or not: no download.
        own = own_stop_ids(name, revision, tokenizer, local_only=tokenizer is source)
        made = cls(
            tokenizer,
            text,
            own,
            kwargs,
            origin,
            explicit_kwargs=template_kwargs is not None,
            tool_template=tool_text,
            policy=policy or Policy(),
            date=date,
        )
        made.renderer.require_valid()
        stops = stop_set(own, stop, made.behaviour(), made.tokens)
        findings = list(stops.findings)
        if made.renderer.reads_date:
            made = replace(made, date=made.renderer.today)
            findings.append(_dated(made.renderer.today, given=date is not None))
        return replace(made, stop_ids=stops.ids, findings=tuple(findings))

    @classmethod
    def of_record(cls, source: str | Path | Any, record: Mapping[str, Any]) -> PromptContract:
        """The contract of a saved tokenizer under the decisions of the run that saved it.

        Args:
            source: as in `load`; its template has the run's arguments as defaults.
            record: what contract.json holds (`as_dict`), or {}.
        """
        given = record.get("template_kwargs_given", False)
        return cls.load(
            source,
            template_kwargs=record.get("template_kwargs") if given else None,
            policy=Policy.from_dict(record.get("policy") or {}),
            date=record.get("date"),
        )

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(self.tokenizer)

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(
            self.chat_template,
            _special(self.tokenizer),
            self.template_kwargs,
            self.tool_template,
            self.date,
        )

    def behaviour(self, template_kwargs: Mapping[str, Any] | None = None) -> Behaviour:
        """What the template does under the run's arguments and those of a row."""
        key = json.dumps(template_kwargs or {}, sort_keys=True, default=repr)
        if key not in self._behaviours:
            self._behaviours[key] = observe(self.renderer, template_kwargs, self.tokens.added_texts)
        return self._behaviours[key]

    @cached_property
    def _behaviours(self) -> dict[str, Behaviour]:
        return {}

    @cached_property
    def _ends(self) -> Ends:
        seen, tokens = self.behaviour(), self.tokens
        own = self.stop_ids[0] if self.stop_ids else None
        return Ends(
            answer_stop(seen, tokens, self.stop_ids),
            call_stop(seen, tokens, self.stop_ids),
            own,
            seen.lead,
            not seen.answer_end[0].strip(),
        )

    @cached_property
    def _closes_itself(self) -> bool:
        """Whether a stop stands behind a last answer, so that history holds it as well."""
        tail = self.behaviour().answer_end[0]
        ids = self.tokens.encode([tail])[0] if tail else []
        return any(token in self.stop_ids for token in ids)

    def fit(
        self,
        conversations: Iterable[Messages | Conversation],
        tools: ToolList | None = None,
        *,
        loss_on: LossOn = "assistant",
    ) -> PromptContract:
        """A contract with template arguments under which these conversations fit.

        No argument is tried first; then each value of an argument that the template reads and that
        changes a served prompt. The first value that takes the most of the rows wins. Arguments
        given explicitly stay.
        """
        sample = [_conversation(c, tools) for c in _spread(list(conversations), _FIT_ROWS)]
        sample = [c for c in sample if c.text is None]
        if (self.explicit_kwargs and not self.template_kwargs) or not sample:
            return self
        # The template's own way comes before a block that is closed by hand.
        policy = (
            replace(self.policy, reasoning="auto") if self.policy.reasoning == "empty" else None
        )
        trial = replace(self, policy=policy) if policy else self
        pairs = self.behaviour().pairs
        plain = not any(
            split_reasoning(m, pairs).get("reasoning_content")
            for c in sample
            for m in trial._prepared(c.messages)
        )
        hybrid = plain and not self.behaviour().closed
        best, best_refused = self.template_kwargs, trial._num_refused(sample, loss_on)
        for kwargs in self._candidates() if best_refused or hybrid else []:
            candidate = trial._with_arguments({**self.template_kwargs, **kwargs})
            # A row without reasoning takes the form in which the template does not think.
            switched_off = hybrid and bool(candidate.behaviour().closed)
            if not (best_refused or switched_off):
                continue
            refused = candidate._num_refused(sample, loss_on)
            if refused < best_refused or (switched_off and not refused):
                best, best_refused = candidate.template_kwargs, refused
                hybrid = hybrid and not switched_off
            if best_refused == 0 and not hybrid:
                break
        if best == self.template_kwargs:
            return self
        chosen = {k: v for k, v in best.items() if k not in self.template_kwargs}
        note = Finding(
            code="template-argument",
            level="note",
            what=f"the template argument {json.dumps(chosen)} was chosen: under it the rows fit as "
            "they are",
            why="without it the template adds or drops something in the answers",
            fix="nothing to do: it is written into the saved template as its default",
        )
        return replace(self._with_arguments(best), findings=(*self.findings, note))

    def prompt_text(
        self,
        messages: Messages,
        tools: ToolList | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """What an inference server sends for these messages, as text."""
        listed = self._prepared(messages)
        seen = self.behaviour(template_kwargs)
        if self.policy.history == "no-reasoning":
            listed = _without_reasoning(listed)
        route = self._routes(seen, listed)[0]
        return self.renderer.render(
            shown(listed, seen.shape, route, self._markers(seen)),
            tools=_tools(tools),
            add_generation_prompt=True,
            arguments=template_kwargs,
        )

    def prompt_ids(
        self,
        messages: Messages,
        tools: ToolList | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """What an inference server sends for these messages, as ids.

        Raises:
            UnfaithfulTemplate: the template refuses the messages.
        """
        return self.tokens.encode([self.prompt_text(messages, tools, template_kwargs)])[0]

    def encode(
        self,
        messages: Messages | Conversation,
        tools: ToolList | None = None,
        *,
        loss_on: LossOn = "assistant",
    ) -> Encoded:
        """The token examples of one conversation, every trained turn proved.

        Raises:
            UnfaithfulTemplate: no faithful completion exists; it says why.
        """
        conversation = _conversation(messages, tools)
        (result,) = self.encode_all([conversation], loss_on=loss_on)
        if isinstance(result, Refused):
            raise result.error
        return result

    def encode_all(
        self,
        conversations: Sequence[Conversation],
        *,
        loss_on: LossOn = "assistant",
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Encoded | Refused]:
        """Encode many rows in batches; a refused row is a value, in its place.

        Args:
            conversations: chat rows or plain text.
            loss_on: assistant, last or all.
            on_progress: called with the number of rows done so far.

        Raises:
            ValueError: another loss_on.
        """
        if loss_on not in LOSS_ON:
            raise ValueError(f"unknown loss_on {loss_on!r}; known: {', '.join(LOSS_ON)}")
        results: list[Encoded | Refused] = []
        chunks = [conversations[i : i + _CHUNK] for i in range(0, len(conversations), _CHUNK)]
        # Templates are rendered in another process: the next chunk's, while this one is tokenized.
        with ThreadPoolExecutor(1) as ahead:
            begun = None
            for chunk in [*chunks, None]:
                next_one = self._begin(chunk, loss_on, ahead) if chunk is not None else None
                if begun is not None:
                    results += self._finish(*begun, loss_on)
                    if on_progress:
                        on_progress(len(results))
                begun = next_one
        return self._with_advice(conversations, results, loss_on)

    def _with_advice(
        self,
        conversations: Sequence[Conversation],
        results: list[Encoded | Refused],
        loss_on: LossOn,
    ) -> list[Encoded | Refused]:
        """Name the template argument that would take a refused row, found on the first of each
        kind."""
        advice: dict[str, str] = {}
        for index, result in enumerate(results):
            if not isinstance(result, Refused) or result.error.code not in _ARGUMENT_ERRORS:
                continue
            code = result.error.code
            if code not in advice:
                advice[code] = self._argument_for(conversations[index], loss_on)
            if advice[code]:
                results[index] = replace(result, error=_advised(result.error, advice[code]))
        return results

    def _argument_for(self, conversation: Conversation, loss_on: LossOn) -> str:
        for kwargs in self._changing(self.renderer.variables()):
            candidate = self._with_arguments({**self.template_kwargs, **kwargs})
            (result,) = candidate._encode_chunk([conversation], loss_on)
            if kwargs and isinstance(result, Encoded):
                return " ".join(f"{name}={json.dumps(value)}" for name, value in kwargs.items())
        return ""

    def _encode_chunk(
        self, conversations: Sequence[Conversation], loss_on: LossOn
    ) -> list[Encoded | Refused]:
        return self._finish(*self._begin(conversations, loss_on, None), loss_on)

    def _begin(
        self,
        conversations: Sequence[Conversation],
        loss_on: LossOn,
        ahead: ThreadPoolExecutor | None,
    ) -> tuple[list[Encoded | Refused | _Row], list[list[Job]], Callable[[], list[Rendered]]]:
        """What is known without rendering, the texts that the rows ask for, and a way to wait for
        them."""
        results: list[Encoded | Refused | _Row] = []
        for conversation in conversations:
            try:
                if conversation.text is not None:
                    results.append(self._encode_text(conversation))
                else:
                    results.append(self._row(conversation, loss_on))
            except UnfaithfulTemplate as error:
                results.append(_refused(conversation, error))
        jobs = [self._jobs(row) for row in results if isinstance(row, _Row)]
        flat = [job for some in jobs for job in some]
        if ahead is None:
            return results, jobs, lambda: self.renderer.render_many(flat)
        return results, jobs, ahead.submit(self.renderer.render_many, flat).result

    def _finish(
        self,
        results: list[Encoded | Refused | _Row],
        jobs: list[list[Job]],
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
        """Raises UnfaithfulTemplate where there is nothing to train."""
        messages = self._prepared(conversation.messages)
        turns = trained_turns(messages, loss_on)
        seen = self.behaviour(conversation.template_kwargs)
        ways = [(messages, route) for route in self._routes(seen, messages)]
        # Where the template has no place for a think block inside the content, it may have one for
        # the reasoning that the block holds.
        apart = [split_reasoning(message, seen.pairs) for message in messages]
        if apart != messages:
            ways += [(apart, route) for route in self._routes(seen, apart)]
        return _Row(conversation, turns, seen, ways, self._closes_itself)

    def _prepared(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages in their one form, under the run's policy."""
        made = [canonical(message) for message in messages]
        if self.policy.reasoning == "drop":
            # Reasoning stands in the content too, between the template's markers or the usual ones.
            pairs = (*self.behaviour().pairs, (Markers().open, Markers().close))
            made = _without_reasoning([split_reasoning(message, pairs) for message in made])
        return _merged_system(made) if self.policy.system == "merge" else made

    def _routes(self, seen: Behaviour, messages: Messages) -> tuple[str, ...]:
        """The ways for the reasoning of a conversation, in the order tried."""
        if not any(message.get("reasoning_content") for message in messages):
            return ("none",)
        if self.policy.reasoning == "inline":
            return ("inline",)
        return seen.routes or ("reasoning_content",)

    def _markers(self, seen: Behaviour) -> Markers:
        asked = self.policy.think_markers
        if asked:
            opening, closing = asked
            return Markers(opening, closing, f"{opening}\n", f"\n{closing}\n\n")
        return seen.markers or Markers()

    def _attempt(
        self,
        rows: Sequence[_Row],
        jobs: Sequence[Sequence[Job]],
        texts: Sequence[Rendered],
        loss_on: LossOn,
    ) -> None:
        """Tokenize and prove each row by the way that it has in hand."""
        rendered = iter(texts)
        pairs: list[tuple[str, str]] = []
        for row, some in zip(rows, jobs, strict=True):
            made = [next(rendered) for _ in some]
            try:
                row.texts = self._turn_texts(row, made)
                pairs += [(turn.prompt, turn.through) for turn in row.texts]
            except UnfaithfulTemplate as error:
                _failed(row, error)
        ids_of = self.tokens.encode_turns(pairs)
        for row in rows:
            if not row.texts:
                continue
            # Merged turns are counted as the row counts them.
            merged = len(row.conversation.messages) - len(row.messages)
            try:
                encoded = assemble(
                    row.texts,
                    ids_of,
                    row.messages,
                    tokens=self.tokens,
                    stop_ids=self.stop_ids,
                    ends=self._ends,
                    loss_on=loss_on,
                    row=row.conversation.where,
                    route="" if row.route == "none" else row.route,
                )
                turns = tuple(tuple(t + merged for t in some) for some in encoded.turns)
                row.result = replace(encoded, turns=turns)
            except UnfaithfulTemplate as error:
                _failed(row, error)

    def _jobs(self, row: _Row) -> list[Job]:
        """The served prompt of each trained turn, and the rendering through it.

        Where the template is known to leave history as it was, the next served prompt holds the
        turn before it, and only the last turn is rendered for itself.
        """
        row.texts = []
        route, markers = row.route, self._markers(row.behaviour)
        tools, kwargs = row.conversation.tools, row.conversation.template_kwargs
        jobs = []
        for turn in row.turns:
            history, own = row.messages[:turn], row.messages[turn]
            if self.policy.history == "no-reasoning":
                history = _without_reasoning(history)
            before = shown(history, row.behaviour.shape, route, markers)
            jobs.append(Job(before, tools, prompt=True, arguments=kwargs))
            if row.plain and turn != row.turns[-1]:
                continue
            how = "none" if route in COMPOSED else route
            whole = [*before, *shown([own], row.behaviour.shape, how, markers)]
            jobs.append(Job(whole, tools, arguments=kwargs))
        return jobs

    def _turn_texts(self, row: _Row, rendered: list[Rendered]) -> list[TurnText]:
        situation = Situation(
            row.behaviour,
            row.route,
            self._markers(row.behaviour),
            self.policy.reasoning == "empty",
            lambda: self._switched(row.conversation.template_kwargs),
        )
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
        return [
            derive(turn, row.messages[turn], row.messages[turn - 1], prompt, through, situation)
            for turn, (prompt, through) in zip(row.turns, pairs, strict=True)
        ]

    def _switched(self, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether an argument that changes served prompts was set by hand."""
        given = {*(self.template_kwargs if self.explicit_kwargs else ()), *template_kwargs}
        return any(name in given for name in self._switches)

    def _encode_text(self, conversation: Conversation) -> Encoded:
        """Plain text: every token trained, closed by the tokenizer's end token."""
        ids = list(self.tokenizer(conversation.text, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        example = SFTExample(ids, [1] * len(ids))
        return Encoded((example,), (None,), (0,), ((),), conversation.where)

    def saved_template(self) -> str | dict[str, str]:
        """The template with the run's arguments as its defaults, for the saved tokenizer.

        A server that passes no argument then renders what was trained; one that does wins. A model
        with a template of its own for tools keeps both, by their names.
        """
        if self.tool_template is None:
            return self._with_defaults(self.chat_template)
        return {
            "default": self._with_defaults(self.chat_template),
            "tool_use": self._with_defaults(self.tool_template),
        }

    def _with_defaults(self, source: str) -> str:
        defaults = [
            f"{{%- if {name} is not defined -%}}{{%- set {name} = {_jinja(value)} -%}}"
            # A line of its own: the renderer drops the line break after a block and nothing else,
            # so that the template's own beginning stays as it is.
            "{%- endif %}\n"
            for name, value in sorted(self.template_kwargs.items())
        ]
        return "".join(defaults) + source

    def fingerprint(self) -> str:
        """sha256 over template, arguments, stop ids and the tokenizer's own serialisation."""
        # A call that padded or cut leaves that setting in the tokenizer; this one takes it out.
        self.tokens.encode(["a"])
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab())
        saved = self.saved_template()
        template = saved if isinstance(saved, str) else json.dumps(saved, sort_keys=True)
        parts = [template, json.dumps(sorted(self.stop_ids)), vocabulary]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """What contract.json holds."""
        return {
            "fingerprint": self.fingerprint(),
            "template": {
                "origin": self.origin,
                "source": self.chat_template,
                **({"tool_use": self.tool_template} if self.tool_template else {}),
            },
            "template_kwargs": self.template_kwargs,
            "template_kwargs_given": self.explicit_kwargs,
            "policy": self.policy.as_dict(),
            "date": self.date,
            "stop": [{"id": i, "token": self.tokens.decode([i])} for i in self.stop_ids],
            "tokenizer": {
                "class": type(self.tokenizer).__name__,
                "size": len(self.tokenizer),
                "bos": self.tokenizer.bos_token,
                "eos": self.tokenizer.eos_token,
                "pad": self.tokenizer.pad_token,
            },
        }

    @property
    def pad_id(self) -> int:
        """An id to fill rows with; masks are made from lengths, so any id serves."""
        if self.tokenizer.pad_token_id is not None:
            return int(self.tokenizer.pad_token_id)
        return int(self.stop_ids[0]) if self.stop_ids else 0

    def _with_arguments(self, kwargs: Mapping[str, Any]) -> PromptContract:
        return replace(self, template_kwargs=dict(kwargs))

    def _num_refused(self, sample: Sequence[Conversation], loss_on: LossOn) -> int:
        return sum(isinstance(result, Refused) for result in self._encode_chunk(sample, loss_on))

    def _candidates(self) -> list[dict[str, Any]]:
        """Values of arguments that change a served prompt, those set by hand left out."""
        names = [n for n in self.renderer.variables() if n not in self.template_kwargs]
        return [kwargs for kwargs in self._changing(names) if kwargs]

    @cached_property
    def _switches(self) -> frozenset[str]:
        """Names of arguments, set or not, that open or close the think block of a prompt."""
        pairs = self.behaviour().pairs
        found = set()
        for name in self.renderer.variables():
            texts = self._served([{name: value} for value in self._values(name)], [user("?")])
            tails = {tail_of(text, pairs)[:2] for text in texts if text}
            if len(tails) > 1:
                found.add(name)
        return frozenset(found)

    def _values(self, name: str) -> list[Any]:
        choices = self.renderer.choices(name)[:_MOST_CHOICES]
        return [False, True, *(c for c in choices if not isinstance(c, bool))]

    def _served(self, tried: Sequence[Mapping[str, Any]], messages: Messages) -> list[str]:
        """The served prompt under each set of arguments, "" where the template refuses."""
        made = self.renderer.render_many([Job(messages, prompt=True, arguments=k) for k in tried])
        return [text if isinstance(text, str) else "" for text in made]

    def _changing(self, names: Iterable[str]) -> list[dict[str, Any]]:
        tried: list[dict[str, Any]] = [{}]
        tried += [{name: value} for name in names for value in self._values(name)]
        tried = tried[: _MOST_CANDIDATES + 1]
        first = self._served(tried, [user("?")])
        second = self._served(tried, [user("?"), answer("!"), user("?")])
        seen: set[tuple[str, str]] = set()
        found = []
        for kwargs, *texts in zip(tried, first, second, strict=True):
            key = (texts[0], texts[1])
            if any(key) and key not in seen:
                found.append(kwargs)
            seen.add(key)
        return found


def _failed(row: _Row, error: UnfaithfulTemplate) -> None:
    """Keep the first reason: the later ways are the less likely ones."""
    row.texts = []
    if row.plain and len(row.turns) > 1:
        row.shortcut = False  # this row's history may be rewritten where others' is not
        return
    row.error = row.error or error
    row.ways = row.ways[1:] if error.code in _ROUTE_ERRORS else []


def _outcome(row: _Row) -> Encoded | Refused:
    if row.result is not None:
        return row.result
    assert row.error
    return _refused(row.conversation, row.error)


def _without_reasoning(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]


def _merged_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A first system turn put in front of the first user turn, as its text."""
    if len(messages) < 2 or messages[0]["role"] not in ("system", "developer"):
        return messages
    if messages[1]["role"] != "user":
        return messages
    text = f"{messages[0]['content']}\n\n{messages[1]['content']}".strip()
    return [{**messages[1], "content": text}, *messages[2:]]


def _dated(today: str, *, given: bool) -> Finding:
    return Finding(
        code="template-date",
        level="note",
        what=f"the template writes the date into prompts; here it is always {today}",
        why="otherwise the same rows would be trained differently on another day; a server writes "
        "the day on which it is asked",
        fix="nothing to do" if given else "set it with --date YYYY-MM-DD",
    )


def _template(asked: str | None, tokenizer: Any) -> tuple[str, str | None, str]:
    """(Jinja source, the source for conversations with tools or None, where they came from)."""
    own = getattr(tokenizer, "chat_template", None)
    named = dict(own) if isinstance(own, Mapping) else {}
    if asked is None or asked == "auto":
        if named and "default" not in named and len(named) > 1:
            raise UsageError(
                "the model has several chat templates and none is its default",
                fix="name one with --chat-template: " + ", ".join(sorted(named)),
                code="no-default-template",
            )
        if named:
            # A server takes the one for tools where tools are offered.
            first = named.get("default") or next(iter(named.values()))
            tools = named.get("tool_use") if "default" in named else None
            return str(first), tools, "the model's own"
        if own:
            return str(own), None, "the model's own"
        return builtin_template(DEFAULT, tokenizer), None, f"built-in {DEFAULT}: the model has none"
    if asked in named:
        return str(named[asked]), None, f"the model's own, named {asked}"
    if asked in NAMES:
        return builtin_template(asked, tokenizer), None, f"built-in {asked}"
    if "{%" in asked or "{{" in asked:
        return asked, None, "given as source"
    path = Path(asked)
    if path.is_file():
        return path.read_text(encoding="utf-8"), None, f"file {asked}"
    raise UsageError(
        f"--chat-template {asked!r} is neither a file nor a built-in template",
        fix="name a .jinja file, or one of: " + ", ".join([*NAMES, *sorted(named)]),
        code="no-such-template",
    )


def _special(tokenizer: Any) -> dict[str, Any]:
    return {name: value for name, value in tokenizer.special_tokens_map.items() if value}


def _conversation(value: Messages | Conversation, tools: ToolList | None) -> Conversation:
    if isinstance(value, Conversation):
        return value if tools is None else replace(value, tools=_tools(tools))
    return Conversation(tuple(map(dict, value)), where="", tools=_tools(tools))


def _tools(tools: ToolList | None) -> tuple[dict[str, Any], ...] | None:
    """Schemas as rows have them: a bare function is wrapped.

    Raises:
        UnfaithfulTemplate: one has no name.
    """
    try:
        return tools_of([dict(tool) for tool in tools]) if tools is not None else None
    except BadRow as error:
        raise UnfaithfulTemplate(error.what, fix=error.fix, code=error.code) from error


def _advised(error: UnfaithfulTemplate, argument: str) -> UnfaithfulTemplate:
    fix = (
        f"--template-arg {argument} would take this row; a row may also carry its own "
        "chat_template_kwargs"
    )
    return UnfaithfulTemplate(
        error.what, where=error.where, why=error.why, fix=fix, code=error.code
    )


def _refused(conversation: Conversation, error: UnfaithfulTemplate) -> Refused:
    if conversation.where:
        where = f"{conversation.where}{', ' + error.where if error.where else ''}"
        error = UnfaithfulTemplate(
            error.what, where=where, why=error.why, fix=error.fix, code=error.code
        )
    return Refused(conversation.where, error)


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` items, evenly over the list."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]


def _jinja(value: Any) -> str:
    """A JSON value as a Jinja literal, with the lower-case constants that every engine knows."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_jinja(k)}: {_jinja(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_jinja, value)) + "]"
    # Jinja reads an escaped surrogate pair as two characters: nothing is escaped that need not be.
    return json.dumps(value, ensure_ascii=False)
