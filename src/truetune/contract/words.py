"""Distinguish format around the parts of a turn from words that are not in the row."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

# What stands for a part in the text around the parts of a turn.
PART = "\x00"
# Whitespace that formats write beside an answer.
_SPACE = " \t\r\n"
# What stands for a control token or a tag once it is known.
_MARK = "\x01"
# Characters that stand for others here, and are no format of any template.
RESERVED = ("\x00", "\x01", "\x02")
# A marker with brackets turned outwards, of whose tags the neighbours are none.
TURNED = r"\]<\][^<>\[\]\n]{1,40}\[>\["
# Tags and bracketed markers are format if the tokenizer has no token for them either.
_TAG = re.compile(r"</?[^<>\n]{1,120}/?>|\[/?[A-Z][A-Z0-9_ ]*\]|\[\[?[A-Z_]+\]?\]")
_ENDING = re.compile(rf"(?:{_TAG.pattern}|\s)*$")
_QUOTED = re.compile(r"\"([^\"\n]{0,60})\"|'([^'\n]{0,60})'")
# The same in JSON that is text inside JSON.
_QUOTED_INSIDE = re.compile(r"\\+\"([^\"\n]{0,60}?)\\+\"")
_JSON = re.compile(r"^[\"'][{\[].*[}\]][\"']$")
_SENTENCE = re.compile(r"[^\W\d_]+,? +[^\W\d_]+,? +[^\W\d_]+")
_CONSTANT = re.compile(r"\b(?:true|false|null|True|False|None)\b")
_WORD = re.compile(r"[^\W\d_]+")
# A word of a format is written against code or punctuation, or in lower case after a marker.
_ATTACHED = re.compile(
    r"(?<=[`\[\](){}=./\"'<>:_\x00\x02-])[\w.]+"
    r"|(?<=\x01)[a-z_]+"
    r"|[\w.]+(?=[`\[({=/\"'<_\x00\x01\x02]|:(?=\S))"
)
_TWO_WORDS = re.compile(r"[^\W\d_]{2,} +[^\W\d_]{2,}")
# Letters against a part make another word of it: a name with an ending is another tool.
_GLUED = re.compile(rf"{PART}\w+|\w+{PART}")
_STOPPED = re.compile(r"[^\W\d_]+[.!?,;](?=\s|$|\x01)")


def words_in(
    frame: str,
    controls: Iterable[str],
    *,
    calls: bool,
    empties: bool = False,
    prompt: str = "",
    recipient: str = "",
    own: str = "",
) -> str:
    """The first words in the text around the parts of a turn, "" if it is format alone.

    Format is: control tokens, tags and bracketed markers; a short header between two of them, or
    one lower-case word after one and alone on its line (a channel); the recipient that a template
    names before every turn. Around tool calls also: quoted keys, words written against code or
    punctuation, and a label that the served prompt announces. Everything else with a letter in it
    is words.

    Args:
        frame: see `Skeleton.frame`.
        controls: texts of control tokens and think markers.
        calls: whether the turn has tool calls.
        empties: whether they hold empty values, around which tags have nothing between them.
        prompt: what was served.
        recipient: what is between the name of a tool and its arguments where the name is the
            first thing after the served prompt: there plain answers name a recipient as well.
        own: whitespace of the row's texts.
    """
    known = sorted({c for c in controls if not c.isspace() and _is_mark(c)}, key=len, reverse=True)
    text = frame = re.sub(TURNED, _MARK, frame)
    for control in known:
        text = text.replace(control, _MARK)
    if glued := _GLUED.search(text):
        return glued.group().replace(PART, "")
    if invented := _unknown_tag(frame, known, calls, empties):
        return invented
    marks = "|".join([*map(re.escape, known), _TAG.pattern])
    if twice := re.search(rf"({marks})\s*\1", frame):
        return twice.group()
    text = _TAG.sub(_MARK, text)
    if calls:
        for form in (_QUOTED_INSIDE, _QUOTED):
            for quoted in form.finditer(text):
                inside = quoted.group()
                if _JSON.search(inside):
                    inside = _CONSTANT.sub("\x02", inside)
                if _SENTENCE.search(inside):
                    return inside.replace("\x02", "\u2026")
            text = form.sub("\x02", text)
        text = _CONSTANT.sub("\x02", text)
    pieces = re.split(f"([{PART}{_MARK}])", text)
    for number in range(0, len(pieces), 2):
        stretch = pieces[number]
        left = pieces[number - 1] if number else ""
        right = pieces[number + 1] if number + 1 < len(pieces) else ""
        if not _WORD.search(stretch):
            # A sign beside an answer is trained like a word; between two marks it is format.
            sign = stretch.strip(_SPACE + own) if not calls or not stretch.isascii() else ""
            if sign and not left == right == _MARK:
                return sign
            continue
        if not _is_format(stretch, left, right, calls, prompt, recipient):
            return stretch.strip().replace("\x02", "\u2026")
    return ""


def _unknown_tag(text: str, known: Collection[str], calls: bool, empties: bool) -> str:
    """A tag that says something instead of holding something, "" if there is none.

    The tokenizer does not know it. Around a plain answer a tag must have its other side after it,
    and so must one that ends a turn of several parts.
    """
    several = calls or text.count(PART) > 1
    tags = list(_TAG.finditer(text))
    ending = _ENDING.search(text)
    end = ending.start() if ending else len(text)
    for number, found in enumerate(tags):
        tag = found.group()
        if tag in known:
            continue
        if _SENTENCE.search(tag) and not re.search(r"[=|\"]", tag):
            return tag
        if PART in tag or (several and found.start() < end):
            continue
        before = [t for t in tags[:number] if several or PART in text[t.end() : found.start()]]
        behind = [t for t in tags[number + 1 :] if empties or PART in text[found.end() : t.start()]]
        sides = (t.group() for t in (*before, *behind))
        if not any(_stem(side) == _stem(tag) and side != tag for side in sides):
            return tag
    return ""


def lone_tag(pieces: Sequence[tuple[str, str, str]], controls: Iterable[str], prompt: str) -> str:
    """A tag before the text or the calls of a turn that nothing closes and that neither the
    tokenizer nor the served prompt knows, "" for none.

    Args:
        pieces: see `words_beside_calls`.
        controls: texts of control tokens and think markers.
    """
    known = set(controls)
    stems = [_stem(tag) for _, text, _ in pieces for tag in dict.fromkeys(_TAG.findall(text))]
    for left, text, right in pieces:
        if left == "call" or (left and right != "text"):
            continue
        tags = list(_TAG.finditer(text))
        for found, behind in itertools.zip_longest(tags, tags[1:]):
            tag = found.group()
            if tag in known or tag in prompt or stems.count(_stem(tag)) > 1:
                continue
            # A call begins with its own marker: what is before that one says nothing.
            first = text[found.end() : behind.start() if behind else len(text)]
            if not first.strip() and (right == "text" if behind is None else right != ""):
                return tag
    return ""


def is_held(pieces: Sequence[tuple[str, str, str]], controls: Iterable[str]) -> bool:
    """Whether two sides of a tag that is no control token hold the text of a turn."""
    known = set(controls)
    for (_, before, kind), (_, behind, _) in itertools.pairwise(pieces):
        tags, closing = list(_TAG.finditer(before.rstrip())), _TAG.match(behind.lstrip())
        if kind != "text" or not tags or closing is None or tags[-1].end() < len(before.rstrip()):
            continue
        opening = tags[-1].group()
        if opening not in known and _stem(opening) == _stem(closing.group()) != "":
            return True
    return False


def _stem(tag: str) -> str:
    """The name of a tag, the same for its two sides."""
    name = re.match(r"[^\w]*([\w.:-]+)", tag)
    bare = re.sub(r"begin|start|open|end|stop|close", "", name[1].lower()) if name else ""
    return bare.strip("_.:-")


def markers_in(pieces: Iterable[str], controls: re.Pattern[str] | None) -> list[str]:
    """The control tokens and tags in what a template writes between the parts of a turn."""
    found: dict[str, None] = {}
    for piece in pieces:
        found |= dict.fromkeys(controls.findall(piece) if controls else [])
        found |= dict.fromkeys(_TAG.findall(piece))
    return [marker for marker in found if len(marker.strip()) > 2]


# Which side of a pair a marker is.
_OPENING = re.compile(r"(?<![a-z])(?:begin|start|open)(?![a-z])")
_CLOSING = re.compile(r"(?<![a-z])(?:end|stop|close)(?![a-z])")
_HOLLOW = re.compile(r"\{\s*\}|\[\s*\]")


def hollow(text: str, controls: re.Pattern[str] | None) -> Counter[str]:
    """Brackets and pairs of markers with nothing between them, counted."""
    found = Counter("".join(pair.split()) for pair in _HOLLOW.findall(text))
    for (one, _, end), (other, start, _) in itertools.pairwise(_markers(text, controls)):
        name, side = side_of(one)
        pair = name and PART not in one and side > 0 and side_of(other) == (name, -1)
        if pair and not _HOLLOW.sub("", text[end:start]).strip():
            found[one + other] += 1
    return found


# A tag that has two sides wherever a format writes it.
_TWO_SIDED = re.compile(r"</?[A-Za-z\uff5c\x00][^<>|]*>")


def unpaired(
    text: str,
    controls: re.Pattern[str] | None,
    marks: Iterable[str],
    tokens: Collection[str],
    prompt: str,
    *,
    calls: bool,
) -> str:
    """A marker without its other side, "" for none: of those that stand in the text with both, and
    in a turn with calls of tags, and of tokens of which the tokenizer has both sides.

    Args:
        marks: markers that may stand alone.
        tokens: the tokenizer's control tokens.
        prompt: as served, which may have opened what a turn closes.
    """
    found = [(marker, *side_of(marker)) for marker in markers_of(text, controls)]
    alone = {"", *(side_of(mark)[0] for mark in marks)}
    sides = {(name, side) for _, name, side in found}
    known = {side_of(token) for token in tokens}
    for name in dict.fromkeys(name for _, name, side in found if name not in alone and side):
        if not {(name, 1), (name, -1)} <= sides:
            first = next(m for m, other, _ in found if other == name)
            opened = sum(
                side for n, side in map(side_of, markers_of(prompt, controls)) if n == name
            )
            both = {(name, 1), (name, -1)} <= known and not (opened > 0 and (name, -1) in sides)
            if calls and (both or (first not in tokens and _lacks(first, text, sides))):
                return first
            continue
        deep = 0
        for marker, _, side in (m for m in found if m[1] == name):
            deep += side
            if deep < 0:
                return marker
        if deep:
            return next(m for m, other, _ in reversed(found) if other == name)
    return ""


def _lacks(tag: str, text: str, sides: Collection[tuple[str, int]]) -> bool:
    """Whether a tag that is in a text with one side should have two: a closing one, one with an
    attribute, and one before a value where others are closed. Some formats have a tag before a call
    alone."""
    if not _TWO_SIDED.fullmatch(tag):
        return False
    if tag.startswith("</") or re.search(r"[=\s]", tag):
        return True
    # Other names than those of XML are signs that stand alone.
    plain = tag + PART in text and re.match(r"<[A-Za-z]", tag) is not None
    return plain and any((name, -side) in sides for name, side in sides)


def markers_of(text: str, controls: re.Pattern[str] | None) -> list[str]:
    """The control tokens and tags in a text."""
    return [marker for marker, _, _ in _markers(text, controls)]


def is_tag(text: str) -> bool:
    """Whether a text is one tag or bracketed marker, of which the other side has a slash."""
    return re.fullmatch(r"</?[A-Za-z][^<>|]*>|\[/?[A-Z][A-Z0-9_ ]*\]", text) is not None


def _markers(text: str, controls: re.Pattern[str] | None) -> Iterator[tuple[str, int, int]]:
    """(marker, start, end) of control tokens and tags."""
    either = f"{controls.pattern}|{_TAG.pattern}" if controls else _TAG.pattern
    for found in re.finditer(either, text):
        yield found.group(), found.start(), found.end()


def side_of(marker: str) -> tuple[str, int]:
    """(the name of a marker, the same for both sides; 1 where it opens, -1 where it closes)."""
    bare = marker.strip("<>[]|\uff5c/ ")
    named = re.match(r"[^\s=\"'<>]+", bare)
    name = named.group().lower() if named else ""
    closes = (
        "/" in marker[:3] or bool(_CLOSING.search(name)) or bool(re.match(r"<[^|].*\|>", marker))
    )
    stem = _CLOSING.sub("", _OPENING.sub("", name)).strip("_.:-\u2581|\uff5c")
    return stem, 0 if marker.endswith("/>") else -1 if closes else 1


# Signs that are no format where they stand beside the text of a turn, and brackets and quotes that
# hold it.
_SIGN = r"-!?.+*#$%@^~|=&\\\u2026"
_BEFORE = re.compile(rf"(?:[{_SIGN}(\[{{`]|(?<![:,\[] )(?<![:,\[])[\"'])+$")
_BEHIND = re.compile(rf"[{_SIGN})\]}}`]+|[\"'](?!\s*[,}}])")
_BRACKETED = re.compile(r"\[/?[\w:.-]+\]")


# A block of code around a call.
_FENCE = re.compile(r"(?:^|(?<=\n)|(?<=: ))```[\w-]*(?=\n|$)")


def sign_beside(before: str, behind: str, controls: re.Pattern[str] | None) -> str:
    """A sign between a text and what is around it, "" if there is none."""
    for marker in (controls, _TAG, _BRACKETED, _FENCE):
        if marker:
            before, behind = marker.sub(_MARK, before), marker.sub(_MARK, behind)
    found = _BEFORE.search(before.rstrip()) or _BEHIND.match(behind.lstrip())
    return found.group() if found else ""


# A bracketed marker, and no list of one number, true, false or null.
_NAMED_BRACKET = re.compile(r"\[/?(?!(?:true|false|null|True|False|None)\])[A-Za-z_][\w:.-]*\]")
# Where a call begins that no marker begins, and what belongs to a call at its end.
_CALL_BEGINS, _CALL_ENDS = re.compile(r"[\[({`<>]"), re.compile(r"[\])}>`\"']")
# The name of a format against the bracket of its list; and what names the recipient of a call.
_FORMAT_NAME, _TO = re.compile(r"[\w.]+$"), re.compile(r"(?:[\w.]+=[\w.]*|[\w.]*\.)$")


def words_beside_calls(
    pieces: Sequence[tuple[str, str, str]], controls: Iterable[str], prompt: str, recipient: str
) -> str:
    """The first text of a turn with calls that is outside of them and is no format.

    A client gets as content what is before the first marker or bracket of a call, after the
    last one, or against the text of the turn: there a format has whitespace, and a label that the
    served prompt announces.

    Args:
        pieces: (the kind of part before it, text, the kind of part after it) of what is
            around the parts: "text", "call", or "" for none.
        controls: texts of control tokens and think markers.
        prompt: what was served.
        recipient: see `words_in`.
    """
    known = sorted({c for c in controls if not c.isspace() and _is_mark(c)}, key=len, reverse=True)
    has_leaf = any("call" in (left, right) for left, _, right in pieces)
    for left, text, right in pieces:
        masked = re.sub(TURNED, _MARK, text)
        for control in known:
            masked = masked.replace(control, _MARK)
        masked = _FENCE.sub(_MARK, _NAMED_BRACKET.sub(_MARK, _TAG.sub(_MARK, masked)))
        segments = masked.split(_MARK)
        begins = left != "call" and (right == "call" or (not right and not has_leaf))
        found = []
        if right == "text" and (left != "call" or len(segments) > 1):
            to = rf"[a-z_]+{re.escape(recipient)}\s*"
            named = not left and recipient and re.fullmatch(to, segments[-1])
            found.append("" if named else segments[-1])
        if left == "text" and not begins:
            found.append(segments[0])
        if begins:
            found.append(_lead(masked, segments))
        if not right and (left == "call" or not has_leaf):
            last = segments[-1]
            # Behind a marker nothing is left to close, unless arguments begin after it.
            open_still = len(segments) == 1 or last.lstrip()[:1] in ("{", "[")
            closing = [c.end() for c in _CALL_ENDS.finditer(last)] if open_still else []
            found.append(last[max(closing, default=0) :])
        for outside in map(str.strip, found):
            if outside and not (outside.endswith(":") and _announced(outside, prompt)):
                return outside
    return ""


def _lead(masked: str, segments: Sequence[str]) -> str:
    """What is before the first call."""
    if len(segments) > 1:
        return segments[0]
    begun = _CALL_BEGINS.search(masked)
    if begun is None:
        return _TO.sub("", masked)
    lead = masked[: begun.start()]
    return _FORMAT_NAME.sub("", lead) if begun.group() in "[({`" else lead


def _announced(label: str, prompt: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(label)}", prompt) is not None


def _is_mark(control: str) -> bool:
    """Whether what is around reasoning is a marker, and no words before one."""
    bare = _TAG.sub(_MARK, control.strip())
    before, found, _ = bare.partition(_MARK)
    if found and _WORD.search(before):
        return False
    return bool(bare) and not (_STOPPED.search(bare) or _SENTENCE.search(bare))


# A label at the beginning of a line, and the keys of a call in YAML.
_LABEL = re.compile(
    r"(^|\n)[ \t]*(?:-[ \t]+)?([^\s\x00-\x02:{}\[\]\"'][^\n\x00-\x02:{}\[\]\"']{0,30}:)"
)


def _is_format(
    stretch: str, left: str, right: str, calls: bool, prompt: str, recipient: str
) -> bool:
    if calls:
        stretch = _LABEL.sub(lambda m: m[1] if _announced(m[2], prompt) else m[0], stretch)
    if not stretch.isascii():
        return False
    whole = left + stretch + right
    sentence = _STOPPED.search(whole)
    if left == right == _MARK and not sentence and len(_WORD.findall(stretch)) <= 3:
        return True
    if left == _MARK and re.fullmatch(r"\s*[a-z_]+\n\s*", stretch):
        return True
    if recipient and not left and re.fullmatch(rf"[a-z_]+{re.escape(recipient)}\s*", stretch):
        return True
    if not calls or sentence:
        return False
    loose = _ATTACHED.sub("", whole)
    if _TWO_WORDS.search(loose):
        return False
    return not _WORD.search(loose) or stretch.strip() in prompt
