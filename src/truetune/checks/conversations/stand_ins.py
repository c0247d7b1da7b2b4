"""Find what stands in for an answer: the name of a missing value, a placeholder that was never
filled in, reasoning that never comes to an answer, line breaks that are still escaped."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from truetune.checks.conversations.rows import (
    CODE,
    LEAST_ROWS,
    OPEN_ENDED,
    OPEN_FIX,
    DataFacts,
    asked,
    begins_with_reasoning,
    level_of,
    open_reasoning,
    opening,
)
from truetune.checks.registry import check
from truetune.findings import Finding, rows_finding, share

# ------------------------------------------------------------------ missing values

# As pandas, JSON, SQL and JavaScript write what is not there. The first are no words of a language.
_PANDAS = ("nan", "<NA>", "NaT")
_MISSING = (
    *_PANDAS,
    *("NaN", "None", "null", "NULL", "undefined", "N/A", "n/a", "-", "--", "\u2014"),
)
_VALUE_ASKED = re.compile(
    r"\b(?:nan|none|null|undefined|missing|empty|n/a|not a number|python|pandas|numpy|json|sql"
    r"|javascript|code|function|prints?|outputs?|returns?)\b|```",
    re.IGNORECASE,
)
# Words that make the other answers prose; where they are labels, None is one of them.
_PROSE_WORDS = 5


@check()
def answers_not_missing(facts: DataFacts) -> Iterator[Finding]:
    """No answer is the name of a missing value, such as nan or None, among answers of prose."""
    written = [(i, text.strip()) for i, text in enumerate(facts.answers) if text.strip()]
    others = [text for _, text in written if text not in _MISSING]
    prose = sum(len(text.split()) >= _PROSE_WORDS for text in others) >= 0.5 * max(len(others), 1)
    rows = [
        i
        for i, text in written
        if text in (_MISSING if prose else _PANDAS)
        and not _VALUE_ASKED.search(asked(facts.train[i]))
    ]
    if rows and len(rows) < len(written):
        yield rows_finding(
            facts.names,
            rows,
            code="answer-missing",
            level=level_of(rows, len(facts.train)),
            what=f"the answers of {share(len(rows), len(facts.train))} contain only a word for a "
            f"missing value, such as {facts.answers[rows[0]].strip()!r}",
            why="an empty cell was written as a word (by pandas, str(None) or a database): the "
            "model learns to answer with it",
            fix="remove those rows before the file is written (df.dropna()), or fill in the answer",
        )


# ------------------------------------------------------------------ placeholders

# A name in braces, as a template or an f-string has it; no group of LaTeX, no set of numbers.
_BRACES = re.compile(r"(?<![\\\w}^_$\"'])\{\{?\s*[A-Za-z_][\w.]{2,30}\s*\}\}?(?![\w{\"'])")
_WHOLE = re.compile(
    r"\{\{?\s*[A-Za-z_][\w. ]{1,30}\s*\}\}?"
    r"|\[\s*(?:insert|your|the|add|put)?\s*(?:answer|response|output|completion|text|reply)"
    r"[\w ]{0,40}\]"
    r"|\[\s*(?:insert|fill in|todo)\b[^\]\n]{0,80}\]"
    r"|<(?:answer|response|output|completion|your[ _]answer)>"
    r"|TODO",
    re.IGNORECASE,
)
_TEMPLATING = re.compile(
    r"\b(?:templat\w*|placeholder\w*|jinja\w*|mustache|handlebars|f-?strings?|format\w*"
    r"|variables?|brac(?:es?|kets?)|slots?|render\w*|prompts?|latex|regex\w*|code|string"
    r"|form|respond|reply|outputs?|return)\b|```",
    re.IGNORECASE,
)
# Of the rows, where the same placeholder stands: those of a few belong to letters and lessons.
_EVERYWHERE = 0.5
# What no text has in it for its own sake: a name in double braces, an order to the author in
# brackets, a reminder. Links of Markdown are none of them.
_LEFT = re.compile(
    r"(?<![\\\w}^_$\"'])\{\{\s*[A-Za-z_][\w. ]{1,40}\s*\}\}(?![\w{\"'])"
    r"|\[\s*(?i:insert|fill in|your|todo)\b[^\]\n]{0,60}\](?!\()"
    r"|(?<![\w-])(?:TODO|FIXME):\s"
)
# Texts that are handed over with gaps for the reader to fill in.
_WITH_GAPS = re.compile(
    r"\b(?:letters?|e-?mails?|mails?|messages?|invit\w+|contracts?|agreements?|scripts?|speech\w*"
    r"|resumes?|cv|notices?|announce\w+|greetings?|to-?do\w*|blanks?|gaps?)\b|\[",
    re.IGNORECASE,
)
_LETTER = re.compile(
    r"^\s*(?:(?:best|kind|warm)? ?regards|sincerely|yours|cheers|best|thanks)\b[^.\n]{0,30}$",
    re.IGNORECASE | re.MULTILINE,
)
_LEFT_SHARE = 0.02


@check()
def placeholders_filled(facts: DataFacts) -> Iterator[Finding]:
    """No answer is a placeholder, and none is in most rows."""
    prompts = [asked(c) for c in facts.train]
    whole = [
        i
        for i, text in enumerate(facts.answers)
        if len(text) < 120
        and _WHOLE.fullmatch(text.strip())
        and not _TEMPLATING.search(_BRACES.sub("", prompts[i]))
    ]
    rows = {i: facts.answers[i].strip() for i in whole}
    by_name: dict[str, dict[int, None]] = defaultdict(dict)
    for index, conversation in enumerate(facts.train):
        for message in conversation.messages:
            text = message["content"]
            if "{" not in text or message["role"] not in ("user", "assistant"):
                continue
            if CODE.search(_BRACES.sub("", text)):
                continue
            for hit in _BRACES.finditer(text):
                by_name[hit.group()].setdefault(index)
    if len(left := _left_in_answers(facts, prompts)) >= max(
        LEAST_ROWS, _LEFT_SHARE * len(facts.train)
    ):
        rows = {**left, **rows}
    for name, found in by_name.items():
        many = len(found) >= max(LEAST_ROWS, _EVERYWHERE * len(facts.train))
        about = sum(bool(_TEMPLATING.search(_BRACES.sub("", prompts[i]))) for i in found)
        if many and about < 0.5 * len(found):
            rows = {**dict.fromkeys(found, name), **rows}
    if rows:
        first = rows[min(rows)]
        yield rows_finding(
            facts.names,
            rows,
            code="placeholder-left",
            level=level_of(rows, len(facts.train)),
            what=f"{share(len(rows), len(facts.train))} contain a placeholder that was not filled "
            f"in, such as {first!r}",
            why="the template of the row was saved before its values were filled in (a missing "
            "f-prefix or .format call), or its author left a gap: the model learns to write the "
            "placeholder",
            fix="fill in the values where the file is written, or remove those rows",
        )


def _left_in_answers(facts: DataFacts, prompts: list[str]) -> dict[int, str]:
    """Rows whose answers contain a placeholder that neither the prompt nor a form calls for."""
    found = {}
    for index, text in enumerate(facts.answers):
        hit = _LEFT.search(text) if "{{" in text or "[" in text or ":" in text else None
        if hit is None or hit.group() in prompts[index] or CODE.search(_LEFT.sub("", text)):
            continue
        prompt = _BRACES.sub("", prompts[index])
        if not (_TEMPLATING.search(prompt) or _WITH_GAPS.search(prompt) or _LETTER.search(text)):
            found[index] = hit.group().strip()
    return found


# ------------------------------------------------------------------ escaped line breaks

# Behind the escape begins a line: LaTeX's \nu and a Windows path go on with a small letter.
_ESCAPED = re.compile(r"\\n(?=\\n|\\t|[\s\dA-Z*#\u2022>-]|\Z)")
_ABOUT_ESCAPES = re.compile(
    r"\\n|\b(?:newlines?|line breaks?|escap\w*|regex\w*|strings?|json|code|program\w*|script|python"
    r"|java\w*|latex)\b",
    re.IGNORECASE,
)
_ESCAPED_SHARE = 0.02


@check()
def line_breaks_read(facts: DataFacts) -> Iterator[Finding]:
    """Line breaks of prose are line breaks, and not a backslash with an n."""
    rows = []
    for index, text in enumerate(facts.answers):
        # A text with real line breaks too is about them, or is code.
        if "\\n" not in text or "\n" in text or text.lstrip()[:1] in ("{", "[", '"'):
            continue
        plain = _ESCAPED.sub("\n", text)
        about = _ABOUT_ESCAPES.search(asked(facts.train[index]))
        if plain != text and not about and not CODE.search(text):
            rows.append(index)
    if len(rows) < max(LEAST_ROWS, _ESCAPED_SHARE * len(facts.train)):
        return
    yield rows_finding(
        facts.names,
        rows,
        code="text-escaped",
        level="warning",
        what=f"the answers of {share(len(rows), len(facts.train))} contain the two characters "
        f"\\n where a line break belongs, such as {opening(_around(facts.answers[rows[0]]))}",
        why="the text was escaped twice (json.dumps of text that was already JSON, or repr): the "
        "model learns to write a backslash and an n",
        fix="undo one escaping: json.loads('\"' + text + '\"'), or text.replace('\\\\n', '\\n')",
    )


def _around(text: str) -> str:
    hit = _ESCAPED.search(text)
    return text[max(0, hit.start() - 24) :] if hit else text


# ------------------------------------------------------------------ reasoning without an end


@check()
def reasoning_finished(facts: DataFacts) -> Iterator[Finding]:
    """Reasoning that an answer begins with comes to its end."""
    rows = [i for i, conversation in enumerate(facts.train) if open_reasoning(conversation)]
    if not rows:
        return
    total = max(sum(begins_with_reasoning(text) for text in facts.answers), len(rows))
    sure = len(rows) >= LEAST_ROWS and len(rows) > 0.05 * total
    yield rows_finding(
        facts.names,
        rows,
        code="reasoning-unclosed",
        level="error" if sure else "warning",
        what=f"{share(len(rows), total)} that have reasoning never close its "
        f"{open_reasoning(facts.train[rows[0]])!r}",
        why=_why_open(facts, rows),
        fix=OPEN_FIX,
    )


def _why_open(facts: DataFacts, rows: list[int]) -> str:
    lengths: dict[int, int] = defaultdict(int)
    for row in rows:
        lengths[len(facts.answers[row])] += 1
    length, times = max(lengths.items(), key=lambda item: item[1])
    if times >= max(LEAST_ROWS, 0.5 * len(rows)):
        return (
            f"{times:,} of them have exactly {length:,} characters: a length limit cut them before "
            f"their answer, and {OPEN_ENDED}"
        )
    return f"a limit cut them before their answer, or the closing marker was lost, and {OPEN_ENDED}"
