"""Find out what a template does by rendering sentinels; model names play no role.

input   a renderer, template arguments, the texts of the tokenizer's added tokens
does    renders a handful of short conversations and reads off: the shape of messages it takes,
        where reasoning goes, whether its generation prompt opens or closes a think block, what it
        writes after an answer and after a tool call, and whether history stays as it was
output  Behaviour
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.contract.render import Rendered, Renderer, RenderJob
from truetune.contract.shape import (
    FIELDS,
    PART_KEYS,
    ROUTES,
    Markers,
    Message,
    Shape,
    field_route,
    shown,
)

Q, A, R, Q2, V, TOOL_SAID = (
    "qqsentinelqq",
    "aasentinelaa",
    "rrsentinelrr",
    "ppsentinelpp",
    "vvsentinelvv",
    "ttsentineltt",
)
_NAME = "ffsentinelff"
TOOL: Message = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"kk": {"type": "string", "description": "A value."}},
            "required": ["kk"],
        },
    },
}
# Something in brackets, as control tokens are written.
_MARKER = re.compile(
    r"[<\[\u25c1\u300a\u3010]\|?[/\w:.\-\uff5c\u2581]{1,40}\|?[>\]\u25b7\u300b\u3011]"
)
# Of the pairs of markers that a template holds, those around reasoning. Only where no field of a
# message leads to them does the name decide.
_THOUGHT = re.compile(r"think|reason|thought|analysis|scratch|\bcot\b", re.IGNORECASE)
_ENDS = (("END", "START"), ("END", "BEGIN"), ("end", "start"), ("end", "begin"))


@dataclass(frozen=True)
class Behaviour:
    """What a template does under one set of arguments.

    Attributes:
        shape: the form of messages.
        markers: around reasoning; None if the template knows none.
        pairs: all opening and closing markers around reasoning that the template holds.
        opened: the end of a served prompt that leaves a think block open, "" if it does not.
        closed: the end of a served prompt that opens and closes one, "" if it does not.
        routes: ways in which reasoning reaches the completion, in the order tried.
        user_end: text between a question and the answer, in a served prompt.
        lead: what the template writes before every plain answer, "" if nothing.
        headers: what it writes between a question and the answer, without tools and with them; ""
            if a served prompt ends on the beginning of that.
        answer_end: text after an answer where it is last, and where a user turn follows.
        call_end: the same after a tool call, where a tool's answer follows.
        call_between: text between two calls of one turn, "" if it takes one only.
        recipient: text between the name of a tool and its arguments where the name is the first
            thing after the served prompt, so that plain answers name a recipient too; else "".
        marks: texts around reasoning that the template holds, alone or in pairs.
        parsed_differs: whether a later prompt is different where the server took the reasoning
            out of an answer than where the client sends back the answer's whole text.
        stable: whether a turn is written in history as it was written last.
    """

    shape: Shape
    markers: Markers | None
    pairs: tuple[tuple[str, str], ...]
    opened: str
    closed: str
    routes: tuple[str, ...]
    user_end: str
    lead: str
    headers: tuple[str, str]
    answer_end: tuple[str, str]
    call_end: tuple[str, str]
    call_between: str
    recipient: str
    marks: tuple[str, ...]
    parsed_differs: bool
    stable: bool


def user(text: str = Q) -> Message:
    return {"role": "user", "content": text}


def answer(text: str = A, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def _calls(*values: str, **more: Any) -> Message:
    calls = [
        {
            "type": "function",
            "id": f"call0000{i}",
            "function": {"name": _NAME, "arguments": {"kk": value, "bb": True}},
        }
        for i, value in enumerate(values)
    ]
    return answer("", tool_calls=calls, **more)


def _said() -> Message:
    return {
        "role": "tool",
        "name": _NAME,
        "tool_call_id": "call00000",
        "content": TOOL_SAID,
    }


class _Probe:
    """Renders with one message shape and one set of arguments; a refusal gives an empty text."""

    def __init__(self, renderer: Renderer, arguments: Mapping[str, Any] | None) -> None:
        self.renderer = renderer
        self.arguments = arguments
        self.shape = Shape()
        self.markers = Markers()

    def texts(self, *jobs: tuple[Sequence[Message], str, bool, bool]) -> list[str]:
        """(messages, route, generation prompt, tools) each."""
        made = self.renderer.render_many(
            [
                RenderJob(
                    shown(messages, self.shape, route, self.markers),
                    [TOOL] if tools else None,
                    prompt,
                    self.arguments,
                )
                for messages, route, prompt, tools in jobs
            ]
        )
        return [_text(text) for text in made]


def _text(rendered: Rendered) -> str:
    return rendered if isinstance(rendered, str) else ""


def observe(
    renderer: Renderer, arguments: Mapping[str, Any] | None, added: Iterable[str]
) -> Behaviour:
    """Probe a template. No error is raised: what a template refuses counts as not supported."""
    probe = _Probe(renderer, arguments)
    added = tuple(added)
    plain, through, later = _plain(probe)
    if not (Q in through and A in through):
        probe.shape = Shape(content="parts")
        plain, through, later = _plain(probe)
        if not (Q in through and A in through):
            probe.shape = Shape()
            plain, through, later = _plain(probe)
    pairs = think_pairs(renderer.literals, added, plain)
    probe.shape = dataclasses.replace(probe.shape, arguments=_argument_form(probe))
    found = _field_markers(probe, plain, pairs)
    known = tuple(dict.fromkeys([*([(found.open, found.close)] if found else []), *pairs]))
    marks = dict.fromkeys(mark for pair in known for mark in pair)
    marks |= dict.fromkeys(m for m in _MARKER.findall(renderer.literals) if _THOUGHT.search(m))
    opened, closed, pair = tail_of(plain, known)
    filled = _empty_block(plain.removesuffix(opened), through, known) if not opened else None
    markers = found or filled or (_default_markers(pair or known[0], opened) if known else None)
    probe.markers = markers or Markers()
    routes = _routes(probe, plain, opened, known)
    if filled and not found:
        routes = ("filled", *routes)
    routes += tuple(r for r in _call_routes(probe) if r not in routes)
    call_end, between, recipient = _call_ends(probe)
    return Behaviour(
        probe.shape,
        markers,
        known,
        opened,
        closed,
        (*routes, *(["opened"] if opened else [])),
        _after(plain, Q, ""),
        _lead(plain, through),
        (_header(probe, tools=False), _header(probe, tools=True)),
        (_after(through, A, ""), _after(later, A, Q2)),
        call_end,
        between,
        recipient,
        tuple(marks),
        _history_differs(probe, routes),
        _stable(probe),
    )


def _plain(probe: _Probe) -> list[str]:
    return probe.texts(
        ([user()], "none", True, False),
        ([user(), answer()], "none", False, False),
        ([user(), answer(), user(Q2)], "none", False, False),
    )


def _argument_form(probe: _Probe) -> Any:
    """ "string" where an object comes out as Python's own text and a string as JSON."""
    turn = [user(), _calls(V)]
    as_object = probe.texts((turn, "none", False, True))[0]
    # A template that takes objects and cuts their values has no other form: servers give objects.
    if "kk" in as_object and "{'kk'" not in as_object:
        return "object"
    whole = probe.shape
    probe.shape = dataclasses.replace(whole, arguments="string")
    as_string = probe.texts((turn, "none", False, True))[0]
    probe.shape = whole
    good = V in as_string and '\\"kk' not in as_string
    return "string" if good else "object"


