"""Distinguish format around the parts of a turn from words that are not in the row."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

# Placeholder for a part in the text around the parts of a turn.
PART = "\x00"
# Whitespace that formats write next to an answer.
_SPACE = " \t\r\n"
# Placeholder for a control token or a tag once it is recognised.
_MARK = "\x01"
# Placeholder characters of this module; no template writes them as format.
RESERVED = ("\x00", "\x01", "\x02")
# A marker with its brackets turned outwards; the text on its two sides is not a pair of tags.
TURNED = r"\]<\][^<>\[\]\n]{1,40}\[>\["
# Tags and bracketed markers are format even if the tokenizer has no token for them.
_TAG = re.compile(r"</?[^<>\n]{1,120}/?>|\[/?[A-Z][A-Z0-9_ ]*\]|\[\[?[A-Z_]+\]?\]")
_ENDING = re.compile(rf"(?:{_TAG.pattern}|\s)*$")
_QUOTED = re.compile(r"\"([^\"\n]{0,60})\"|'([^'\n]{0,60})'")
# Quoted text in JSON that is itself a string inside JSON.
_QUOTED_INSIDE = re.compile(r"\\+\"([^\"\n]{0,60}?)\\+\"")
_JSON = re.compile(r"^[\"'][{\[].*[}\]][\"']$")
_SENTENCE = re.compile(r"[^\W\d_]+,? +[^\W\d_]+,? +[^\W\d_]+")
_CONSTANT = re.compile(r"\b(?:true|false|null|True|False|None)\b")
_WORD = re.compile(r"[^\W\d_]+")
# A word belongs to a format if it touches code or punctuation, or is in lower case after a marker.
_ATTACHED = re.compile(
    r"(?<=[`\[\](){}=./\"'<>:_\x00\x02-])[\w.]+"
    r"|(?<=\x01)[a-z_]+"
    r"|[\w.]+(?=[`\[({=/\"'<_\x00\x01\x02]|:(?=\S))"
)
_TWO_WORDS = re.compile(r"[^\W\d_]{2,} +[^\W\d_]{2,}")
# Letters that touch a part change its meaning: a name with a suffix is another tool.
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
    """Return the first words in the text around the parts of a turn, "" if there is only format.

    Format is: control tokens, tags and bracketed markers; a short header between two of them; one
    lower-case word after one of them, alone on its line (a channel); and the recipient that a
    template names before every turn. Around tool calls, these are format too: quoted keys, words
    that touch code or punctuation, and a label that the served prompt announces. Everything else
    that contains a letter is words.

    Args:
        frame: see `Skeleton.frame`.
        controls: texts of control tokens and think markers.
        calls: whether the turn has tool calls.
        empties: whether the calls have empty values; their tags have nothing between them.
        prompt: the served prompt.
        recipient: the text between the name of a tool and its arguments, if the name is the first
            thing after the served prompt; plain answers name a recipient in the same place.
        own: the whitespace in the row's texts.
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
            # A sign next to an answer is a target like a word; between two markers it is format.
            sign = stretch.strip(_SPACE + own) if not calls or not stretch.isascii() else ""
            if sign and not left == right == _MARK:
                return sign
            continue
        if not _is_format(stretch, left, right, calls, prompt, recipient):
            return stretch.strip().replace("\x02", "\u2026")
    return ""


def _unknown_tag(text: str, known: Collection[str], calls: bool, empties: bool) -> str:
    """Return a tag that is text instead of format, or "".

    Only tags that the tokenizer does not know are considered. A tag around a plain answer needs
    its counterpart, and so does a tag that ends a turn of several parts.
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
    """Return a tag before the text or the calls of a turn that is never closed, and that occurs
    neither in the tokenizer nor in the served prompt; "" if there is none.

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
            # A call begins with a marker of its own, so a tag right before it is format.
            first = text[found.end() : behind.start() if behind else len(text)]
            if not first.strip() and (right == "text" if behind is None else right != ""):
                return tag
    return ""


def is_held(pieces: Sequence[tuple[str, str, str]], controls: Iterable[str]) -> bool:
    """Return whether a pair of tags that are not control tokens encloses the text of a turn."""
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
    """Return the name of a tag, which is the same for both sides of a pair."""
    name = re.match(r"[^\w]*([\w.:-]+)", tag)
    bare = re.sub(r"begin|start|open|end|stop|close", "", name[1].lower()) if name else ""
    return bare.strip("_.:-")


def markers_in(pieces: Iterable[str], controls: re.Pattern[str] | None) -> list[str]:
    """Return the control tokens and tags that a template writes between the parts of a turn."""
    found: dict[str, None] = {}
    for piece in pieces:
        found |= dict.fromkeys(controls.findall(piece) if controls else [])
        found |= dict.fromkeys(_TAG.findall(piece))
    return [marker for marker in found if len(marker.strip()) > 2]


# Words in a marker that say whether it opens or closes.
_OPENING = re.compile(r"(?<![a-z])(?:begin|start|open)(?![a-z])")
_CLOSING = re.compile(r"(?<![a-z])(?:end|stop|close)(?![a-z])")
_HOLLOW = re.compile(r"\{\s*\}|\[\s*\]")


def hollow(text: str, controls: re.Pattern[str] | None) -> Counter[str]:
    """Count the brackets and the pairs of markers with nothing between them."""
    found = Counter("".join(pair.split()) for pair in _HOLLOW.findall(text))
    for (one, _, end), (other, start, _) in itertools.pairwise(_markers(text, controls)):
        name, side = side_of(one)
        pair = name and PART not in one and side > 0 and side_of(other) == (name, -1)
        if pair and not _HOLLOW.sub("", text[end:start]).strip():
            found[one + other] += 1
    return found


