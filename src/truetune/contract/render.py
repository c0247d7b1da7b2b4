"""Render messages as text: a chat template with its arguments, as an inference server renders it.

Rendering uses transformers' own sandbox and preparation of messages, because servers built on it do
the same; no other code makes prompt text. It happens in a worker process (`sandbox.py`), because a
template is an untrusted program.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from truetune.contract import sandbox
from truetune.errors import UnfaithfulTemplate

# What transformers or a server gives every template; anything else a template reads is an argument.
PROVIDED = frozenset(
    """messages tools documents add_generation_prompt continue_final_message bos_token eos_token
    pad_token unk_token sep_token cls_token mask_token additional_special_tokens raise_exception
    strftime_now namespace range dict lipsum cycler joiner loop true false none True False None
    image_token video_token audio_token add_vision_id""".split()  # noqa: SIM905
)

# Fields of messages, tools and calls that have a meaning of their own, and methods of strings.
KNOWN_FIELDS = frozenset(
    """role content name tool_calls tool_call_id function arguments id index type text train
    parameters properties description required items enum append get keys
    reasoning_content reasoning thinking
    values items strip lstrip rstrip split rsplit replace startswith endswith upper lower title join
    format first last index0 previtem nextitem length update pop find count image image_url video
    audio default title anyOf oneOf allOf return nullable format defs functions function_call
    """.split()  # noqa: SIM905
)

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Rendered: TypeAlias = str | UnfaithfulTemplate


@dataclass(frozen=True)
class RenderJob:
    """One text to render.

    Attributes:
        messages: in the form that the template receives.
        tools: tool schemas.
        prompt: whether to add the generation prompt.
        arguments: template arguments in addition to those of the run, which they override.
    """

    messages: Messages
    tools: Sequence[Mapping[str, Any]] | None = None
    prompt: bool = False
    arguments: Mapping[str, Any] | None = None


# A job by numbers: messages, tools, whether the generation prompt is added, arguments.
_Asked: TypeAlias = tuple[tuple[int, ...], int | None, bool, int]


class _Texts:
    """Messages, tools and arguments as JSON, each once, by numbers.

    A conversation's prompts have most of their messages in common: the same object is written once.
    """

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self._numbers: dict[int, int] = {}

    def written(self, value: Any) -> int:
        return self.known.setdefault(
            json.dumps(value, default=sandbox.placeholder), len(self.known)
        )

    def number(self, value: Any) -> int:
        """The same for an object that outlives this."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = self.written(value)
        return self._numbers[id(value)]


