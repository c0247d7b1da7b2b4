"""Find answers that do not belong to their prompt: moved by a row, exchanged with the question, or
begun with the system prompt.

The rows are compared with each other: what most of them are like says what a few should be.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from truetune.checks.conversations.rows import DataFacts, level_of, opening
from truetune.checks.registry import check
from truetune.data.conversation import Conversation
from truetune.findings import Finding, rows_finding, share

_WORD = re.compile(r"[^\W_]{2,}")
# Letters of a text that are read: its subject shows early.
_READ = 2000


def _exchanges(facts: DataFacts) -> dict[int, tuple[str, str]]:
    """(the first question, the first answer) of the rows that have both in words."""
    found = {}
    for index, conversation in enumerate(facts.train):
        asked = next((m["content"] for m in conversation.messages if m["role"] == "user"), "")
        if asked.strip() and facts.first_answers[index].strip():
            found[index] = (str(asked), facts.first_answers[index])
    return found


# ------------------------------------------------------------------ moved by a row

# Rows that a stretch of moved answers has at least, how much more its questions and the answers
# beside theirs have in common than with their own, and than chance (in standard errors). Real rows
# whose answers were moved have 55 and more of these, and no real rows over 3.
_LEAST_MOVED, _CLEARLY, _ERRORS = 15, 4.0, 12.0
_OFFSETS = (1, -1, 2, -2)
# Letters that two texts share only if one was taken from the other.
_SAME = 40
# Rows so far apart have nothing to do with each other.
_APART, _LEAST_APART = (5, -5, 7, -7, 9, -9, 11, -11), 1000


@check()
def answers_beside_their_questions(facts: DataFacts) -> Iterator[Finding]:
    """Answers have more words in common with their own questions than with those of a neighbour."""
    pairs = _exchanges(facts)
    if len(pairs) < 2 * _LEAST_MOVED:
        return
    places = list(pairs)
    likeness = _Likeness(list(pairs.values()))
    own = likeness.at(0)
    beside = {offset: likeness.at(offset) for offset in _OFFSETS}
    chance = np.concatenate([likeness.at(offset, _LEAST_APART) for offset in _APART])
    for offset, moved in beside.items():
        first, last = _stretch(moved - own - 0.02)
        part = slice(first, last)
        if last - first < _LEAST_MOVED:
            continue
        error = max(float(chance.std()), 0.01) / math.sqrt(last - first)
        gain = float(moved[part].mean() - chance.mean())
        others = max(own[part].mean(), beside[-offset][part].mean()) - chance.mean()
        if gain < _ERRORS * error or gain < _CLEARLY * max(float(others), error):
            continue
        rows = places[first + offset : last + offset]
        by = "one row" if abs(offset) == 1 else f"{abs(offset)} rows"
        side = "before" if offset > 0 else "after"
        yield rows_finding(
            facts.names,
            rows,
            code="answers-shifted",
            level="warning",
            what=f"the answers of {share(len(rows), len(facts.train))} fit the question that "
            f"is {by} {side} theirs",
            why=f"questions have {moved[part].mean():.0%} of their words in common with that "
            f"answer and {own[part].mean():.0%} with their own (chance: {chance.mean():.0%}): a "
            "line was lost or added in one of two columns or files that were joined",
            fix="join questions and answers again, starting with the first of these rows",
        )
        return


class _Likeness:
    """How much a question and the answer so many rows further have in common: the cosine of their
    words, weighed by how rare they are."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._texts = [tuple(" ".join(t[:_READ].lower().split()) for t in pair) for pair in pairs]
        self._words = [tuple(set(_WORD.findall(t)) for t in pair) for pair in self._texts]
        rows = Counter(word for asked, said in self._words for word in asked | said)
        self._weight = {word: math.log(len(pairs) / n) ** 2 for word, n in rows.items()}
        self._sizes = [
            tuple(math.sqrt(sum(self._weight[w] for w in words)) for words in pair)
            for pair in self._words
        ]

    def at(self, offset: int, most: int | None = None) -> npt.NDArray[np.float64]:
        """(rows,) of all rows, or of the first; zeros where the offset leaves the rows."""
        number = len(self._words)
        rows = range(number)[:most]
        return np.array(
            [self._of(i, i + offset) if 0 <= i + offset < number else 0.0 for i in rows]
        )

    def _of(self, question: int, answer: int) -> float:
        size = self._sizes[question][0] * self._sizes[answer][1]
        asked, said = self._texts[question][0], self._texts[answer][1]
        # A text that goes on in the next row, or comes back in it, was put there.
        if not size or (question != answer and _goes_on(asked, said)):
            return 0.0
        both = self._words[question][0] & self._words[answer][1]
        return sum(self._weight[word] for word in both) / size


def _goes_on(asked: str, said: str) -> bool:
    return said[:_SAME] in asked or asked[:_SAME] in said or asked[-_SAME:] in said


def _stretch(gains: npt.NDArray[np.float64]) -> tuple[int, int]:
    """[first, last) of the stretch with the greatest sum."""
    sums = np.concatenate([[0.0], np.cumsum(gains)])
    lowest = np.minimum.accumulate(sums)
    last = int(np.argmax(sums - lowest))
    return int(np.argmin(sums[: last + 1])), last


# ------------------------------------------------------------------ exchanged

