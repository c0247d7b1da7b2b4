"""Which text around the parts of a turn is format, and which is words that nobody wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable

from truetune.contract.twin import PART

# What stands for a control token or a tag once it is known.
_MARK = "\x01"
# Tags and bracketed markers are format where the tokenizer has no token for them either.
_TAG = re.compile(r"</?[^<>\n]{1,120}/?>|\[/?[A-Z][A-Z0-9_ ]*\]|\[\[?[A-Z_]+\]?\]")
_QUOTED = re.compile(r"\"([^\"\n]{0,60})\"|'([^'\n]{0,60})'")
_SENTENCE = re.compile(r"[^\W\d_]+,? +[^\W\d_]+,? +[^\W\d_]+")
_CONSTANT = re.compile(r"\b(?:true|false|null|True|False|None)\b")
_WORD = re.compile(r"[^\W\d_]+")
# A word of a format is written against code or punctuation, or in lower case behind a marker.
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
    frame: str, controls: Iterable[str], *, calls: bool, prompt: str = "", recipient: str = ""
) -> str:
    """The first words in the text around the parts of a turn, "" where it is format alone.

    Format is: control tokens, tags and bracketed markers; a short header between two of them, or
    one lower-case word behind one and alone on its line (a channel); the recipient that a template
    names before every turn. Around tool calls also: quoted keys, words written against code or
    punctuation, and a label that the served prompt announces. Everything else with a letter in it
    is words.

    Args:
        frame: see `Skeleton.frame`.
        controls: texts of control tokens and think markers.
        calls: whether the turn has tool calls.
        prompt: what was served.
        recipient: what stands between the name of a tool and its arguments where the name is the
            first thing behind the served prompt: there plain answers name a recipient as well.
    """
    text = frame
    known = sorted({c for c in controls if not c.isspace() and _is_mark(c)}, key=len, reverse=True)
    for control in known:
        text = text.replace(control, _MARK)
    if glued := _GLUED.search(text):
        return glued.group().replace(PART, "")
    text = _TAG.sub(_MARK, text)
    if calls:
        for quoted in _QUOTED.finditer(text):
            if _SENTENCE.search(quoted.group()):
                return quoted.group()
        text = _CONSTANT.sub("\x02", _QUOTED.sub("\x02", text))
    pieces = re.split(f"([{PART}{_MARK}])", text)
    for number in range(0, len(pieces), 2):
        stretch = pieces[number]
        left = pieces[number - 1] if number else ""
        right = pieces[number + 1] if number + 1 < len(pieces) else ""
        if not _WORD.search(stretch):
            # A sign beside an answer is trained like a word; between two marks it is format.
            sign = stretch.strip() if not calls or not stretch.isascii() else ""
            if sign and not left == right == _MARK:
                return sign
            continue
        if not _is_format(stretch, left, right, calls, prompt, recipient):
            return stretch.strip().replace("\x02", "\u2026")
    return ""


def _is_mark(control: str) -> bool:
    """Whether what stands around reasoning is a marker, and no words in front of one."""
    bare = _TAG.sub(_MARK, control.strip())
    before, found, _ = bare.partition(_MARK)
    if found and _WORD.search(before):
        return False
    return bool(bare) and not (_STOPPED.search(bare) or _SENTENCE.search(bare))


def _is_format(
    stretch: str, left: str, right: str, calls: bool, prompt: str, recipient: str
) -> bool:
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