@dataclass(frozen=True, eq=False)
class Renderer:
    """Template sources bound to a tokenizer's special tokens, the run's arguments and its date.

    Attributes:
        source: Jinja source.
        special_tokens: names to texts, as `tokenizer.special_tokens_map` gives them.
        arguments: template arguments of the run.
        tool_source: the source that serves conversations with tools, where it is different.
        date: ISO date that the template takes for today; None is today.
    """

    source: str
    special_tokens: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tool_source: str | None = None
    date: str | None = None

    def render(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Raises:
            UnfaithfulTemplate: the template refuses these messages, or fails on them.
        """
        (text,) = self.render_many([RenderJob(messages, tools, add_generation_prompt, arguments)])
        if isinstance(text, UnfaithfulTemplate):
            raise text
        return text

    def render_many(self, jobs: Sequence[RenderJob]) -> list[Rendered]:
        """The text of each job, or why there is none; equal jobs are rendered once."""
        groups: dict[str, dict[_Asked, None]] = {}
        keys = []
        texts = _Texts()
        for job in jobs:
            source = self.tool_source if job.tools and self.tool_source else self.source
            key = (
                tuple([texts.number(message) for message in job.messages]),
                texts.number(job.tools) if job.tools else None,
                job.prompt,
                texts.written({**self.arguments, **(job.arguments or {})}),
            )
            groups.setdefault(source, {})[key] = None
            keys.append((source, key))
        made: dict[tuple[str, _Asked], Rendered] = {}
        for source, unique in groups.items():
            answers = sandbox.render(
                source, dict(self.special_tokens), self.today, list(texts.known), list(unique)
            )
            for key, answer in zip(unique, answers, strict=True):
                made[source, key] = _rendered(answer)
        return [made[key] for key in keys]

    @property
    def today(self) -> str:
        return self.date or datetime.date.today().isoformat()

    def require_valid(self) -> None:
        """Compile the templates without rendering any message.

        Raises:
            UnfaithfulTemplate: one is not valid Jinja, or cannot be compiled within bounds.
        """
        for facts in self._facts:
            if isinstance(facts, UnfaithfulTemplate):
                raise facts

    def variables(self) -> list[str]:
        """Return the variables of the template that no caller provides: its arguments, sorted."""
        found = {name for facts in self._read for name in facts["variables"]}
        return sorted(found - PROVIDED)

    def choices(self, name: str) -> list[Any]:
        """Constants that the template compares an argument with."""
        found = [value for facts in self._read for value in facts["choices"].get(name, [])]
        return list(dict.fromkeys(found))

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Fields that the template reads of something and that messages do not have commonly."""
        found = {name for facts in self._read for name in facts["fields"]}
        return tuple(sorted(name for name in found - KNOWN_FIELDS if name.isidentifier())[:40])

    @cached_property
    def literals(self) -> str:
        """All text that is in the template, pieces set apart by a null character."""
        return "\0".join(text for facts in self._read for text in facts["literals"])

    @cached_property
    def reads_date(self) -> bool:
        """Whether what it writes depends on the day."""
        return any(facts["dated"] for facts in self._read)

    @property
    def _read(self) -> list[dict[str, Any]]:
        return [facts for facts in self._facts if isinstance(facts, dict)]

    @cached_property
    def _facts(self) -> list[dict[str, Any] | UnfaithfulTemplate]:
        sources = [self.source, *([self.tool_source] if self.tool_source else [])]
        answers = [sandbox.describe(source) for source in sources]
        return [a[1] if a[0] == "ok" else _error(a) for a in answers]


def _rendered(answer: sandbox.Answer) -> Rendered:
    return str(answer[1]) if answer[0] == "ok" else _error(answer)


def _error(answer: sandbox.Answer) -> UnfaithfulTemplate:
    kind = answer[0]
    other = "pass another one with --chat-template FILE"
    if kind == "syntax":
        return UnfaithfulTemplate(
            f"the chat template is not valid Jinja: {answer[1]}",
            where=f"template line {answer[2]}",
            fix=other,
        )
    if kind == "error":
        why, fix = _refused(str(answer[1]))
        return UnfaithfulTemplate(
            f"the chat template refuses this conversation: {answer[1]}",
            why=why,
            fix=fix,
            code="template-refuses",
        )
    if kind == "died":
        return UnfaithfulTemplate(
            f"the process that rendered the chat template ended unexpectedly, twice ({answer[1]})",
            why="the template ended it, or the system did, for example for lack of memory",
            fix=f"free some memory and try again; if the error remains, {other}",
            code="template-out-of-bounds",
        )
    what = {
        "hang": f"does not finish: no output after {sandbox.DEADLINE:g} seconds of CPU time",
        "slow": f"takes too long: more than {sandbox.TOTAL:g} seconds in total",
        "memory": "exhausts the memory",
        "size": "writes unlimited text",
    }[kind]
    return UnfaithfulTemplate(
        f"the chat template {what}",
        why="a template is a program; it runs in a separate process with limited memory and time",
        fix=f"inspect it before you trust it, and {other}",
        code="template-out-of-bounds",
    )


def _refused(said: str) -> tuple[str, str]:
    """(why, fix) of what a template, or the sandbox around it, says."""
    if unknown := re.fullmatch(r"'(\w+)' is undefined", said):
        return (
            "the template uses a variable that no conversation has",
            f"set it with --template-arg {unknown[1]}=VALUE, as it will be served, or use another "
            "template with --chat-template",
        )
    if said.endswith("is unsafe."):
        return (
            "templates run in a sandbox (in transformers too), where they cannot modify anything",
            "use a template without that call with --chat-template",
        )
    return (
        "templates may require certain roles, orders of roles, or fields",
        "change the row, or use another template with --chat-template",
    )
