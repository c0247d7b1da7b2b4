"""One answer read out of a text: plain words, the last number, a JSON value.

Replies and rows are untrusted: every reading here takes time in proportion to the text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from typing import Any

# Places from which a JSON value is tried where the text is more than one.
_TRIES = 20
_FENCED = re.compile(r"```[\w-]*[ \t]*\n(.*?)```", re.DOTALL)

_SPACES = "\u00a0\u2009\u202f"
_BETWEEN_DIGITS = re.compile(rf"(?<=\d)(?:[{_SPACES}]|\\[,! ;]|\{{,\}})(?=\d{{3}}(?!\d))")
# Plain spaces only where nothing else can be meant: 1 000 000, 12 000.
_THOUSANDS = re.compile(r"(?<![\w.,])(?<!\d )\d{1,3}(?:(?: \d{3}){2,}|(?: 000)+)(?![\w ]*\d)(?!\w)")
_RAISED = re.compile(r"\u207b?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_VULGAR = re.compile(r"[\u00bc-\u00be\u2150-\u215e]")
_SHORT_FRACTION = re.compile(r"\\[dt]?frac\s?(\d)\s?(\d)(?!\d)")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?[\d.,]{1,40})\s*\}\s*\{\s*([\d.,]{1,40})\s*\}")
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    # A sign belongs to the number unless something is before it: 10-12 ends in 12.
    r"(?P<sign>(?<![\w)\]}^])[-+][ ]?\$?)?"
    # A digit that is glued to a Latin letter is part of a name: x2, H2O.
    # Behind a letter's sign of a power it is no number of its own: 5 m^2.
    rf"(?<![A-Za-z0-9_^])(?<!\^\{{)(?<!\d\.)(?P<body>{_WHOLE}(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<e>[-+]?\d{1,3})(?![\w.])"
    r"|\s?(?:\^|\*\*)\s?\{?(?P<to>[-+]?\d{1,3})\}?(?![\w.]*\d)"
    # A mixed number: 2 1/2.
    r"|[ ](?P<over>\d{1,3})/(?P<den>\d{1,3})(?![\d/]|\.\d)"
    r"|\s?(?:\u00d7|\*|x|\\times|\\cdot)\s?10\s?(?:\^|\*\*)\s?\{?(?P<ten>[-+]?\d{1,3})\}?"
    rf"|\s?/\s?(?P<under>{_WHOLE})(?![\d/]|\.\d))?"
)
# What goes on a number before a text and after it: 3.5, 3,000, 3/4; no list and no date.
_INSIDE = re.compile(r"(?:\d\.|(?<![\d/])\d{1,12}/)$")
_INTO = re.compile(r"\.\d|/\d{1,12}(?![\d/])|,\d{3}(?!\d)")
# Longer rows of digits are no answer that anybody wrote.
_MOST_DIGITS = 400


def holds(text: str, part: str) -> bool:
    """Whether `part` is in `text` as whole words, both normalised.

    A letter, digit or hyphen beside it makes it part of a longer word, and a point, comma or slash
    with a digit part of a longer number; letters of scripts that write no spaces do not.
    """
    at = text.find(part)
    while at >= 0:
        end = at + len(part)
        if not (
            _in_number(text, at, end)
            or _goes_on(text[at - 1 : at])
            or _goes_on(text[end : end + 1])
        ):
            return True
        at = text.find(part, at + 1)
    return False


def _in_number(text: str, at: int, end: int) -> bool:
    """Whether a stretch of a text that begins or ends on digits is a part of a longer number."""
    first = re.match(r"\d+", text[at:end])
    before = text[max(at - 16, 0) : at]
    if first and (
        _INSIDE.search(before) or (len(first[0]) == 3 and re.search(r"(?<!\d)\d{1,3},$", before))
    ):
        return True
    return text[end - 1 : end].isdigit() and _INTO.match(text, end) is not None


def _goes_on(char: str) -> bool:
    """Whether a neighbour makes a word longer; "" is the edge of the text."""
    return bool(char) and (
        char in "-_" or (char.isalnum() and unicodedata.category(char) not in ("Lo", "Lm"))
    )


def last_number(text: str) -> Fraction | None:
    """The last number of a text; of its last \\boxed{}, where that holds one.

    Thousands may be separated by commas or thin spaces, units and percent signs are left aside, and
    3/4, \\frac{3}{4}, 2 1/2, 1e-3, 10^3 and 2 \\times 10^3 are numbers. A comma is never a decimal
    sign.
    """
    boxed = _last_boxed(text)
    found = None if boxed is None else _last(boxed)
    return _last(text) if found is None else found


def _last(text: str) -> Fraction | None:
    text = _BETWEEN_DIGITS.sub("", text.replace("\u2212", "-"))
    text = _SHORT_FRACTION.sub(r" \1/\2", _FRACTION.sub(r"\1/\2", text))
    text = _VULGAR.sub(lambda found: " " + _plain(found[0]).replace("\u2044", "/"), text)
    text = _RAISED.sub(lambda found: "^" + _plain(found[0]).replace("\u2212", "-"), text)
    text = _THOUSANDS.sub(lambda found: found[0].replace(" ", ""), text)
    value = None
    for match in _NUMBER.finditer(text):
        number = _value(match)
        value = value if number is None else number
    return value


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _value(match: re.Match[str]) -> Fraction | None:
    body = match["body"].replace(",", "")
    under = (match["under"] or "1").replace(",", "")
    if max(len(body), len(under)) > _MOST_DIGITS:
        return None
    value = Fraction(body)
    if int(under):
        value /= int(under)
    if match["to"] and (value or not match["to"].startswith("-")):
        value **= int(match["to"])
    if match["den"] and int(match["den"]):
        part = Fraction(int(match["over"]), int(match["den"]))
        # A fraction of 1 or more is a number of its own, not part of a mixed number.
        value = value + part if part < 1 else part
    if power := match["e"] or match["ten"]:
        value *= Fraction(10) ** int(power)
    return -value if (match["sign"] or "").startswith("-") else value


def _last_boxed(text: str) -> str | None:
    """What is in the last \\boxed{}, its own braces balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for place in range(begin, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[begin + 1 : place]
    return None


def json_value(text: str) -> str | None:
    """A JSON value as canonical text; None if there is none.

    It is the whole text, or the first fenced block that parses, or the first object or list in it.
    Two values have one text where they are equal: 1 and 1.0 are, 1 and true are not; the order of
    keys does not count. A key that stands twice, NaN and infinity are no JSON.
    """
    pieces = [text.strip(), *(found.strip() for found in _FENCED.findall(text)[:_TRIES])]
    decoder = _decoder()
    for piece in pieces:
        try:
            return _canonical(decoder.decode(piece))
        except (ValueError, RecursionError, ArithmeticError):
            continue
    starts = [found.start() for found in re.finditer(r"[{\[]", text)][:_TRIES]
    for start in starts:
        try:
            return _canonical(decoder.raw_decode(text, start)[0])
        except (ValueError, RecursionError, ArithmeticError):
            continue
    return None


def with_json_values(text: str) -> str:
    """A text whose JSON objects and lists stand in the one form that equal values have."""
    decoder = _decoder()
    made: list[str] = []
    at = tries = 0
    for found in re.finditer(r"[{\[]", text):
        if found.start() < at:
            continue
        tries += 1
        if tries > _TRIES:
            break
        try:
            value, end = decoder.raw_decode(text, found.start())
            made += [text[at : found.start()], _canonical(value)]
        except (ValueError, RecursionError, ArithmeticError):
            continue
        at = end
    return "".join([*made, text[at:]])


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_object,
        parse_float=Decimal,
        parse_int=Decimal,
        parse_constant=_no_constant,
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key occurs twice")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")


def _canonical(value: Any) -> str:
    if isinstance(value, dict):
        inside = (f"{json.dumps(key)}:{_canonical(value[key])}" for key in sorted(value))
        return "{" + ",".join(inside) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    if isinstance(value, Decimal):
        # Not normalize(): it rounds to the context's precision.
        sign, digits, exponent = value.as_tuple()
        text = "".join(map(str, digits)).lstrip("0")
        kept = text.rstrip("0")
        if not kept:
            return "0"
        assert isinstance(exponent, int)
        return f"{'-' * sign}{kept}e{exponent + len(text) - len(kept)}"
    return json.dumps(value)
