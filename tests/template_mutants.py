"""Chat templates gone wrong: ours and other people's, under each way of spoiling one.

A mutant either edits the messages before the template sees them (a prologue in Jinja, so that it
works on any template) or edits the template's text. What a mutant does may be harmless to a kind of
conversation; whether what is trained under it is right, the oracle says.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import template_corpus as corpus

Source = str | dict[str, str]

_PROLOGUE = """{%- set mut = namespace(out=[]) -%}
{%- for m in messages -%}
{%- set e = namespace(m=m, x=[], y=[]) -%}
{%- if WHEN -%}
EDIT
{%- endif -%}
{%- set mut.out = mut.out + [e.m] -%}
{%- endfor -%}
{%- set messages = mut.out -%}
"""
_ASSISTANT = "m.role == 'assistant'"
_PAST, _FINAL = f"{_ASSISTANT} and not loop.last", f"{_ASSISTANT} and loop.last"
_CALLING, _THINKING = (
    f"{_ASSISTANT} and m.tool_calls",
    f"{_ASSISTANT} and (m.reasoning_content or m.reasoning or m.thinking)",
)


def _text(expression: str) -> str:
    """An edit of the content X, a string or typed parts."""
    return (
        "{%- if m.content is string -%}{%- set e.m = dict(m, content="
        + expression.replace("X", "m.content")
        + ") -%}{%- else -%}{%- for part in m.content -%}{%- set e.x = e.x + [dict(part, text="
        + expression.replace("X", "part.text")
        + ") if part.text is string else part] -%}{%- endfor -%}"
        "{%- set e.m = dict(m, content=e.x) -%}{%- endif -%}"
    )


def _calls(expression: str) -> str:
    """An edit of the list of calls X."""
    return (
        "{%- set e.m = dict(m, tool_calls="
        + expression.replace("X", "(m.tool_calls | list)")
        + ") -%}"
    )


def _arguments(expression: str) -> str:
    """An edit of each call's arguments X, where they are an object."""
    return (
        "{%- for c in m.tool_calls -%}{%- if c.function.arguments is mapping -%}"
        "{%- set e.y = [] -%}"
        "{%- for k, v in c.function.arguments.items() -%}"
        "{%- set e.y = e.y + [[k, v]] -%}{%- endfor -%}"
        "{%- set e.x = e.x + [dict(c, function=dict(c.function, arguments="
        + expression.replace("X", "e.y")
        + "))] -%}{%- else -%}{%- set e.x = e.x + [c] -%}{%- endif -%}{%- endfor -%}"
        "{%- set e.m = dict(m, tool_calls=e.x) -%}"
    )


def _values(expression: str) -> str:
    """An edit of each argument's value v."""
    return (
        "{%- for c in m.tool_calls -%}{%- if c.function.arguments is mapping -%}"
        "{%- set e.y = [] -%}"
        "{%- for k, v in c.function.arguments.items() -%}{%- set e.y = e.y + [[k, "
        + expression
        + "]] -%}{%- endfor -%}"
        "{%- set e.x = e.x + [dict(c, function=dict(c.function, arguments=dict(e.y)))] -%}"
        "{%- else -%}{%- set e.x = e.x + [c] -%}{%- endif -%}{%- endfor -%}"
        "{%- set e.m = dict(m, tool_calls=e.x) -%}"
    )


def _reasoning(expression: str) -> str:
    """An edit of the reasoning X, in whichever field it is."""
    return "".join(
        "{%- if m."
        + name
        + " is string -%}{%- set e.m = dict(e.m, "
        + name
        + "="
        + expression.replace("X", "m." + name)
        + ") -%}{%- endif -%}"
        for name in ("reasoning_content", "reasoning", "thinking")
    )


_NO_REASONING = (
    "{%- set e.m = dict(m.items() | rejectattr(0, 'in', "
    "['reasoning_content', 'reasoning', 'thinking'])) -%}"
)
_NO_CALLS = "{%- set e.m = dict(m.items() | rejectattr(0, 'equalto', 'tool_calls')) -%}"