def _field_markers(probe: _Probe, plain: str, pairs: Sequence[tuple[str, str]]) -> Markers | None:
    """Markers from the text around reasoning that a field of the message carried."""
    turn = [user(), answer(reasoning_content=R)]
    for route in ROUTES[:-1]:
        (text,) = probe.texts((turn, route, False, False))
        at, end = text.find(R), text.rfind(A)
        if at < 0 or end < at or any(key in text[at:end] for key in PART_KEYS):
            continue
        before, between = text[:at], text[at + len(R) : end]
        for opening, closing in pairs:
            if closing in between and opening in before:
                start = before.rindex(opening)
                return Markers(opening, closing, before[start:], between)
        if plain and before.startswith(plain) and between.strip():
            opening = before[len(plain) :]
            return Markers(opening.strip(), between.strip(), opening, between)
        words = plain.removeprefix(before)
        if plain.startswith(before) and words.strip() and between.strip():
            # The prompt opens the reasoning, with a marker or with words.
            return Markers(words.strip(), between.strip(), words, between)
        marks = _MARKER.findall(before)
        if marks and between.strip():
            return Markers(marks[-1], between.strip(), before[before.rindex(marks[-1]) :], between)
    return None


def tail_of(
    prompt: str, pairs: Sequence[tuple[str, str]]
) -> tuple[str, str, tuple[str, str] | None]:
    """(opened, closed, pair): the end of a prompt that leaves a think block open, or closes it."""
    stripped = prompt.rstrip()
    for opening, closing in pairs:
        if stripped.endswith(opening):
            return prompt[len(stripped) - len(opening) :], "", (opening, closing)
        if stripped.endswith(closing):
            start = stripped.rfind(opening)
            inner = stripped[start + len(opening) : -len(closing)] if start >= 0 else "?"
            start = start if start >= 0 and not inner.strip() else len(stripped) - len(closing)
            return "", prompt[start:], (opening, closing)
    return "", "", None


