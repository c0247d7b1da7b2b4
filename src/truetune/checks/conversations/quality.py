"""Find answers that were damaged before they reached the file: cut off, decoded wrongly, escaped,
repeated, or prefixed with part of the prompt.

Each finding counts its rows and shows one. Code, labels and one-word answers are not prose: what
would be damage in a sentence is normal in them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np

from truetune.behaviour.text import ends_in_circle
from truetune.checks.conversations.rows import DataFacts, asked, open_reasoning
from truetune.checks.registry import check
from truetune.data.conversation import Conversation
from truetune.findings import Finding, Level, rows_finding, share

# A smaller share of the rows is only a note.
_SOME = 0.01
LEAST_ROWS = 3
_SHOWN = 60

# What source text, markup and queries hold, and prose does not.
CODE = re.compile(
    r"```|[{};]\s*$|^\s*(?:def|class|import|from|return|SELECT|INSERT|UPDATE|function|const|let|var"
    r"|public|private|#include|<\?php|<!DOCTYPE)\b|</?[a-zA-Z][\w-]*(?:\s[^<>]*)?/?>|=>|\w\(\w*\)\s*$"
    r"|^\s*\$ |==|:=",
    re.MULTILINE,
)
_WORD = re.compile(r"[^\W\d_]+")


def level_of(rows: Collection[int], total: int) -> Level:
    return "warning" if len(rows) >= max(LEAST_ROWS, _SOME * total) else "note"


def _shown(text: str) -> str:
    """The end of a text, for a finding."""
    return repr("\u2026" + text[-_SHOWN:] if len(text) > _SHOWN else text)


def opening(text: str) -> str:
    return repr(text[:_SHOWN] + "\u2026" if len(text) > _SHOWN else text)


# ------------------------------------------------------------------ cut off

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
            end="after a colon, with nothing behind it",
            why="only the first line was kept (split('\\n')[0], or reading line by line), or a "
            "stop text "
            "cut them at the first line break: the model learns to announce something and then "
            "stop",
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
        f"as {_shown(facts.answers[rows[0]])}",
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
        if text[-1] in ":\uff1a" and "\n" not in text and (len(text.split()) > 3 or _dense(text))
    ]
    # The header of a function or a class ends so.
    rows = [i for i in rows if not CODE.search(texts[i])]
    return rows if len(rows) >= max(_LEAST_PILE, _COLONS * len(texts)) else []


# Answers, and letters of one, that make a common length strange; and its share of all answers.
_LEAST_PILE, _LEAST_DENSE, _PILE = 10, 25, 0.5
_DIGITS = re.compile(r"\d+")
_DENSE = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")


def _dense(text: str) -> bool:
    """Whether a text is of a script in which a few letters say much."""
    return len(_DENSE.findall(text)) >= 0.3 * len(text)


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
    if _dense(text):
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
    if len(rows) < max(LEAST_ROWS, _SOME * len(texts)) or most < 2 * _LEAST_CUT:
        return []
    distinct = {facts.answers[i] for i in rows}
    if len(distinct) < max(2, 0.5 * len(rows)):
        return []
    open_ended = [i for i in rows if texts[i][-1:].isalnum() or texts[i][-1:] in ",-("]
    others = [t for i, t in texts.items() if len(facts.answers[i]) != most]
    usual = sum(t[-1:].isalnum() for t in others) / max(len(others), 1)
    return open_ended if len(open_ended) > 0.7 * len(rows) and usual < 0.5 else []


# ------------------------------------------------------------------ decoded wrongly

_NOT_ASCII = re.compile(r"[^\x00-\x7f]{2,}")
_ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|hellip|[mn]dash|[lr][sd]quo|copy|eacute|egrave|uuml|ouml|auml"
    r"|ccedil|#\d{2,5}|#[xX][0-9a-fA-F]{2,4});"
)
_ABOUT_MARKUP = re.compile(
    r"</?[a-zA-Z][^<>]*>|\b(?:html|xml|entit(?:y|ies)|escap\w*|href|css)\b|```", re.IGNORECASE
)


@check()
def letters_decoded(facts: DataFacts) -> Iterator[Finding]:
    """No text is UTF-8 that was read in another encoding or lost letters."""
    if rows := _rows_with(facts, _wrongly_decoded):
        yield rows_finding(
            facts.names,
            rows,
            code="text-mojibake",
            level=level_of(rows, len(facts.train)),
            what=f"{share(len(rows), len(facts.train))} contain characters that were decoded "
            f"wrongly, such as {next(iter(rows.values()))!r}",
            why="UTF-8 was read as Windows-1252 or Latin-1, or unreadable characters were "
            "replaced: the model learns to write the wrong characters",
            fix="read the source again as UTF-8, or repair the text (the package ftfy does that)",
        )


@check()
def entities_read(facts: DataFacts) -> Iterator[Finding]:
    """No text contains HTML entities unless it is HTML."""
    if rows := _rows_with(facts, _entity_in_prose):
        yield rows_finding(
            facts.names,
            rows,
            code="text-entities",
            level=level_of(rows, len(facts.train)),
            what=f"{share(len(rows), len(facts.train))} contain HTML entities in plain text, such "
            f"as {next(iter(rows.values()))!r}",
            why="the text came from web pages and was not unescaped: the model learns to write "
            "&amp; instead of &",
            fix="apply html.unescape to these texts; leave HTML as it is",
        )


def _rows_with(facts: DataFacts, look: Callable[[list[str]], str]) -> dict[int, str]:
    """Rows in whose texts something was found, and what."""
    looked = ((i, look(list(_texts(conversation)))) for i, conversation in enumerate(facts.train))
    return {index: found for index, found in looked if found}


_ABOUT_ENCODINGS = re.compile(
    r"\b(?:utf-?\d+|latin-?1|iso-?8859\S*|(?:cp|windows)-?125\d|mojibake|charsets?"
    r"|(?:character|text|file)?[ -]?encod(?:ing|ings|ed)|decod(?:e|ed|ing)|unicode|garbled)\b",
    re.IGNORECASE,
)


def _wrongly_decoded(texts: list[str]) -> str:
    """What was decoded wrongly, unless the row is about that: it names an encoding, and has the
    right characters as well."""
    if not (found := _first(_mojibake, texts)):
        return ""
    explains = any(map(_ABOUT_ENCODINGS.search, texts))
    meant = (right for text in texts for _, right in _misread(text))
    explained = "\ufffd" in found or any(right in text for right in meant for text in texts)
    return "" if explains and explained else found


def _first(look: Callable[[str], str], texts: Iterable[str]) -> str:
    return next((found for text in texts if (found := look(text))), "")


def _entity_in_prose(texts: list[str]) -> str:
    return "" if any(map(_ABOUT_MARKUP.search, texts)) else _first(_entity, texts)


def _entity(text: str) -> str:
    hit = _ENTITY.search(text) if "&" in text else None
    return text[max(0, hit.start() - 16) : hit.end() + 16] if hit else ""


def _mojibake(text: str) -> str:
    if text.isascii():
        return ""
    if "\ufffd" in text:
        at = text.index("\ufffd")
        return text[max(0, at - 12) : at + 12]
    for found, _ in _misread(text):
        return text[max(0, found.start() - 12) : found.end() + 12]
    return ""


def _misread(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Characters that are UTF-8 in another reading, and what they mean."""
    for found in _NOT_ASCII.finditer(text):
        for encoding in ("cp1252", "latin-1"):
            try:
                meant = found.group().encode(encoding).decode("utf-8")
            except (UnicodeEncodeError, UnicodeDecodeError):
                continue
            # What is left is a letter or a quotation mark, not again two odd characters.
            if len(meant) < len(found.group()) and meant.isprintable():
                yield found, meant
                break