# (when, what) of the edits of messages, in words.
EDITS: dict[str, tuple[str, str]] = {
    "lower-case answers": (_ASSISTANT, _text("X | lower")),
    "lower-case the last answer": (_FINAL, _text("X | lower")),
    "lower-case history": (_PAST, _text("X | lower")),
    "trim answers": (_ASSISTANT, _text("X | trim")),
    "trim history": (_PAST, _text("X | trim")),
    "trim the last answer": (_FINAL, _text("X | trim")),
    "cut answers": (_ASSISTANT, _text("X[:8]")),
    "cut the first letter": (_ASSISTANT, _text("X[1:]")),
    "cut history": (_PAST, _text("X[:8]")),
    "drop answers": (_ASSISTANT, _text("''")),
    "drop history's answers": (_PAST, _text("''")),
    "repeat answers": (_ASSISTANT, _text("X ~ X")),
    "repeat answers on a new line": (_ASSISTANT, _text("X ~ '\\n' ~ X")),
    "repeat history": (_PAST, _text("X ~ X")),
    "replace a full stop": (_ASSISTANT, _text("X | replace('.', '!')")),
    "replace in history": (_PAST, _text("X | replace('.', '!')")),
    "line breaks removed": (_ASSISTANT, _text("X.split() | join(' ')")),
    "wrap lines": (_ASSISTANT, _text("X | wordwrap(12)")),
    "reverse words": (_ASSISTANT, _text("X.split() | reverse | join(' ')")),
    "words after answers": (_ASSISTANT, _text("X ~ ' Is there anything else?'")),
    "words after the last answer": (_FINAL, _text("X ~ ' Is there anything else?'")),
    "words after history": (_PAST, _text("X ~ ' Is there anything else?'")),
    "words before answers": (_ASSISTANT, _text("'Sure. ' ~ X")),
    "an emoji after answers": (_ASSISTANT, _text("X ~ ' \U0001f600'")),
    "words next to calls": (_CALLING, _text("X ~ 'I will now call a tool.'")),
    "words next to reasoning": (_THINKING, _text("X ~ ' That is what I think.'")),
    "drop content next to calls": (_CALLING, _text("''")),
    "drop calls next to content": (_CALLING + " and m.content", _NO_CALLS),
    "content twice next to calls": (_CALLING, _text("X ~ '\\n' ~ X")),
    "drop calls": (_CALLING, _NO_CALLS),
    "drop history's calls": (_CALLING + " and not loop.last", _NO_CALLS),
    "first call only": (_CALLING, _calls("X[:1]")),
    "last call only": (_CALLING, _calls("X[-1:]")),
    "equal calls once": (
        _CALLING,
        "{%- for c in m.tool_calls -%}{%- if c.function not in e.y -%}{%- set e.x = e.x + [c] -%}"
        "{%- endif -%}{%- set e.y = e.y + [c.function] -%}{%- endfor -%}"
        "{%- set e.m = dict(m, tool_calls=e.x) -%}",
    ),
    "calls reversed": (_CALLING, _calls("X[::-1]")),
    "a call twice": (_CALLING, _calls("X + X[:1]")),
    "first call for all": (_CALLING, _calls("X[:1] * (X | length)")),
    "arguments sorted": (_CALLING, _arguments("dict(X | sort)")),
    "arguments reversed": (_CALLING, _arguments("dict(X[::-1])")),
    "last argument dropped": (_CALLING, _arguments("dict(X[:-1])")),
    "first argument dropped": (_CALLING, _arguments("dict(X[1:])")),
    "arguments dropped": (_CALLING, _arguments("{}")),
    "an argument added": (_CALLING, _arguments("dict(X, units='metric')")),
    "values lower-case": (_CALLING, _values("v | lower if v is string else v")),
    "values cut": (_CALLING, _values("v[:3] if v is string else v")),
    "numbers as words": (_CALLING, _values("v ~ '' if v is number else v")),
    "numbers increased by one": (
        _CALLING,
        _values("v + 1 if v is number and v is not boolean else v"),
    ),
    "booleans inverted": (_CALLING, _values("(not v) if v is boolean else v")),
    "functions renamed": (
        _CALLING,
        "{%- for c in m.tool_calls -%}{%- set e.x = e.x + [dict(c, function=dict(c.function, "
        "name=c.function.name ~ '_v2'))] -%}{%- endfor -%}"
        "{%- set e.m = dict(m, tool_calls=e.x) -%}",
    ),
    "drop reasoning": (_THINKING, _NO_REASONING),
    "drop history's reasoning": (_THINKING + " and not loop.last", _NO_REASONING),
    "drop reasoning next to calls": (_THINKING + " and m.tool_calls", _NO_REASONING),
    "lower-case reasoning": (_THINKING, _reasoning("X | lower")),
    "reasoning twice": (_THINKING, _reasoning("X ~ '\\n' ~ X")),
    "first line of reasoning": (_THINKING, _reasoning("X.split('\\n') | first")),
    "words after reasoning": (_THINKING, _reasoning("X ~ '\\nNow I answer.'")),
    "reasoning for the answer": (_THINKING, _reasoning("m.content if m.content is string else X")),
    "the answer for reasoning": (
        _THINKING,
        _text("(m.reasoning_content or m.reasoning or m.thinking)"),
    ),
    "the answer inside the reasoning": (_THINKING, _reasoning("X ~ '\\n' ~ m.content")),
    "roles changed": (
        "m.role in ['user', 'assistant']",
        "{%- set e.m = dict(m, role='user' if m.role == 'assistant' else 'assistant') -%}",
    ),
    "answers as the user's": (_ASSISTANT, "{%- set e.m = dict(m, role='user') -%}"),
    "history's answers as the user's": (_PAST, "{%- set e.m = dict(m, role='user') -%}"),
    "lower-case questions": ("m.role == 'user'", _text("X | lower")),
    "trim questions in history": (
        "m.role == 'user' and not loop.last",
        _text("X | trim"),
    ),
    "cut questions in history": ("m.role == 'user' and loop.index0 < 2", _text("X[:5]")),
    "drop the system text": ("m.role == 'system'", _text("''")),
    "drop results": ("m.role == 'tool'", _text("''")),
    "question in the answer": (
        _ASSISTANT + " and loop.index0 and loop.previtem.content is string",
        _text("loop.previtem.content ~ '\\n' ~ X"),
    ),
}
# Edits of the whole list, written behind the messages' copies.
_WHOLE: dict[str, str] = {
    "last message twice": "messages + messages[-1:]",
    "first message dropped": "messages[1:]",
    "last two messages only": "messages[-2:]",
    "last two exchanged": "messages[:-2] + messages[-2:][::-1]",
}


