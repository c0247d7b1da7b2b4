"""Find answers that were cut off before they reached the file.

Each finding counts its rows and shows one. Code, labels and one-word answers are not prose: what
would be damage in a sentence is normal in them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from truetune.checks.conversations.rows import (
    CODE,
    LEAST_ROWS,
    SOME,
    DataFacts,
    ending,
    is_dense,
    level_of,
    open_reasoning,
)
from truetune.checks.registry import check
from truetune.data.conversation import Conversation
from truetune.findings import Finding, rows_finding, share

_WORD = re.compile(r"[^\W\d_]+")
# How a sentence may end: its mark, and what closes after it.
_ENDED = re.compile(r"[.!?\u2026:;\u3002\uff01\uff1f\u061f\u0964][\"'\u201d\u2019)\]*_`~]*\s*\Z")
# Words that no English sentence ends on.
_OPEN_WORDS = frozenset(
    """the a an of and or to in on with for that which is are was were by from as at this these
    those its their his her our your my be been into than such including because while""".split()  # noqa: SIM905
)
# Shorter answers are names, labels and titles.
_LEAST_CUT = 60
_LEAST_PROSE = 0.6


@check()
def answers_whole(facts: DataFacts) -> Iterator[Finding]:
    """Answers do not break off in the middle of a word, a sentence or a block of code."""
    # Reasoning that never ends is reported as that.
    seen_rows = {i for i, conversation in enumerate(facts.train) if open_reasoning(conversation)}
    if rows := _fences_open(facts):
        seen_rows.update(rows)
        yield _cut(
            facts,
            rows,
            end="inside a code block, which they open with ``` and never close",
            why="a limit on tokens or characters cut them, and the model learns to stop there",
        )
    if rows := _announcing(facts):
        seen_rows.update(rows)
        yield _cut(
            facts,
            rows,
            end="after a colon, with nothing after it",
            why="only the first line was kept (split('\\n')[0], or reading line by line), or a "
            "stop string cut them at the first line break: the model learns to announce something "
            "and then stop",
        )
    if rows := [row for row in _broken(facts) if row not in seen_rows]:
        yield _cut(
            facts,
            rows,
            end="in the middle",
            why="they stop inside a word or a sentence, and the others do not: a limit on tokens "
            "or characters cut them when they were generated, and the model learns to stop there",
        )


def _cut(facts: DataFacts, rows: list[int], *, end: str, why: str) -> Finding:
    lengths = Counter(len(facts.answers[i]) for i in rows)
    length, times = lengths.most_common(1)[0]
    same = times >= max(LEAST_ROWS, 0.5 * len(rows))
    return rows_finding(
        facts.names,
        rows,
        code="answer-broken-off",
        level=level_of(rows, len(facts.train)),
        what=f"the answers of {share(len(rows), len(facts.train))} break off {end}, such "
        f"as {ending(facts.answers[rows[0]])}",
        why=f"{times:,} of them have exactly {length:,} characters, so a length limit cut them"
        if same
        else why,
        fix="generate them again with a higher limit, or remove those rows"
        if same or "limit" in why.partition(":")[0]
        else "copy the complete answers from the source, or remove those rows",
    )


def _broken(facts: DataFacts) -> list[int]:
    """Answers that stop in a word or a sentence, or at one length with most others."""
    piled = _nearly_all_at_one_length(facts)
    texts = {i: t.rstrip() for i, t in enumerate(facts.answers) if len(t) >= _LEAST_CUT}
    prose = {i: t for i, t in texts.items() if not CODE.search(t)}
    if len(prose) < 10:
        return piled
    ended = sum(bool(_ENDED.search(t)) for t in prose.values())
    if ended < _LEAST_PROSE * len(prose):
        # A set whose answers end without a mark has a form of its own; a common length is reported.
        return sorted({*piled, *_at_one_length(facts, texts)})
    sure = {*_broken_off(facts, prose), *_at_one_length(facts, texts), *piled}
    shorter = {
        i: t
        for i, text in enumerate(facts.answers)
        if len(t := text.rstrip()) >= _LEAST_OPEN and not CODE.search(t)
    }
    return sorted({*sure, *_left_open(shorter, sure)})


# Share of the answers that end early, above which the way the file was made is the cause.
_FENCES, _COLONS = 0.02, 0.3
_FENCE = re.compile(r"`{3,}|~{3,}")


def _fences_open(facts: DataFacts) -> list[int]:
    """Answers that open a block of code and do not close it."""
    rows = []
    for index, text in enumerate(facts.answers):
        if "```" not in text or not len(_FENCE.findall(text)) % 2:
            continue
        # A prompt may open the block that the answer closes.
        before = (m["content"] for m in facts.train[index].messages if m["role"] != "assistant")
        if not len(_FENCE.findall("".join(before))) % 2:
            rows.append(index)
    return rows if len(rows) >= max(LEAST_ROWS, _FENCES * len(facts.train)) else []


def _announcing(facts: DataFacts) -> list[int]:
    """Answers of one line that end with a colon, where many do."""
    texts = {i: text.strip() for i, text in enumerate(facts.answers) if text.strip()}
    rows = [
        i
        for i, text in texts.items()
        if text[-1] in ":\uff1a" and "\n" not in text and (len(text.split()) > 3 or is_dense(text))
    ]
    # The header of a function or a class ends so.
    rows = [i for i in rows if not CODE.search(texts[i])]
    return rows if len(rows) >= max(_LEAST_PILE, _COLONS * len(texts)) else []


# Answers, and letters of one, that make a common length strange; and its share of all answers.
_LEAST_PILE, _LEAST_DENSE, _PILE = 10, 25, 0.5
_DIGITS = re.compile(r"\d+")


def _nearly_all_at_one_length(facts: DataFacts) -> list[int]:
    """Texts of exactly the same number of characters, none of them longer, that do not end.

    Texts of one pattern with other numbers in it are as long as their numbers say: they are cut
    only where they are of one length although their numbers are not.
    """
    texts = {i: text for i, text in enumerate(facts.answers) if text.strip()}
    if len(texts) < _LEAST_PILE:
        return []
    most = max(map(len, texts.values()))
    pile = {i: text for i, text in texts.items() if len(text) == most}
    if len(pile) < max(_LEAST_PILE, _PILE * len(texts)) or len(set(pile.values())) < len(pile) / 2:
        return []
    if not all(_is_running_text(text) for text in pile.values()):
        return []
    patterns = {_DIGITS.sub("#", text) for text in pile.values()}
    if len(patterns) < len(pile) / 2 and len(set(map(len, patterns))) < 2:
        return []
    open_ended = [i for i, text in pile.items() if not _CLOSED.search(text)]
    return open_ended if len(open_ended) >= 0.6 * len(pile) else []


_CLOSED = re.compile(_ENDED.pattern + r"|[\])}>|`\"'\u300d\u300f\u300b\uff09]\s*\Z")


def _is_running_text(text: str) -> bool:
    """Several words or a whole sentence, and neither a hash, a board nor a line of columns."""
    if is_dense(text):
        return len(text) >= _LEAST_DENSE
    words = len(_WORD.findall(text))
    return len(text) >= _LEAST_CUT and words >= 5 and not _COLUMNS.search(text)


_COLUMNS = re.compile(r"\S {4,}\S")


def _broken_off(facts: DataFacts, prose: dict[int, str]) -> list[int]:
    """Answers that end on a comma, on a word that ends no sentence, or on a part of a word."""
    found, parts = [], {}
    for index, text in prose.items():
        line = text.rpartition("\n")[2].strip()
        if (item := _ITEM.fullmatch(line)) and f"\n{int(item[1]) - 1}{item[2]} " in "\n" + text:
            found.append(index)
            continue
        # The last line is a sentence and no title, name or item of a list.
        if not text[-1].isascii() or len(line.split()) < 6 or re.match(r"[-*\u2022\d|#>]", line):
            continue
        last = line.split()[-1].lower()
        if text[-1] == "," or last in _OPEN_WORDS:
            found.append(index)
        elif last.isalpha() and len(last) > 1:
            parts[index] = last
    if parts:
        known = Counter(w for c in facts.train for w in _WORD.findall(_all_text(c).lower()))
        ends = Counter(parts.values())
        longer = _beginnings(known, set(parts.values()))
        # It occurs nowhere else as a word, and it is the beginning of a word that does occur.
        found += [i for i, w in parts.items() if known[w] <= ends[w] and w in longer]
    return found


# The beginning of an item of a numbered list.
_ITEM = re.compile(r"(\d{1,2})([.)])")
# Where cuts are shown, so many sentences without an end to one of them are cuts as well, or so few
# of all answers; and the letters, words and share of ended answers that make a text without a mark
# strange.
_OPEN_TO_SURE, _FEW_OPEN = 4, 0.12
_LEAST_OPEN, _OPEN_LINE, _ENDED_LINES = 20, 7, 0.9


def _left_open(prose: dict[int, str], sure: Collection[int]) -> list[int]:
    """Sentences that stop without a mark, in a set that was shown to be cut.

    Alone they say nothing: people leave out the last full stop. A line counts where the one before
    it, or a sentence before it, has its mark; or where it is long, and nearly all such lines have
    theirs.
    """
    if len(sure) < LEAST_ROWS:
        return []
    found, alone, ended = [], [], 0
    for index, text in prose.items():
        *before, line = [part.strip() for part in text.split("\n") if part.strip()]
        words = line.split()
        single = not before and len(words) >= _OPEN_LINE
        if _ENDED.search(text):
            ended += single
            continue
        last = words[-1].replace("-", "")
        # Names and signs end captions and signatures.
        item = _ITEM.match(line) if before and last.isalpha() else None
        if index in sure or not (item or (last.isalpha() and last.islower())):
            continue
        said = line[item.end() :] if item else line
        marked = bool(before and _ENDED.search(before[-1])) or bool(re.search(r"[.!?]\s", said))
        if item or len(words) >= 6:
            if marked:
                found.append(index)
            elif single:
                alone.append(index)
    if ended >= _ENDED_LINES * (ended + len(alone)):
        found += alone
    return found if len(found) <= max(_OPEN_TO_SURE * len(sure), _FEW_OPEN * len(prose)) else []


def _beginnings(known: Iterable[str], parts: set[str]) -> set[str]:
    """Those parts that begin a longer word."""
    sizes = sorted({len(part) for part in parts})
    return {w[:n] for w in known for n in sizes if len(w) > n and w[:n] in parts}


def _all_text(conversation: Conversation) -> str:
    return "\n".join(m["content"] for m in conversation.messages)


def _at_one_length(facts: DataFacts, texts: dict[int, str]) -> list[int]:
    """The longest answers, where several have the same number of characters and none ends well."""
    lengths = np.array([len(facts.answers[i]) for i in texts])
    if not len(lengths):
        return []
    most = int(lengths.max())
    rows = [i for i in texts if len(facts.answers[i]) == most]
    if len(rows) < max(LEAST_ROWS, SOME * len(texts)) or most < 2 * _LEAST_CUT:
        return []
    distinct = {facts.answers[i] for i in rows}
    if len(distinct) < max(2, 0.5 * len(rows)):
        return []
    open_ended = [i for i in rows if texts[i][-1:].isalnum() or texts[i][-1:] in ",-("]
    others = [t for i, t in texts.items() if len(facts.answers[i]) != most]
    usual = sum(t[-1:].isalnum() for t in others) / max(len(others), 1)
    return open_ended if len(open_ended) > 0.7 * len(rows) and usual < 0.5 else []
