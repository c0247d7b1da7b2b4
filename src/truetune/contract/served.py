"""What defines served prompts and answers: template, tokenizer, stop tokens and template
arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from truetune.contract.behaviour import Behaviour, observe, tail_of, user
from truetune.contract.policy import Policy
from truetune.contract.render import Renderer, RenderJob
from truetune.contract.shape import FIELDS, shown
from truetune.contract.tokens import Tokens
from truetune.findings import Finding

Messages: TypeAlias = Sequence[Mapping[str, Any]]

# Values of one argument that are tried.
_MOST_CHOICES = 8


@dataclass(frozen=True, eq=False)
class Served:
    """How prompts are made and where answers end.

    Attributes:
        tokenizer: a transformers tokenizer.
        chat_template: Jinja source.
        stop_ids: ids on which a server ends an answer, the model's own first.
        template_kwargs: template arguments of the run.
        origin: where the template came from, in words.
        findings: decisions that must be reported.
        explicit_kwargs: whether the user set template arguments, which are then kept.
        tool_template: Jinja source for conversations with tools, if the model has another.
        policy: how to treat rows with parts for which the template has no place.
        date: ISO date that templates take for today; None if they do not ask.
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

    def prepared(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages in their one form, under the run's policy."""
        return self.policy.prepared(messages, self.behaviour().pairs)

    def behaviour(self, template_kwargs: Mapping[str, Any] | None = None) -> Behaviour:
        """What the template does under the run's arguments and those of a row."""
        key = json.dumps(template_kwargs or {}, sort_keys=True, default=repr)
        if key not in self._behaviours:
            self._behaviours[key] = observe(self.renderer, template_kwargs, self.tokens.added_texts)
        return self._behaviours[key]

    @cached_property
    def _behaviours(self) -> dict[str, Behaviour]:
        return {}

    def past(self, messages: Sequence[dict[str, Any]], seen: Behaviour) -> list[dict[str, Any]]:
        """Prepared messages as a server gets them from a client that sends back what it received.

        A server with a reasoning parser returned the reasoning in a field, and passes the field
        that the client sends back to the template under its usual names; the template decides
        whether to write it. Reasoning that is trained between markers of the run (`--reasoning
        inline`) comes back inside the content.
        """
        route = next((r for r in seen.routes if r in FIELDS), "reasoning_content")
        route = "inline" if self.policy.reasoning == "inline" else route
        return shown(messages, seen.shape, route, self.policy.markers(seen))

    def is_switched(self, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether the user set an argument that changes served prompts.

        Args:
            template_kwargs: the template arguments of a row.
        """
        given = {*(self.template_kwargs if self.explicit_kwargs else ()), *template_kwargs}
        return any(name in given for name in self._switches)

    @cached_property
    def _switches(self) -> frozenset[str]:
        """Names of arguments, set or not, that open or close the think block of a prompt."""
        pairs = self.behaviour().pairs
        found = set()
        for name in self.renderer.variables():
            texts = self.served_under(
                [{name: value} for value in self.values_of(name)], [user("?")]
            )
            tails = {tail_of(text, pairs)[:2] for text in texts if text}
            if len(tails) > 1:
                found.add(name)
        return frozenset(found)

    def values_of(self, name: str) -> list[Any]:
        """Values that a template argument is tried with."""
        choices = self.renderer.choices(name)[:_MOST_CHOICES]
        return [False, True, *(c for c in choices if not isinstance(c, bool))]

    def served_under(self, tried: Sequence[Mapping[str, Any]], messages: Messages) -> list[str]:
        """The served prompt under each set of arguments, "" if the template refuses."""
        made = self.renderer.render_many(
            [RenderJob(messages, prompt=True, arguments=k) for k in tried]
        )
        return [text if isinstance(text, str) else "" for text in made]


def _special(tokenizer: Any) -> dict[str, Any]:
    return {n: value for n, value in tokenizer.special_tokens_map.items() if value is not None}