def _texts(conversation: Conversation) -> Iterator[str]:
    if conversation.text is not None:
        yield conversation.text
    for message in conversation.messages:
        if message["role"] != "tool":
            yield message["content"]


# ------------------------------------------------------------------ the same answer

_REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e|i can(?:no|')t|cannot|unable to|as an ai|not able to|won't)\b",
    re.IGNORECASE,
)
# Shorter answers are labels; a set of few answers is a classification.
_LEAST_WORDS, _LABELS = 5, 0.2
_LEAST_COPIES = 5


@check()
def answers_differ(facts: DataFacts) -> Iterator[Finding]:
    """No answer is given word for word to many questions."""
    often = repeated_answers(facts)
    if not often:
        return
    total = sum(bool(text.strip()) for text in facts.first_answers)
    text, first = often[0]
    rows = sorted(i for _, found in often for i in found)
    refusal = bool(_REFUSAL.search(text))
    everywhere = len(first) > _ONE_ANSWER * total
    yield rows_finding(
        facts.names,
        rows,
        code="answers-identical",
        level="warning",
        what=f"{share(len(rows), total)} have an answer that other rows repeat word for word: "
        f"{opening(facts.first_answers[first[0]])} {len(first):,} times",
        why="these are refusals of the model that generated the rows: the tuned model will refuse "
        "such questions too"
        if refusal
        else "nearly all questions have this one answer, so a column or a loop variable was "
        "probably mixed up when the file was written: the model learns to give it to any "
        "question"
        if everywhere
        else "the source used a fallback or a fixed answer: the model learns to give it to any "
        "question",
        fix="match the questions with their own answers again"
        if everywhere and not refusal
        else "remove those rows, or keep a few of them if the answer is intended",
    )


# Answers with this many words are not labels; and the share of one answer that leaves no choice.
_LONG_WORDS, _ONE_ANSWER = 20, 0.6