def _edited(source: Source, name: str) -> Source:
    when, edit = EDITS[name]
    return _before(source, _PROLOGUE.replace("WHEN", when).replace("EDIT", edit))


def _before(source: Source, prologue: str) -> Source:
    return _each(source, lambda text: prologue + text)


def _each(source: Source, change: Callable[[str], str]) -> Source:
    if isinstance(source, str):
        return change(source)
    return {name: change(text) for name, text in source.items()}


def _whole(expression: str) -> str:
    return "{%- set messages = " + expression + " -%}"


# ------------------------------------------------------------------ edits of the template's text

# An output statement that writes words: {{- 'words' ... }}.
_LITERAL = re.compile(r"'([^'\n]*)'")
_QUOTED = re.compile(r'"([^"\n]*)"')
_GENERATION = re.compile(r"\{%-? if add_generation_prompt -?%\}")


def _ends(text: str) -> list[str]:
    """Control tokens at the end of a literal: the ends of turns among them."""
    literals = _LITERAL.findall(text) or _QUOTED.findall(text)
    found = [t for literal in literals for t in re.findall(r"[<\[][^<>\[\]]+[>\]~]", literal)]
    return list(dict.fromkeys(found))


def _spoilt(source: str) -> Iterator[tuple[str, str, str]]:
    """Edits of the text of one template: (kind, change, source)."""
    for token in _ends(source):
        at = source.rfind(token)
        for kind, text in {
            "a control token left out": source.replace(token, ""),
            "a control token left out once": source[:at] + source[at + len(token) :],
            "a control token twice": source.replace(token, token * 2),
            "words before a control token": source.replace(token, "Well, " + token),
            "words after a control token": source.replace(token, token + "Well, "),
            "a control token changed": source.replace(token, token.upper().replace("|", "!")),
        }.items():
            yield kind, kind.replace("a control token", token), text
    whole = {
        "words at the end": source + "{{- ' Over.' }}",
        "words at the end of a conversation": source
        + "{%- if not add_generation_prompt %}{{- ' Over.' }}{%- endif %}",
        "words at the end of a prompt": source
        + "{%- if add_generation_prompt %}{{- ' Go.' }}{%- endif %}",
        "words at the beginning": "{{- 'Log: ' }}" + source,
        "messages counted": "{{- messages | length }}" + source,
        "first letter depends on the last role": (
            "{{- 'A: ' if messages[-1].role == 'assistant' else 'B: ' }}" + source
        ),
    }
    if _GENERATION.search(source):
        whole |= {
            "generation prompt always written": _GENERATION.sub("{%- if true %}", source),
            "generation prompt never written": _GENERATION.sub("{%- if false %}", source),
        }
    for kind, text in whole.items():
        yield kind, kind, text


