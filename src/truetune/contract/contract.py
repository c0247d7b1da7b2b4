"""PromptContract: template, tokenizer, stop set and template arguments as one value.

It owns the central equation: for each trained assistant turn t,

    prompt_ids(messages[:t]) + completion(t)  ==  the ids the model is trained on through turn t
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from truetune.contract.builtin import DEFAULT, NAMES, builtin_template
from truetune.contract.encode import LOSS_ON, Encoded, LossOn, assemble, trained_turns, turn_texts
from truetune.contract.example import SFTExample
from truetune.contract.render import Renderer
from truetune.contract.stops import own_stop_ids, stop_set
from truetune.contract.tokens import Tokens
from truetune.data.conversation import Conversation
from truetune.errors import UnfaithfulTemplate, UsageError
from truetune.findings import Finding

Messages: TypeAlias = Sequence[Mapping[str, Any]]
ToolList: TypeAlias = Sequence[Mapping[str, Any]]

_CHUNK = 256
# Rows looked at when template arguments are chosen: enough to see every kind of row, cheap.
_FIT_ROWS = 200


@dataclass(frozen=True)
class Refused:
    """A row without a faithful completion."""

    row: str
    error: UnfaithfulTemplate


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
    """

    tokenizer: Any
    chat_template: str
    stop_ids: tuple[int, ...]
    template_kwargs: dict[str, Any]
    origin: str
    findings: tuple[Finding, ...] = ()
    explicit_kwargs: bool = False

    @classmethod
    def load(
        cls,
        source: str | Path | Any,
        chat_template: str | None = None,
        stop: str | Sequence[str | int] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        revision: str | None = None,
    ) -> PromptContract:
        """A contract for a model folder, a Hub id or a tokenizer.

        Args:
            source: folder, Hub id, or a loaded tokenizer.
            chat_template: a built-in name, a file with Jinja, or Jinja source; None takes the
                tokenizer's own, or the built-in Instruction/Response where it has none.
            stop: None or "auto", or tokens to add to the model's own stop set.
            template_kwargs: template arguments; None leaves them to `fit`.
            revision: of a Hub id.

        Raises:
            UsageError: a template or stop token that does not exist.
            UnfaithfulTemplate: the template is not valid Jinja.
        """
        if isinstance(source, str | Path):
            from transformers import AutoTokenizer

            name: str | None = str(source)
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        else:
            tokenizer = source
            name = str(getattr(tokenizer, "name_or_path", "") or "") or None
        text, origin = _template(chat_template, tokenizer)
        kwargs = dict(template_kwargs or {})
        # A tokenizer that was handed over has its model's files at hand or not: no download.
        own = own_stop_ids(name, revision, tokenizer, local_only=tokenizer is source)
        tokens = Tokens(tokenizer)
        renderer = Renderer(text, _special(tokenizer), kwargs)
        renderer.require_valid()
        stops = stop_set(own, stop, renderer, tokens)
        return cls(
            tokenizer, text, stops.ids, kwargs, origin, stops.findings, template_kwargs is not None
        )

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(self.tokenizer)

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.chat_template, _special(self.tokenizer), self.template_kwargs)

    def fit(
        self,
        conversations: Iterable[Messages | Conversation],
        tools: ToolList | None = None,
    ) -> PromptContract:
        """A contract with template arguments under which these conversations fit.

        No argument is tried first; then each boolean that the template reads and that changes a
        served prompt. The first value that takes the most of the rows wins. Arguments given
        explicitly stay.
        """
        sample = [_conversation(c, tools) for c in _spread(list(conversations), _FIT_ROWS)]
        sample = [c for c in sample if c.text is None]
        if self.explicit_kwargs or not sample:
            return self
        best, best_refused = self, self._num_refused(sample)
        for kwargs in self._candidates():
            if best_refused == 0:
                break
            candidate = self._with_arguments(kwargs)
            refused = candidate._num_refused(sample)
            if refused < best_refused:
                best, best_refused = candidate, refused
        if best is self:
            return self
        told = json.dumps(best.template_kwargs)
        note = Finding(
            code="template-argument",
            level="note",
            what=f"the template argument {told} was chosen: under it the rows fit as they are",
            why="without it the template adds or drops something in the answers",
            fix="nothing to do: it is written into the saved template as its default",
        )
        return replace(best, findings=(*best.findings, note))

    def prompt_text(
        self,
        messages: Messages,
        tools: ToolList | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """What an inference server sends for these messages, as text."""
        return self.renderer.render(
            messages, tools=tools, add_generation_prompt=True, arguments=template_kwargs
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
        for start in range(0, len(conversations), _CHUNK):
            results += self._encode_chunk(conversations[start : start + _CHUNK], loss_on)
            if on_progress:
                on_progress(len(results))
        return results

    def _encode_chunk(
        self, conversations: Sequence[Conversation], loss_on: LossOn
    ) -> list[Encoded | Refused]:
        planned: list[list[Any] | Refused] = []
        texts: dict[str, list[int]] = {}
        for conversation in conversations:
            try:
                turns = [] if conversation.text is not None else self._plan(conversation, loss_on)
                planned.append(turns)
                texts |= dict.fromkeys(t for turn in turns for t in (turn.prompt, turn.through))
            except UnfaithfulTemplate as error:
                planned.append(_refused(conversation, error))
        ids_of = dict(zip(texts, self.tokens.encode(list(texts)), strict=True))
        results: list[Encoded | Refused] = []
        for conversation, plan in zip(conversations, planned, strict=True):
            if isinstance(plan, Refused):
                results.append(plan)
            elif conversation.text is not None:
                results.append(self._encode_text(conversation))
            else:
                results.append(self._assemble(conversation, plan, ids_of, loss_on))
        return results

    def _plan(self, conversation: Conversation, loss_on: LossOn) -> list[Any]:
        turns = trained_turns(conversation.messages, loss_on)
        return turn_texts(
            self.renderer,
            conversation.messages,
            turns,
            tools=conversation.tools,
            arguments=conversation.template_kwargs,
        )

    def _assemble(
        self,
        conversation: Conversation,
        plan: list[Any],
        ids_of: Mapping[str, list[int]],
        loss_on: LossOn,
    ) -> Encoded | Refused:
        try:
            return assemble(
                plan,
                ids_of,
                conversation.messages,
                tokens=self.tokens,
                stop_ids=self.stop_ids,
                loss_on=loss_on,
                row=conversation.where,
            )
        except UnfaithfulTemplate as error:
            return _refused(conversation, error)

    def _encode_text(self, conversation: Conversation) -> Encoded:
        """Plain text: every token trained, closed by the tokenizer's end token."""
        ids = list(self.tokenizer(conversation.text, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        example = SFTExample(ids, [1] * len(ids))
        return Encoded((example,), (None,), (0,), ((),), conversation.where)

    def saved_template(self) -> str:
        """The template with the run's arguments as its defaults, for the saved tokenizer.

        A server that passes no argument then renders what was trained; one that does wins.
        """
        defaults = [
            f"{{%- if {name} is not defined -%}}{{%- set {name} = {_jinja(value)} -%}}"
            # A line of its own: the renderer drops the line break after a block and nothing else,
            # so that the template's own beginning stays as it is.
            "{%- endif %}\n"
            for name, value in sorted(self.template_kwargs.items())
        ]
        return "".join(defaults) + self.chat_template

    def fingerprint(self) -> str:
        """sha256 over template, arguments, stop ids and the tokenizer's own serialisation."""
        # A call that padded or cut leaves that setting in the tokenizer; this one takes it out.
        self.tokens.encode(["a"])
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab())
        parts = [self.saved_template(), json.dumps(sorted(self.stop_ids)), vocabulary]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """What contract.json holds."""
        return {
            "fingerprint": self.fingerprint(),
            "template": {"origin": self.origin, "source": self.chat_template},
            "template_kwargs": self.template_kwargs,
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

    def _num_refused(self, sample: Sequence[Conversation]) -> int:
        return sum(isinstance(result, Refused) for result in self.encode_all(sample))

    def _candidates(self) -> list[dict[str, Any]]:
        """Boolean arguments that change a served prompt."""
        probe = [{"role": "user", "content": "?"}]
        found = []
        try:
            plain = self.prompt_text(probe)
        except UnfaithfulTemplate:
            return []
        for name in self.renderer.variables():
            for value in (False, True):
                try:
                    text = self._with_arguments({name: value}).prompt_text(probe)
                except UnfaithfulTemplate:
                    continue
                if text != plain:
                    found.append({name: value})
        return found


def _template(asked: str | None, tokenizer: Any) -> tuple[str, str]:
    """(Jinja source, where it came from)."""
    if asked is None or asked == "auto":
        own = getattr(tokenizer, "chat_template", None)
        if isinstance(own, Mapping):
            own = own.get("default") or next(iter(own.values()), None)
        if own:
            return str(own), "the model's own"
        return builtin_template(DEFAULT, tokenizer), f"built-in {DEFAULT}: the model has none"
    if asked in NAMES:
        return builtin_template(asked, tokenizer), f"built-in {asked}"
    if "{%" in asked or "{{" in asked:
        return asked, "given as source"
    path = Path(asked)
    if path.is_file():
        return path.read_text(encoding="utf-8"), f"file {asked}"
    raise UsageError(
        f"--chat-template {asked!r} is neither a file nor a built-in template",
        fix="name a .jinja file, or one of: " + ", ".join(NAMES),
        code="no-such-template",
    )


def _special(tokenizer: Any) -> dict[str, Any]:
    return {name: value for name, value in tokenizer.special_tokens_map.items() if value}


def _conversation(value: Messages | Conversation, tools: ToolList | None) -> Conversation:
    if isinstance(value, Conversation):
        return value if tools is None else replace(value, tools=tuple(map(dict, tools)))
    listed = None if tools is None else tuple(map(dict, tools))
    return Conversation(tuple(map(dict, value)), where="", tools=listed)


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
