"""A second judge of what is trained, which shares no code with truetune.

It knows two things: `apply_chat_template` of a transformers tokenizer, which is what a server
sends, and how the formats of model families write reasoning, content and calls. From these it says
of a row's examples whether they are exact or wrong, and of a refusal whether the row could have
been trained.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]


class Wrong(Exception):
    """What is trained is not what is served, or not what the row says."""


@dataclass(frozen=True)
class Trained:
    """What became of one row, as plain values.

    Attributes:
        examples: (ids, mask) of each sequence; a mask of 1 is supervised.
        turns: per sequence the indices of the messages that it trains.
        kwargs: template arguments of the run.
        stop_ids: ids on which the server stops.
    """

    examples: Sequence[tuple[Sequence[int], Sequence[int]]]
    turns: Sequence[Sequence[int]]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: Sequence[int] = ()


# ------------------------------------------------------------------ what a server sends

_REASONING = ("reasoning_content", "reasoning", "thinking")


def _histories(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """The conversation as a client may send it back: with the reasoning that a server parsed, under
    the name that the template reads, or without it."""
    plain = [{k: v for k, v in m.items() if k != "train"} for m in messages]
    yield plain
    if not any(name in m for m in plain for name in _REASONING):
        return
    bare = [{k: v for k, v in m.items() if k not in _REASONING} for m in plain]
    thoughts = [next((m[n] for n in _REASONING if n in m), None) for m in plain]
    yield bare
    for name in _REASONING:
        yield [
            {**m, name: thought} if thought else m
            for m, thought in zip(bare, thoughts, strict=True)
        ]


def _parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m.get("content"), str)
        else dict(m)
        for m in messages
    ]


def _arguments_as_text(messages: Sequence[Message]) -> list[dict[str, Any]]:
    made = []
    for message in messages:
        calls = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for call in message.get("tool_calls") or []
        ]
        made.append({**message, "tool_calls": calls} if calls else dict(message))
    return made


def _arguments_as_objects(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As servers prepare what OpenAI's clients send: JSON text becomes an object."""
    made = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or []:
            given = call["function"]["arguments"]
            arguments = json.loads(given) if isinstance(given, str) else given
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        made.append({**message, "tool_calls": calls} if calls else dict(message))
    return made