# A tag of a kind that formats always write in pairs.
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
    """Return a marker whose counterpart is missing, or "".

    Markers are compared if the text contains both sides. In a turn with calls, tags are compared
    too, and tokens of which the tokenizer has both sides.

    Args:
        marks: markers that may occur alone.
        tokens: the tokenizer's control tokens.
        prompt: the served prompt, which may have opened what the turn closes.
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
    """Return whether a tag that occurs with one side only should have two.

    That is so for a closing tag, a tag with an attribute, and a tag before a value if other tags
    are closed. Some formats write a single tag before a call, which is complete.
    """
    if not _TWO_SIDED.fullmatch(tag):
        return False
    if tag.startswith("</") or re.search(r"[=\s]", tag):
        return True
    # Tags whose names are not XML names are complete by themselves.
    plain = tag + PART in text and re.match(r"<[A-Za-z]", tag) is not None
    return plain and any((name, -side) in sides for name, side in sides)


def markers_of(text: str, controls: re.Pattern[str] | None) -> list[str]:
    """Return the control tokens and tags in a text, in order."""
    return [marker for marker, _, _ in _markers(text, controls)]


def is_tag(text: str) -> bool:
    """Return whether a text is one tag or bracketed marker of a kind that is closed by a slash."""
    return re.fullmatch(r"</?[A-Za-z][^<>|]*>|\[/?[A-Z][A-Z0-9_ ]*\]", text) is not None


def _markers(text: str, controls: re.Pattern[str] | None) -> Iterator[tuple[str, int, int]]:
    """Yield (marker, start, end) for each control token and tag."""
    either = f"{controls.pattern}|{_TAG.pattern}" if controls else _TAG.pattern
    for found in re.finditer(either, text):
        yield found.group(), found.start(), found.end()


def side_of(marker: str) -> tuple[str, int]:
    """Return (name, side) of a marker. The name is the same for both sides of a pair; the side is
    1 if the marker opens, -1 if it closes, and 0 for a tag without content."""
    bare = marker.strip("<>[]|\uff5c/ ")
    named = re.match(r"[^\s=\"'<>]+", bare)
    name = named.group().lower() if named else ""
    closes = (
        "/" in marker[:3] or bool(_CLOSING.search(name)) or bool(re.match(r"<[^|].*\|>", marker))
    )
    stem = _CLOSING.sub("", _OPENING.sub("", name)).strip("_.:-\u2581|\uff5c")
    return stem, 0 if marker.endswith("/>") else -1 if closes else 1


# Signs next to the text of a turn that are not format, and brackets and quotes that enclose it.
_SIGN = r"-!?.+*#$%@^~|=&\\\u2026"
_BEFORE = re.compile(rf"(?:[{_SIGN}(\[{{`]|(?<![:,\[] )(?<![:,\[])[\"'])+$")
_BEHIND = re.compile(rf"[{_SIGN})\]}}`]+|[\"'](?!\s*[,}}])")
_BRACKETED = re.compile(r"\[/?[\w:.-]+\]")


# A block of code around a call.
_FENCE = re.compile(r"(?:^|(?<=\n)|(?<=: ))```[\w-]*(?=\n|$)")


def sign_beside(before: str, behind: str, controls: re.Pattern[str] | None) -> str:
    """Return a sign between a text and what is around it, or ""."""
    for marker in (controls, _TAG, _BRACKETED, _FENCE):
        if marker:
            before, behind = marker.sub(_MARK, before), marker.sub(_MARK, behind)
    found = _BEFORE.search(before.rstrip()) or _BEHIND.match(behind.lstrip())
    return found.group() if found else ""


# A bracketed marker, but not a list of one number, true, false or null.
_NAMED_BRACKET = re.compile(r"\[/?(?!(?:true|false|null|True|False|None)\])[A-Za-z_][\w:.-]*\]")
# The first character of a call without a marker, and the characters that may end a call.
_CALL_BEGINS, _CALL_ENDS = re.compile(r"[\[({`<>]"), re.compile(r"[\])}>`\"']")
# The name of a format directly before the bracket of its list; and the recipient of a call.
_FORMAT_NAME, _TO = re.compile(r"[\w.]+$"), re.compile(r"(?:[\w.]+=[\w.]*|[\w.]*\.)$")


def words_beside_calls(
    pieces: Sequence[tuple[str, str, str]], controls: Iterable[str], prompt: str, recipient: str
) -> str:
    """Return the first text of a turn with calls that is neither in a call nor format, or "".

    A client receives as content what is before the first marker or bracket of a call, after the
    last one, or directly next to the text of the turn. In these places only whitespace and a label
    that the served prompt announces are format.

    Args:
        pieces: (kind before, text, kind after) for each text around the parts; the kind of a
            neighbouring part is "text" or "call", or "" if there is none.
        controls: texts of control tokens and think markers.
        prompt: the served prompt.
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
            # After a marker nothing remains to be closed, unless arguments begin there.
            open_still = len(segments) == 1 or last.lstrip()[:1] in ("{", "[")
            closing = [c.end() for c in _CALL_ENDS.finditer(last)] if open_still else []
            found.append(last[max(closing, default=0) :])
        for outside in map(str.strip, found):
            if outside and not (outside.endswith(":") and _announced(outside, prompt)):
                return outside
    return ""


def _lead(masked: str, segments: Sequence[str]) -> str:
    """Return the text before the first call."""
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
    """Return whether a text around reasoning is a marker, without words before it."""
    bare = _TAG.sub(_MARK, control.strip())
    before, found, _ = bare.partition(_MARK)
    if found and _WORD.search(before):
        return False
    return bool(bare) and not (_STOPPED.search(bare) or _SENTENCE.search(bare))


# A label at the beginning of a line, or a key of a call in YAML.
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