@dataclass(frozen=True)
class Mutant:
    """A spoilt template.

    Attributes:
        template: of which one.
        kind: of the change.
        change: in words.
        source: Jinja.
    """

    template: str
    kind: str
    change: str
    source: Source


def mutants() -> list[Mutant]:
    """Every mutant of every template of our own that can change what it writes."""
    return [mutant for name in corpus.CONTROL for mutant in mutants_of(name, corpus.sources(name))]


def official_mutants() -> list[Mutant]:
    """The same of other people's templates; none where they are not beside the checkout."""
    return [
        mutant
        for path in corpus.OFFICIAL
        for mutant in mutants_of(path.stem, path.read_text(encoding="utf-8"))
    ]


def chosen(number: int, among: Callable[[], list[Mutant]] = mutants) -> list[Mutant]:
    """So many of them, every change and every template as often as the others."""
    left = among()
    random.Random(7).shuffle(left)
    changes, templates = Counter[str](), Counter[str]()
    made = []
    while left and len(made) < number:
        best = min(left, key=lambda m: (changes[m.kind], templates[m.template]))
        left.remove(best)
        changes[best.kind] += 1
        templates[best.template] += 1
        made.append(best)
    return made


def mutants_of(name: str, source: Source) -> list[Mutant]:
    text = source if isinstance(source, str) else source["tool_use"]
    made = [
        Mutant(name, edit, edit, _edited(source, edit))
        for edit, (when, _) in EDITS.items()
        if _applies(when, text)
    ]
    made += [
        Mutant(name, edit, edit, _before(source, _whole(expression)))
        for edit, expression in _WHOLE.items()
    ]
    for kind, change, spoilt in _spoilt(text):
        if spoilt != text:
            whole = spoilt if isinstance(source, str) else {**source, "tool_use": spoilt}
            made.append(Mutant(name, kind, change, whole))
    return made


def _applies(when: str, source: str) -> bool:
    """Whether a template reads what an edit changes."""
    read = {
        "m.tool_calls": ("tool_calls",),
        "m.reasoning_content": ("reasoning", "thinking"),
        "'tool'": ("tool",),
    }
    return all(any(w in source for w in words) for sign, words in read.items() if sign in when)