@dataclass
class Server:
    """A server with this tokenizer."""

    tokenizer: Any
    tools: Sequence[Mapping[str, Any]] | None
    kwargs: Mapping[str, Any]

    def text(self, messages: Sequence[Message], *, prompt: bool) -> str | None:
        """The rendering; None where the template refuses."""
        try:
            made = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(tool) for tool in self.tools] if self.tools else None,
                add_generation_prompt=prompt,
                tokenize=False,
                **self.kwargs,
            )
        except Exception:  # whatever a template raises
            return None
        return str(made)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _clients(self, messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
        """What clients send back. A think block inside the content is as the row has it where the
        template takes it out of history itself; else a reasoning parser has taken it out."""
        yield from _histories(messages)
        split = [_readings(dict(m)) for m in messages]
        last = [list(readings)[-1] for readings in split]
        if last == list(messages):
            return
        text = self.text(messages, prompt=True)
        thoughts = [m["reasoning_content"].strip() for m in last if m.get("reasoning_content")]
        if text is not None and not any(thought in text for thought in thoughts):
            return
        stripped = [
            {k: v.strip() if k in ("content", "reasoning_content") else v for k, v in m.items()}
            if m != original
            else m
            for m, original in zip(last, messages, strict=True)
        ]
        yield from _histories(last)
        yield from _histories(stripped)

    def forms(self, messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
        """Messages in the form in which this template takes them: plain text and objects, else
        typed parts, else arguments as JSON text."""
        objects = _arguments_as_objects(messages)
        # A template that drops the last question has no form that shows it.
        for asked in (True, False):
            for shape in (list, _parts, _arguments_as_text):
                probe = shape(_probing(objects))
                text = self.text(next(_histories(probe)), prompt=True)
                if text is not None and _takes(text, probe, asked):
                    yield from self._clients(shape(objects))
                    return
        yield from self._clients(objects)


_PROBE = {"zz": "zzprobezz", "nn": 73197}


def _probing(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation with arguments of its own kind in each call."""
    made = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": dict(_PROBE)}}
            for call in message.get("tool_calls") or []
        ]
        made.append({**message, "tool_calls": calls} if calls else dict(message))
    return made


def _takes(text: str, messages: Sequence[Message], asked: bool) -> bool:
    """Whether a rendering of probing messages holds one of the arguments, and the last question
    where it is `asked` for, and nothing in Python's own notation."""
    if "{'type'" in text or re.search(r"\{'[\w-]+': ", text):
        return False
    said = [m["content"] for m in messages if m["role"] in ("user", "tool")]
    parts = [c if isinstance(c, str) else c[0]["text"] for c in said[-1:] if asked]
    calls = any(m.get("tool_calls") for m in messages)
    if calls and not any(str(value) in text for value in _PROBE.values()):
        return False
    return all(any(form.strip() in text for form in _leaf_forms(part)) for part in parts)


# ------------------------------------------------------------------ what a server reads back

# Words of the families' formats: what may stand beside the parts of an answer.
FORMAT_WORDS = frozenset(
    [
        "name",
        "names",
        "arguments",
        "parameters",
        "parameter",
        "params",
        "param",
        "function",
        "functions",
        "type",
        "id",
        "tool",
        "tools",
        "call",
        "calls",
        "tool_call",
        "tool_calls",
        "tool_call_id",
        "tool_name",
        "invoke",
        "assistant",
        "analysis",
        "commentary",
        "final",
        "json",
        "to",
        "code",
        "string",
        "true",
        "false",
        "key",
        "value",
        "arg",
        "args",
        "with",
        "input",
        "recipient",
        "all",
        "channel",
        "content",
        "response",
        "output",
        "thought",
        "action",
        "index",
    ]
)
_MARKER = re.compile(
    r"<[^<>\n]{1,80}>|\[/?[A-Z_]{2,30}\]|\]~[^\[\n]{1,30}~?\[|\[e~\[|\[end~|\]~b\]"
    r"|[\u25c1\u300a\u3010][^\n]{1,40}?[\u25b7\u300b\u3011]"
)
_THINK = re.compile(r"think|thought|reason|analysis|scratch|plan", re.IGNORECASE)
_OPENED = re.compile(r"[<\[](?![/|]*end)(?!/)[^<>\[\]/]*think[^<>\[\]/]*[>\]]\s*$", re.IGNORECASE)
_PUNCTUATION = re.compile(r"[\s{}\[\]()<>:,\"'`=/|.\\_\uff5c\u2581~-]*")


@dataclass(frozen=True)
class Format:
    """What a template can write: its source and the tokenizer's added tokens."""

    source: str
    added: frozenset[str]
    ids: frozenset[str] = frozenset()
    """What some formats write of the row's calls again: their identifiers, and </key>."""

    def knows(self, marker: str) -> bool:
        """Whether a marker stands in the template, whole or as the beginning of a filled one."""
        if marker in self.added or marker in self.source:
            return True
        stem = re.match(r"</?[\uff5c|]?[\w\uff5c\u2581:.-]+(?=[= ]|$)", marker)
        return bool(stem) and (
            stem.group() in self.source or any(stem.group() in token for token in self.added)
        )

    def frame(self, text: str) -> str | None:
        """None where a text beside the parts is format alone; else what is not."""
        text = self._without_added(text)
        for bar in re.findall(r"\uff5c\w+\uff5c", text):
            if bar in self.source:
                text = text.replace(bar, "")
        for identifier in self.ids:
            text = text.replace(identifier, " ")
        for marker in _MARKER.findall(text):
            if not self.knows(marker):
                # A marker of another shape than looks: only its own words are judged.
                continue
            text = text.replace(marker, "\0", 1)
        for word in re.findall(r"\w+", text):
            if word not in FORMAT_WORDS and not re.fullmatch(r"functions?|\d", word):
                return word
        rest = re.sub(r"\w+|\0", "", text)
        return None if _PUNCTUATION.fullmatch(rest) else rest.strip()

    def _without_added(self, text: str) -> str:
        for token in sorted(self.added, key=len, reverse=True):
            if token in text and not token.isspace():
                text = text.replace(token, "\0")
        return text

    def markers(self, text: str) -> list[str]:
        """Markers of the template in a frame."""
        bars = [bar for bar in re.findall(r"\uff5c\w+\uff5c", text) if bar in self.source]
        begun = re.findall(r"<[^<>\n]+$", text)
        signs = [sign for sign in re.findall(r"[<>=#-]{3,}", text) if sign in self.source]
        found = [m for m in [*_MARKER.findall(text), *begun] if self.knows(m)] + signs + bars
        return found + [token for token in self.added if token in text and token.strip()]


def _leaf_forms(leaf: Any) -> list[str]:
    if isinstance(leaf, str):
        once = [json.dumps(leaf, ensure_ascii=a)[1:-1] for a in (False, True)]
        twice = [json.dumps(text, ensure_ascii=a)[1:-1] for text in once for a in (False, True)]
        return list(dict.fromkeys([leaf, *once, *twice, repr(leaf)[1:-1]]))
    return list(dict.fromkeys([json.dumps(leaf), str(leaf)]))


def _leaves(value: Any, *, ordered: bool = True) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key in value if ordered else sorted(value):
            yield key
            yield from _leaves(value[key], ordered=ordered)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, ordered=ordered)
    else:
        yield value


@dataclass(frozen=True)
class _Atom:
    """A text that must stand in the completion, in one of its forms."""

    forms: tuple[str, ...]
    label: str
    begins: str = ""
    """The part that it begins: content, reasoning, or call."""


def _call_atoms(call: Mapping[str, Any], label: str) -> list[list[_Atom]]:
    """The ways in which the leaves of a call may follow each other: an object has no order."""
    function = call["function"]
    arguments = function["arguments"]
    name = function["name"]
    orders = [arguments, dict(reversed(arguments.items())), dict(sorted(arguments.items()))]
    if len(arguments) <= 3:
        orders += [dict(order) for order in itertools.permutations(arguments.items())]
    sequences = [list(_leaves(order)) for order in orders]
    sequences.append(list(_leaves(arguments, ordered=False)))
    ways: list[list[_Atom]] = []
    for leaves in sequences:
        for sequence in ([name, *leaves], [*leaves, name]):
            atoms = [_Atom(tuple(_leaf_forms(x)), f"{x!r} of {label}") for x in sequence]
            atoms[0] = _Atom(atoms[0].forms, atoms[0].label, "call")
            if atoms not in ways:
                ways.append(atoms)
    return ways


def read_back(
    body: str, message: Message, prompt: str, form: Format, normalised: Any = lambda text: text
) -> None:
    """Whether the row's reasoning, content and calls stand in a completion: each part, in order,
    exactly once, and nothing else but format.

    Raises:
        Wrong: they do not.
    """
    first: Wrong | None = None
    for reading in _readings(_arguments_as_objects([message])[0]):
        try:
            _read_one(body, reading, prompt, form, normalised)
            return
        except Wrong as error:
            first = first or error
    assert first
    raise first


def _readings(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A message as it is; with a think block in front of its content also as reasoning and content,
    which is what a server's parser makes of it."""
    yield message
    block = re.fullmatch(
        r"\s*<(\w+)>(.*?)</\1>(.*)", str(message.get("content") or ""), flags=re.DOTALL
    )
    if block and _THINK.search(block[1]):
        yield {**message, "reasoning_content": block[2], "content": block[3]}


def _read_one(body: str, message: Message, prompt: str, form: Format, normalised: Any) -> None:
    reasoning = next((str(message[n]) for n in _REASONING if message.get(n)), "").strip()
    content = str(message.get("content") or "").strip()
    calls = message.get("tool_calls") or []
    if not reasoning and _OPENED.search(prompt):
        raise Wrong(f"the prompt opens a think block before an answer without reasoning: {body!r}")
    groups: list[list[list[_Atom]]] = []
    for text, label in ((reasoning, "reasoning"), (content, "content")):
        if text:
            forms = tuple(dict.fromkeys((text, normalised(text).strip())))
            groups.append([[_Atom(forms, f"the {label}", label)]])
    for number, call in enumerate(calls):
        groups.append(_call_atoms(call, f"call {number}"))
    furthest = _Furthest()
    for ways in itertools.product(*groups):
        atoms = [atom for way in ways for atom in way]
        if _tiled(body, 0, atoms, 0, "", form, prompt, furthest):
            _typed(body, calls)
            return
    raise Wrong(furthest.why or f"not to be read back: {body!r}")


class _Furthest:
    """The reason at the place where reading came furthest."""

    def __init__(self) -> None:
        self.at, self.why = (-1, -1), ""

    def note(self, at: tuple[int, int], why: str) -> None:
        if at > self.at:
            self.at, self.why = at, why


def _tiled(
    body: str,
    start: int,
    atoms: Sequence[_Atom],
    index: int,
    before: str,
    form: Format,
    prompt: str,
    furthest: _Furthest,
) -> bool:
    """Whether the atoms from `index` on tile the rest of the body, with format between them."""
    if index == len(atoms):
        rest = body[start:]
        bad = form.frame(rest)
        if bad is None and _THINK.search(rest) and not any(a.begins == "reasoning" for a in atoms):
            bad = rest.strip()
        if bad is not None:
            furthest.note((index, 1), f"{bad!r} stands behind {before or 'nothing'}: {body!r}")
        return bad is None
    atom = atoms[index]
    found = False
    for text in atom.forms:
        at = body.find(text, start)
        while at >= 0 and text:
            found = True
            piece = body[start:at]
            bad = _between(piece, before, atom, atoms, form, prompt)
            if bad is None:
                following = at + len(text)
                # What begins the part is remembered until the next part begins.
                part = atom.begins or before
                if _tiled(body, following, atoms, index + 1, part, form, prompt, furthest):
                    return True
            else:
                furthest.note((index, 1), f"{bad} before {atom.label}: {body!r}")
            at = body.find(text, at + 1)
    if not found:
        furthest.note((index, 0), f"{atom.label} is not there: {body!r}")
    return False


def _between(
    piece: str, before: str, atom: _Atom, atoms: Sequence[_Atom], form: Format, prompt: str
) -> str | None:
    """What is wrong with the text between two parts, None where nothing."""
    bad = form.frame(piece)
    if bad is not None:
        return f"{bad!r} stands"
    if atom.begins == "reasoning":
        opener = (prompt[-60:] + piece).rstrip()
        if not _THINK.search(opener):
            return "no think marker stands"
        if len(_THINK.findall(piece)) > 1:
            return f"more than one think marker, {piece!r}, stands"
    reasoned = any(a.begins == "reasoning" for a in atoms)
    if not reasoned and _THINK.search(piece):
        return f"a think block that the row does not have, {piece!r}, stands"
    if before == "reasoning" and atom.begins and not form.markers(piece):
        return "no marker behind the reasoning stands"
    if before == "content" and atom.begins == "call" and not form.markers(piece):
        return "no marker between content and call stands"
    return None


def _typed(body: str, calls: Sequence[Mapping[str, Any]]) -> None:
    """Where arguments stand as JSON, they must be those of the row with their types."""
    objects = [value for value in _json_values(body) if isinstance(value, dict)]
    for call in calls:
        arguments = call["function"]["arguments"]
        same = [o for o in _objects(objects) if set(o) == set(arguments) and arguments]
        if same and not any(
            json.dumps(o, sort_keys=True) == json.dumps(arguments, sort_keys=True) for o in same
        ):
            raise Wrong(f"the arguments {same[0]} are not {arguments}")


def _objects(values: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for value in values:
        if isinstance(value, dict):
            yield value
            yield from _objects(list(value.values()))
        elif isinstance(value, list):
            yield from _objects(value)
        elif isinstance(value, str) and value.startswith("{"):
            with contextlib.suppress(ValueError):
                yield from _objects([json.loads(value)])


def _json_values(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            yield value
        except ValueError:
            end = at + 1
        at = text.find("{", end)


# ------------------------------------------------------------------ the judgement


def judge(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    trained: Trained,
    loss_on: str = "assistant",
) -> None:
    """Hold a row's examples against what is served and what the row says.

    Raises:
        Wrong: they are not exact.
    """
    server = Server(tokenizer, tools, trained.kwargs)
    expected = trained_turns(messages, loss_on)
    if sorted(turn for turns in trained.turns for turn in turns) != expected:
        raise Wrong(f"turns {trained.turns} are trained, not {expected}")
    form = _format(tokenizer, messages)
    for (ids, mask), turns in zip(trained.examples, trained.turns, strict=True):
        ids, mask = list(ids), list(mask)
        rest = list(mask)
        for turn in turns:
            prompt, prompt_ids = _served(server, messages, turn, ids)
            end = next(
                (i for i in range(len(prompt_ids), len(ids)) if ids[i] in trained.stop_ids), None
            )
            if end is None:
                raise Wrong(f"message {turn} ends on no stop token")
            span = range(len(prompt_ids), end + 1)
            if not all(mask[i] for i in span):
                raise Wrong(f"a part of the completion of message {turn} is not supervised")
            for i in span:
                rest[i] = 0
            start = len(_decoded(tokenizer, prompt_ids))
            body = _decoded(tokenizer, ids[:end])[start:]
            try:
                read_back(body, messages[turn], prompt, form, _round_trip(tokenizer))
                _as_rendered(server, messages, turn, prompt, body)
            except Wrong as error:
                raise Wrong(f"message {turn}: {error}") from None
        if any(rest):
            at = next(i for i, value in enumerate(rest) if value)
            raise Wrong(
                f"supervised outside of completions: {_decoded(tokenizer, ids[at : at + 9])!r}"
            )


def could_be_trained(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    stop_ids: Sequence[int],
    switches: Sequence[Mapping[str, Any]] = ({},),
    loss_on: str = "assistant",
) -> bool:
    """Whether rendering alone makes an exact completion of every turn: then a refusal is false."""
    return any(
        _renders_exactly(Server(tokenizer, tools, kwargs), messages, stop_ids, loss_on)
        for kwargs in switches
    )


def _renders_exactly(
    server: Server, messages: Sequence[Message], stop_ids: Sequence[int], loss_on: str
) -> bool:
    tokenizer = server.tokenizer
    form = _format(tokenizer, messages)
    for turn in trained_turns(messages, loss_on):
        own = messages[turn]
        apart = {
            k: v.strip() if isinstance(v, str) else v
            for k, v in list(_readings(dict(own)))[-1].items()
        }
        ways = (
            [own]
            if apart == own or apart.get("reasoning_content") == own.get("reasoning_content")
            else [apart]
        )
        for shown in (f for way in ways for f in server.forms([*messages[:turn], way])):
            prompt = server.text(shown[:turn], prompt=True)
            whole = server.text(shown, prompt=False)
            if prompt is None or whole is None or not whole.startswith(prompt):
                continue
            ids, prompt_ids = server.ids(whole), server.ids(prompt)
            if ids[: len(prompt_ids)] != prompt_ids:
                continue
            end = next((i for i in range(len(prompt_ids), len(ids)) if ids[i] in stop_ids), None)
            if end is None:
                continue
            body = _decoded(tokenizer, ids[:end])[len(_decoded(tokenizer, prompt_ids)) :]
            try:
                read_back(body, messages[turn], prompt, form, _round_trip(tokenizer))
            except Wrong:
                continue
            break
        else:
            return False
    return True


def trained_turns(messages: Sequence[Message], loss_on: str) -> list[int]:
    turns = [
        i
        for i, m in enumerate(messages)
        if m["role"] == "assistant" and m.get("train") is not False
    ]
    return turns[-1:] if loss_on == "last" else turns


def _served(
    server: Server, messages: Sequence[Message], turn: int, ids: Sequence[int]
) -> tuple[str, list[int]]:
    """The served prompt of a turn that the sequence begins with: (text, ids).

    Raises:
        Wrong: it begins with none.
    """
    texts = dict.fromkeys(server.text(form, prompt=True) for form in server.forms(messages[:turn]))
    prompts = [(text, server.ids(text)) for text in texts if text is not None]
    fitting = [(t, p) for t, p in prompts if list(ids[: len(p)]) == p]
    if not fitting:
        served = repr(prompts[0][0][-160:]) if prompts else "nothing: the template refuses"
        got = _decoded(server.tokenizer, ids)
        raise Wrong(f"the prompt of message {turn} is not served: {served}; trained {got[-320:]!r}")
    return max(fitting, key=lambda pair: len(pair[1]))


def _as_rendered(
    server: Server, messages: Sequence[Message], turn: int, prompt: str, body: str
) -> None:
    """Where the template's own rendering of the turn goes on from the prompt, the completion must
    be what it writes there, whitespace included.

    Raises:
        Wrong: it is something else.
    """
    tails = []
    for form in server.forms(messages[: turn + 1]):
        before = server.text(form[:turn], prompt=True)
        whole = server.text(form, prompt=False)
        if before == prompt and whole is not None and whole.startswith(prompt):
            tails.append(whole[len(prompt) :])
    message = messages[turn]
    if not tails or any(message.get(name) for name in _REASONING):
        return  # composed: the parts are judged
    same = _round_trip(server.tokenizer)
    if any(tail.startswith(body) or same(tail).startswith(same(body)) for tail in tails):
        return
    if any(_THINK.search(tail[: max(len(tail) - len(body), 0)]) for tail in tails):
        return  # a think block that the template writes before every answer was left out by choice
    raise Wrong(f"{body!r} is trained where the template writes {tails[0]!r}")


def _format(tokenizer: Any, messages: Sequence[Message]) -> Format:
    source = tokenizer.chat_template
    source = source if isinstance(source, str) else "\n".join(source.values())
    source = source.replace('\\"', '"').replace("\\'", "'").replace("\\n", "\n")
    added = frozenset(str(t) for t in tokenizer.added_tokens_decoder.values())
    calls = [c for m in _arguments_as_objects(messages) for c in m.get("tool_calls") or []]
    ids = {str(c["id"]) for c in calls if c.get("id")}
    ids |= {f"</{key}>" for c in calls for key in _keys(c["function"]["arguments"])}
    return Format(source, added, frozenset(ids))


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from value
        for inner in value.values():
            yield from _keys(inner)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    made = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(made)


def _round_trip(tokenizer: Any) -> Any:
    def same(text: str) -> str:
        return _decoded(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])

    return same