# A row is exchanged whose texts are e^3 times likelier the other way round. Of rows that are not,
# hardly one in e^3 looks so (0 to 2 % of real sets); most must be as likely the way they are.
_LIKELIER, _SOME_EXCHANGED, _LEAST_EXCHANGED, _MOST_EXCHANGED = 3.0, 0.04, 5, 0.4
_IN_PLACE, _ROUNDS = 0.6, 4
_FIRST_WORD = re.compile(r"[^\W\d_]+")
_DENSE = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")


@check()
def questions_and_answers_in_place(facts: DataFacts) -> Iterator[Finding]:
    """No group of rows has its question where the others have their answer."""
    pairs = _exchanges(facts)
    rows = _exchanged(list(pairs.values()))
    if not rows:
        return
    places = list(pairs)
    asked, said = pairs[places[rows[0]]]
    yield rows_finding(
        facts.names,
        [places[i] for i in rows],
        code="turns-exchanged",
        level="warning",
        what=f"the question and the answer of {share(len(rows), len(facts.train))} seem to be "
        f"swapped, such as {opening(asked)}, which is answered with {opening(said)}",
        why="in these rows the question has the form and length of the other rows' answers, and "
        "the answer those of their questions: the model learns to answer with a question",
        fix="swap them, or remove those rows; nothing to do if this is the task, such as finding "
        "the question to an answer",
    )


def _exchanged(pairs: Sequence[tuple[str, str]]) -> list[int]:
    """Rows whose two texts look like those of the others the other way round."""
    if len(pairs) < 30:
        return []
    marks = [(_marks(asked), _marks(said)) for asked, said in pairs]
    least = max(_LEAST_EXCHANGED, _SOME_EXCHANGED * len(pairs))
    turned = np.zeros(len(pairs), bool)
    for _ in range(_ROUNDS):
        ways = [(b, a) if other else (a, b) for (a, b), other in zip(marks, turned, strict=True)]
        scores = _own_way(ways)
        # Each round knows better what a question looks like.
        now = np.where(turned, -scores, scores) < -_LIKELIER
        # Where they are half of the rows, nobody knows which half.
        if not least <= now.sum() <= _MOST_EXCHANGED * len(pairs):
            return []
        if (now == turned).all():
            break
        turned = now
    sure = (scores > _LIKELIER).mean() >= _IN_PLACE
    return np.flatnonzero(turned).tolist() if sure else []


def _marks(text: str) -> frozenset[str]:
    """What tells a question from an answer: how it begins and ends, and its length."""
    begins = text.lstrip()[:200].lower()
    words = list(begins[:2]) if _DENSE.match(begins) else _FIRST_WORD.findall(begins)[:2]
    asks = "?" in text or "\uff1f" in text
    return frozenset(
        {
            f"first {words[:1]}",
            f"two {words}",
            f"end {text.rstrip()[-1:]}",
            f"length {len(text).bit_length()}",
            f"lines {min(text.count(chr(10)), 3)}",
            f"asks {asks}",
        }
    )


def _own_way(ways: Sequence[tuple[frozenset[str], frozenset[str]]]) -> npt.NDArray[np.float64]:
    """(rows,) log of how much likelier each row is this way than the other, by the other rows:
    naive Bayes with half a count added."""
    asked = Counter(mark for question, _ in ways for mark in question)
    said = Counter(mark for _, answer in ways for mark in answer)
    scores = []
    for question, answer in ways:
        score = 0.0
        for mark in question ^ answer:
            as_asked = asked[mark] - (mark in question) + 0.5
            as_said = said[mark] - (mark in answer) + 0.5
            score += math.log(as_asked / as_said) * (1 if mark in question else -1)
        scores.append(score)
    return np.array(scores)


# ------------------------------------------------------------------ the system prompt

# Words of the beginning of a system prompt that no answer has by chance; all of a shorter one.
_FIRST_WORDS, _LEAST_WORDS = 8, 5
# Where it tells the model what to be or do; else it may be the text that the answer is about.
_TO_MODEL = re.compile(
    r"\b(?:you|your|assistant|answer|respond|reply|act|always|never|do not|don't)\b", re.IGNORECASE
)
_ASKED_FOR = re.compile(r"\b(?:prompts?|instructions?|instructed|told)\b", re.IGNORECASE)
_ANY_WORD = re.compile(r"\w+")


@check()
def system_prompt_kept(facts: DataFacts) -> Iterator[Finding]:
    """No answer contains the beginning of its system prompt, word for word."""
    rows = [i for i, conversation in enumerate(facts.train) if _says_system(conversation)]
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="system-in-answer",
            level=level_of(rows, len(facts.train)),
            what=f"the answers of {share(len(rows), len(facts.train))} repeat the beginning of "
            f"their system prompt, word for word: {opening(_system(facts.train[rows[0]]))}",
            why="the rendered prompt was saved as a part of the answer, or the model that "
            "generated it recited its instructions: the model learns to reveal them",
            fix="remove the system prompt from the answers",
        )


def _system(conversation: Conversation) -> str:
    first = conversation.messages[0] if conversation.messages else {"role": "", "content": ""}
    return str(first["content"]) if first["role"] in ("system", "developer") else ""


def _says_system(conversation: Conversation) -> bool:
    words = _ANY_WORD.findall(_system(conversation).lower())
    start = " ".join(words[:_FIRST_WORDS])
    if len(words) < _LEAST_WORDS or not _TO_MODEL.search(start):
        return False
    for message in conversation.messages:
        text = " ".join(_ANY_WORD.findall(message["content"].lower()))
        known = f" {start} " in f" {text} "
        if message["role"] == "user" and (known or _ASKED_FOR.search(text)):
            return False
        if message["role"] == "assistant" and message.get("train") is not False and known:
            return True
    return False