def repeated_answers(facts: DataFacts) -> list[tuple[str, list[int]]]:
    """(answer, its rows), where many different questions have it; the most frequent first."""
    by_text: dict[str, list[int]] = defaultdict(list)
    # First answers: later ones answer thanks and small talk.
    for index, text in enumerate(facts.first_answers):
        if text.strip():
            by_text[" ".join(text.split()).lower()].append(index)
    total = sum(map(len, by_text.values()))
    labels = len(by_text) < _LABELS * total
    least = max(_LEAST_COPIES, _SOME * total)
    often = []
    for text, rows in by_text.items():
        words = len(text.split())
        if len(rows) < least or words < _LEAST_WORDS:
            continue
        # A few answers to choose from are labels or replies to intents; one long one is neither.
        if labels and (words < _LONG_WORDS or len(rows) <= _ONE_ANSWER * total):
            continue
        # Copies of whole rows are reported as such.
        asked = {facts.train[i].key() for i in rows}
        if len(asked) >= max(_LEAST_COPIES, 0.5 * len(rows)):
            often.append((text, rows))
    return sorted(often, key=lambda item: -len(item[1]))


# ------------------------------------------------------------------ loops

_REPEATS = re.compile(
    r"\b(?:repeat\w*|repetition\w*|\d+ times|loops?|chorus|lyrics|songs?|mantra|chant\w*|copies"
    r"|ascii|again and again|over and over)\b",
    re.IGNORECASE,
)


@check()
def answers_come_to_an_end(facts: DataFacts) -> Iterator[Finding]:
    """No answer ends with the same words over and over."""
    rows = [
        i
        for i, text in enumerate(facts.answers)
        if _loops(text) and not _REPEATS.search(asked(facts.train[i]))
    ]
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="answer-loops",
            level=level_of(rows, len(facts.train)),
            what=f"the answers of {share(len(rows), len(facts.train))} end with the same words "
            f"over and over, such as {_shown(facts.answers[rows[0]])}",
            why="the model that generated them did not stop: the tuned model learns to repeat "
            "itself without an end",
            fix="generate them again, or cut them where the repetition begins",
        )


def _loops(text: str) -> bool:
    words = list(text) if _dense(text) else text.split()
    # The last word may be cut.
    if not (ends_in_circle(words) or ends_in_circle(words[:-1])):
        return False
    # Signs, figures, cells and code repeat for good reasons.
    tail = "".join(words[-16:])
    letters = 4 * sum(map(str.isalpha, tail)) > len(tail)
    return letters and "|" not in tail and not CODE.search(text)


# ------------------------------------------------------------------ what belongs to a prompt

_ROLE_FIRST = re.compile(
    r"\s*[*#_\[(<]{0,3}\s*(?:assistant|ai assistant|chatgpt|gpt(?:-\d\S*)?|bot|chatbot|ai|model)"
    r"\s*[*\])>]{0,3}\s*:\s",
    re.IGNORECASE,
)


@check()
def answers_without_role(facts: DataFacts) -> Iterator[Finding]:
    """Answers do not open with the name of the speaker."""
    rows = [i for i, text in enumerate(facts.answers) if _ROLE_FIRST.match(text)]
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="answer-role-first",
            level=level_of(rows, len(facts.train)),
            what=f"the answers of {share(len(rows), len(facts.train))} begin with the name of a "
            f"role, such as {opening(facts.answers[rows[0]])}",
            why="the rows were cut from a transcript without removing the speaker's name: the "
            "template already writes the role, and the model learns to write it again",
            fix="remove the name of the role from the answers",
        )


# Shorter questions are repeated by accident.
_LEAST_ECHO = 20


@check()
def questions_not_echoed(facts: DataFacts) -> Iterator[Finding]:
    """Answers do not begin with the whole question."""
    rows = []
    for index, conversation in enumerate(facts.train):
        asked, said = _last_exchange(conversation)
        if len(asked) < _LEAST_ECHO or not said.startswith(asked):
            continue
        # A text that comes back as it was is an edit with nothing to change; code is gone on with.
        edits = said == asked and conversation.messages[0]["role"] == "system"
        if not edits and not CODE.search(asked):
            rows.append(index)
    if rows:
        answer = facts.answers[rows[0]]
        yield rows_finding(
            facts.names,
            rows,
            code="question-echoed",
            level=level_of(rows, len(facts.train)),
            what=f"the answers of {share(len(rows), len(facts.train))} begin with their question, "
            f"word for word: {opening(answer)}",
            why="prompt and completion were saved as one text: the model learns to repeat the "
            "question before it answers",
            fix="remove the question from the answers",
        )


def _last_exchange(conversation: Conversation) -> tuple[str, str]:
    """(the last question, the trained answer after it), spaces and case aside."""
    asked = ""
    found = ("", "")
    for message in conversation.messages:
        text = " ".join(message["content"].split()).lower()
        if message["role"] == "user":
            asked = text
        elif message["role"] == "assistant" and asked:
            found, asked = (asked, text), ""
    return found
