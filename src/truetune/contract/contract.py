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

from truetune.contract import sandbox
from truetune.contract.arguments import ArgumentSearch
from truetune.contract.encode import LOSS_ON, Encoded, LossOn
from truetune.contract.encoder import Encoding, Refused
from truetune.contract.policy import Policy
from truetune.contract.source import template_source, with_defaults
from truetune.contract.stops import own_stop_ids, stop_set
from truetune.data.conversation import Conversation
from truetune.data.rows import BadRow
from truetune.data.tools import tools_of
from truetune.errors import UnfaithfulTemplate
from truetune.findings import Finding

Messages: TypeAlias = Sequence[Mapping[str, Any]]
ToolList: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class PromptContract(Encoding):
    """How prompts are made and where answers end, in training, chat and serving. Its attributes are
    those of `Served`.

    Create one with `load`, then let `fit` choose the template arguments for the rows.
    """

    @classmethod
    def load(
        cls,
        source: str | Path | Any,
        chat_template: str | Path | None = None,
        stop: str | Sequence[str | int] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        revision: str | None = None,
        policy: Policy | None = None,
        date: str | None = None,
    ) -> PromptContract:
        """Create a contract for a model folder, a Hub id or a tokenizer.

        Args:
            source: folder, Hub id, or a loaded tokenizer.
            chat_template: a built-in name, the name of one of the model's own templates, a file
                with Jinja, or Jinja source; None means the tokenizer's own template, or the
                built-in Instruction/Response if it has none.
            stop: None or "auto", or tokens to add to the model's own stop set.
            template_kwargs: template arguments; None leaves them to `fit`.
            revision: revision of the Hub model.
            policy: see `Policy`.
            date: ISO date for templates that write today's date; None means today.

        Raises:
            UsageError: a template or stop token does not exist.
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
        asked = None if chat_template is None else str(chat_template)
        text, tool_text, origin = template_source(asked, tokenizer)
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
        """Restore the contract of a run from its saved tokenizer and record.

        Args:
            source: as in `load`; its template has the run's arguments as defaults.
            record: the content of contract.json (see `as_dict`), or {}.
        """
        given = record.get("template_kwargs_given", False)
        return cls.load(
            source,
            template_kwargs=record.get("template_kwargs") if given else None,
            policy=Policy.from_dict(record.get("policy") or {}),
            date=record.get("date"),
        )

    @cached_property
    def arguments(self) -> ArgumentSearch[PromptContract]:
        return ArgumentSearch(self)

    def fit(
        self,
        conversations: Iterable[Messages | Conversation],
        tools: ToolList | None = None,
        *,
        loss_on: LossOn = "assistant",
    ) -> PromptContract:
        """Return a contract whose template arguments render these conversations unchanged.

        It first tries no argument, then each value of an argument that the template reads and that
        changes a served prompt. It chooses the value that accepts the most rows, and the
        first of these if there are several. Explicit arguments are kept.
        """
        return self.arguments.fit([_conversation(c, tools) for c in conversations], loss_on)

    def prompt_text(
        self,
        messages: Messages,
        tools: ToolList | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt that an inference server sends for these messages, as text."""
        seen = self.behaviour(template_kwargs)
        listed = self.policy.past(self.prepared(messages))
        return self.renderer.render(
            self.past(listed, seen),
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
        """Return the prompt that an inference server sends for these messages, as token ids.

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
        """Encode one conversation, and prove every trained turn.

        Raises:
            UnfaithfulTemplate: no faithful completion exists; the error says why.
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
        """Encode many rows in batches; for a refused row, the list contains the refusal.

        Args:
            conversations: chat rows or plain text.
            loss_on: assistant, last or all.
            on_progress: called with the number of rows encoded so far.

        Raises:
            ValueError: `loss_on` is unknown.
        """
        if loss_on not in LOSS_ON:
            raise ValueError(f"unknown loss_on {loss_on!r}; known: {', '.join(LOSS_ON)}")
        results: list[Encoded | Refused] = []
        for batch in self.encoder.batches(conversations, loss_on):
            results += batch
            if on_progress:
                on_progress(len(results))
        return self.arguments.advise(conversations, results, loss_on)

    def saved_template(self) -> str | dict[str, str]:
        """The chat template for the saved tokenizer, with the run's arguments as defaults.

        A server that passes no argument then renders what was trained; an argument that it passes
        takes precedence. A model with a separate template for tools keeps both, by name.
        """
        if self.tool_template is None:
            return with_defaults(self.chat_template, self.template_kwargs)
        return {
            "default": with_defaults(self.chat_template, self.template_kwargs),
            "tool_use": with_defaults(self.tool_template, self.template_kwargs),
        }

    def fingerprint(self) -> str:
        """Return the sha256 over template, arguments, stop ids and the serialised tokenizer."""
        # A call that padded or cut leaves that setting in the tokenizer; this one takes it out.
        self.tokens.encode(["a"])
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab())
        saved = self.saved_template()
        template = saved if isinstance(saved, str) else json.dumps(saved, sort_keys=True)
        parts = [template, json.dumps(sorted(self.stop_ids)), vocabulary]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the content of contract.json."""
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
        """Return an id for padding; masks are built from lengths, so any id works."""
        if self.tokenizer.pad_token_id is not None:
            return int(self.tokenizer.pad_token_id)
        return int(self.stop_ids[0]) if self.stop_ids else 0


def _dated(today: str, *, given: bool) -> Finding:
    return Finding(
        code="template-date",
        level="note",
        what=f"the template writes the date into prompts; this run always uses {today}",
        why="otherwise the same rows would be encoded differently on another day; a server "
        "writes the current date",
        fix="nothing to do" if given else "set it with --date YYYY-MM-DD",
    )


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