def _default_markers(pair: tuple[str, str], opened: str) -> Markers:
    """Whitespace as most have it, or as the prompt's own opening marker has it."""
    opening, closing = pair
    space = opened[len(opening) :] if opened else "\n"
    return Markers(opening, closing, opening + space, f"{space}{closing}{space * 2}")


def _empty_block(prompt: str, through: str, pairs: Sequence[tuple[str, str]]) -> Markers | None:
    """Markers from an empty think block that the template writes before an answer."""
    if not through.startswith(prompt):
        return None
    written = through[len(prompt) :].partition(A)[0]
    for opening, closing in pairs:
        lead = written.lstrip()
        inner, found, rest = lead[len(opening) :].partition(closing)
        if lead.startswith(opening) and found and not inner.strip() and not rest.strip():
            half = inner[: len(inner) // 2 + len(inner) % 2]
            after = inner[len(half) :] or half
            return Markers(opening, closing, opening + half, after + closing + rest)
    return None


def _routes(
    probe: _Probe, plain: str, opened: str, pairs: Sequence[tuple[str, str]]
) -> tuple[str, ...]:
    """Routes under which a sentinel of reasoning is in a completion, before the answer and
    set apart from it."""
    turn = [user(), answer(reasoning_content=R)]
    tried = [route for route in ROUTES if route != "markers in content"]
    tried += [field_route(name) for name in probe.renderer.fields]
    tried += ["markers in content"] if pairs else []
    texts = probe.texts(*((turn, route, False, False) for route in tried))
    base = plain.removesuffix(opened)
    good = []
    for route, text in zip(tried, texts, strict=True):
        written = text[len(base) :] if text.startswith(base) else ""
        at, end = written.find(R), written.rfind(A)
        between = written[at + len(R) : end]
        empty = _empty_block(base, text.replace(R, A, 1), pairs)
        if route == "markers in content" and not _leads(written[: max(at, 0)], pairs):
            continue
        printed = any(key in written[:end] for key in PART_KEYS)
        if 0 <= at < end and between.strip() and not empty and not printed:
            good.append(route)
    return tuple(good)


def _leads(before: str, pairs: Sequence[tuple[str, str]]) -> bool:
    """Whether reasoning that is a part of the content is the first thing in an answer: a server
    reads it nowhere else."""
    lead = before.strip()
    return not lead or any(lead == opening.strip() for opening, _ in pairs)


def _call_routes(probe: _Probe) -> tuple[str, ...]:
    """Fields that carry reasoning before a tool call, though in no plain answer."""
    tried = [*FIELDS, *(field_route(name) for name in probe.renderer.fields)]
    turn = [user(), _calls(V, reasoning_content=R)]
    texts = probe.texts(*((turn, route, False, True) for route in tried))
    return tuple(
        route
        for route, text in zip(tried, texts, strict=True)
        if 0 <= text.find(R) < text.rfind(V) and text[text.find(R) + len(R) : text.rfind(V)].strip()
    )


def _lead(plain: str, through: str) -> str:
    """The text between a served prompt and the answer after it."""
    if not through.startswith(plain):
        return ""
    lead, found, _ = through[len(plain) :].partition(A)
    return lead if found else ""


def _header(probe: _Probe, tools: bool) -> str:
    """What a served prompt should end on, of a template that has no generation prompt: a question
    ends as an answer does, and the answer's header follows."""
    asked, prompt, through = probe.texts(
        ([user()], "none", False, tools),
        ([user()], "none", True, tools),
        ([user(), answer()], "none", False, tools),
    )
    end = _after(asked, Q, "")
    own = end[len(os.path.commonprefix([end, _after(through, A, "")])) :]  # noqa: RUF071
    header = _lead(asked, through)
    return header if asked == prompt and header.strip() and not own.strip() else ""


def _after(text: str, sentinel: str, end: str) -> str:
    """What is after the last `sentinel`, up to `end`."""
    _, found, tail = text.rpartition(sentinel)
    if not found:
        return ""
    return tail[: tail.find(end)] if end and end in tail else tail if not end else ""


def _call_ends(probe: _Probe) -> tuple[tuple[str, str], str, str]:
    asked, one, followed, two = probe.texts(
        ([user()], "none", True, True),
        ([user(), _calls(V)], "none", False, True),
        ([user(), _calls(V), _said()], "none", False, True),
        ([user(), _calls(V, A)], "none", False, True),
    )
    between = ""
    if V in two and A in two[two.rindex(V) :]:
        between = two[two.rindex(V) + len(V) : two.rindex(A)]
    named = asked and one.startswith(asked + _NAME)
    recipient = one[len(asked + _NAME) :][:1] if named else ""
    return (_after(one, V, ""), _after(followed, V, TOOL_SAID)), between, recipient


def _stable(probe: _Probe) -> bool:
    """Whether each earlier turn, as it is written when it is last, begins the longer text."""
    turns = [user(), answer(), user(Q2), answer(R), user(V), answer(TOOL_SAID)]
    # What is trimmed in history alone is another text there.
    padded = [{**m, "content": f" {m['content']} \n"} for m in turns]
    system = [{"role": "system", "content": "sssentinelss"}, *turns]
    for conversation in (turns, padded, system):
        cuts = [i + 1 for i, m in enumerate(conversation) if m["role"] == "assistant"]
        whole, *parts = probe.texts(
            *((conversation[:cut], "none", False, False) for cut in reversed(cuts))
        )
        prompts = probe.texts(*((conversation[: cut - 1], "none", True, False) for cut in cuts))
        if not whole and conversation is system:
            continue
        if not all(text and whole.startswith(text) for text in [*parts, *prompts]):
            return False
    return True


def _history_differs(probe: _Probe, routes: Sequence[str]) -> bool:
    thought = answer(reasoning_content=R)
    field = next((route for route in routes if route in FIELDS), "reasoning_content")
    asked, parsed, *whole = probe.texts(
        ([user()], "none", True, False),
        ([user(), thought, user(Q2)], field, True, False),
        *(([user(), thought], route, False, False) for route in routes[:1]),
    )
    if not (parsed and whole and whole[0].startswith(asked)):
        return False
    written = whole[0][len(asked) :]
    body = written[: written.rfind(A) + len(A)]
    (unparsed,) = probe.texts(([user(), answer(body), user(Q2)], "none", True, False))
    return bool(unparsed) and unparsed != parsed


# ------------------------------------------------------------------ around the turns


@dataclass(frozen=True)
class Surroundings:
    """What a template writes around turns of plain text.

    Attributes:
        whole: a conversation of two questions and two answers; "" if the template refuses it.
        opening: what is at the beginning of a conversation and before no later turn, found with
            a system message; "" if there is none.
        answer_start: before every answer, in history and in served prompts alike, without outer
            whitespace; "" if it is not known.
        user_start: between an answer and the next question, without outer whitespace.
        keeps_reasoning: whether reasoning of an earlier turn is in a later prompt; None if
            the template takes none.
    """

    whole: str
    opening: str
    answer_start: str
    user_start: str
    keeps_reasoning: bool | None


def surroundings(renderer: Renderer, seen: Behaviour) -> Surroundings:
    """Probe a template whose behaviour is known; what it refuses, it does not write."""
    probe = _Probe(renderer, None)
    probe.shape = seen.shape
    two = [user(), answer(), user(Q2), answer(V)]
    system = [{"role": "system", "content": R}, user()]
    whole, served, opened = probe.texts(
        (two, "none", False, False),
        ([user()], "none", True, False),
        (system, "none", False, False),
    )
    head, found, rest = opened.partition(R)
    opening = head.rstrip() if found and head.rstrip() not in rest.partition(Q)[0] else ""
    start = os.path.commonprefix(  # noqa: RUF071 (of texts, letter by letter, as is wanted here)
        [served.partition(Q)[2], _between(whole, Q, A), _between(whole, Q2, V)]
    )
    return Surroundings(
        whole,
        opening,
        start.strip() if whole and served and not seen.headers[0] else "",
        _between(whole, A, Q2).strip() if served else "",
        _keeps_reasoning(probe, seen),
    )


def _keeps_reasoning(probe: _Probe, seen: Behaviour) -> bool | None:
    """Reasoning in a field, and between markers in the content: kept where both are."""
    field = next((route for route in seen.routes if route in FIELDS), "reasoning_content")
    opening, closing = (
        (seen.markers.open, seen.markers.close) if seen.markers else ("<think>", "</think>")
    )
    inline = answer(f"{opening}\n{R}\n{closing}\n\n{A}")
    kept: bool | None = None
    for turn, route in ((answer(reasoning_content=R), field), (inline, "none")):
        last, later = probe.texts(
            ([user(), turn], route, False, False),
            ([user(), turn, user(Q2), answer(V)], route, False, False),
        )
        if R in last and later:
            kept = R in later
            if not kept:
                return False
    return kept


def _between(text: str, left: str, right: str) -> str:
    return text.partition(left)[2].partition(right)[0]


def think_pairs(literals: str, added: Iterable[str], prompt: str = "") -> list[tuple[str, str]]:
    """(opening, closing) markers around reasoning, by their names, the template's own first.

    Both must be in use: in the template, or in the template and the tokenizer's added tokens.

    Args:
        literals: all text in the template.
        added: texts of the tokenizer's added tokens.
        prompt: a served prompt: a block that it leaves open is closed by the model alone.
    """
    texts = _MARKER.findall(literals)
    names = set(added)
    pairs: dict[tuple[str, str], None] = {}
    for mark in [*texts, *sorted(names)]:
        for opening, closing in _partners(mark):
            both = all(side in literals or side in names for side in (opening, closing))
            if both and _THOUGHT.search(closing):
                pairs.setdefault((opening, closing))
    found = [p for p in pairs if p[0] in literals or p[1] in literals]
    for mark in dict.fromkeys(texts):
        opened = prompt.rstrip().endswith(mark)
        if opened and _THOUGHT.search(mark) and not any(mark in pair for pair in found):
            found += [(mark, closing) for closing in _closings(mark)]
    return found


def _closings(mark: str) -> list[str]:
    """The marker that closes an opening one, by the way in which such pairs are written."""
    for end, start in _ENDS:
        if start in mark:
            return [mark.replace(start, end, 1)]
    return [] if "/" in mark else [mark[0] + "/" + mark[1:]]


def _partners(mark: str) -> list[tuple[str, str]]:
    found = []
    if "/" in mark[:3]:
        found.append((mark.replace("/", "", 1), mark))
    for end, start in _ENDS:
        if end in mark:
            found.append((mark.replace(end, start, 1), mark))
    return found
