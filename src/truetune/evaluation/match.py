"""Judge whether a reply matches the row's answer, under one kind of match.

input   the texts of replies and of the rows' answers
does    reads an answer out of each and compares the two; patterns and mathematics, which may take
        for ever, run in a child process with a limit on each pair
output  Judged, one a reply
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from truetune.behaviour.text import normalised
from truetune.errors import UsageError
from truetune.evaluation.read_answer import holds, json_value, last_number
from truetune.system import child

Kind = Literal["exact", "contains", "number", "regex", "json", "none"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Replies whose comparison was stopped, after which no more are tried.
_MOST_SLOW = 20


@dataclass(frozen=True)
class Judged:
    """A reply, judged.

    Attributes:
        right: it says what is expected.
        said: the answer that was read out of it, on which votes are counted; None for no answer.
        slow: the comparison was stopped because it took too long; it counts as not right.
    """

    right: bool
    said: str | None
    slow: bool = False


@dataclass(frozen=True)
class Match:
    """A kind of match.

    Attributes:
        kind: exact: the same text, except for whitespace. contains: the expected text stands in the
            reply as whole words. number: the last numbers are equal. regex: the expected text is a
            pattern that is found in the reply. json: equal values. none: nothing is compared.
        pattern: of kind regex: the pattern in place of the rows' own. What its first group catches
            last in the reply must be what it catches in the expected text (or that text, where it
            catches nothing there); without a group, it must be found.

    Raises:
        UsageError: the kind is unknown, or the pattern is not a valid regular expression.
    """

    kind: Kind = "exact"
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(
                f"unknown match {self.kind!r}",
                where="--match",
                fix=f"use one of {', '.join(KINDS)}",
                code="match-unknown",
            )
        if self.pattern is None:
            return
        if self.kind != "regex":
            raise UsageError(
                "--pattern has no effect without --match regex",
                where="--pattern",
                fix="add --match regex",
                code="match-pattern",
            )
        if problem := _pattern_problem(self.pattern):
            raise UsageError(
                f"the pattern is not a valid regular expression: {problem}",
                where="--pattern",
                fix="use the syntax of Python's re module",
                code="match-pattern",
            )

    @property
    def needs_expected(self) -> bool:
        """Whether a row without an answer of its own cannot be judged."""
        if self.kind == "none":
            return False
        return self.pattern is None or bool(re.compile(self.pattern).groups)

    @property
    def description(self) -> str:
        """How replies are compared, in words."""
        if self.kind == "number":
            by = "math-verify" if has_math_verify() else "the last number of each text"
            return f"number, by {by}"
        return {
            "exact": "exact: the same text, except for whitespace",
            "contains": "contains: the reply contains the row's answer as whole words",
            "regex": "regex: " + (self.pattern or "the row's answer is the pattern"),
            "json": "json: equal values",
            "none": "none",
        }[self.kind]

    def unfit(self, expected: str) -> str:
        """Why nothing can be compared with a row's answer; "" if it can."""
        if not self.needs_expected:
            return ""
        if not expected.strip():
            return "the row's answer is empty"
        # Mathematics without digits is written in LaTeX.
        is_formula = has_math_verify() and ("\\" in expected or "$" in expected)
        if self.kind == "number" and not is_formula and last_number(expected) is None:
            return "the row's answer has no number"
        if self.kind == "json" and json_value(expected) is None:
            return "the row's answer is not valid JSON"
        if self.kind == "regex" and self.pattern is None and _pattern_problem(expected):
            return "the row's answer is not a valid regular expression"
        return ""

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Judged]:
        """Judge pairs of a reply and what is expected of it.

        Raises:
            UsageError: comparing took too long, again and again.
        """
        if self.kind == "regex" or (self.kind == "number" and has_math_verify()):
            return self._judge_apart(pairs)
        return [self._judge_one(reply, expected) for reply, expected in pairs]

    def _judge_one(self, reply: str, expected: str) -> Judged:
        if self.kind == "number":
            number = last_number(reply)
            return Judged(
                number is not None and number == last_number(expected),
                None if number is None else str(number),
            )
        if self.kind == "json":
            value = json_value(reply)
            return Judged(value is not None and value == json_value(expected), value)
        said, wanted = normalised(reply), normalised(expected)
        right = holds(said, wanted) if self.kind == "contains" else said == wanted
        return Judged(right and self.kind != "none", said or None)

    def _judge_apart(self, pairs: Sequence[tuple[str, str]]) -> list[Judged]:
        """In a child process, which is started anew behind a pair that stopped it."""
        # Equal pairs are judged once: samples repeat themselves.
        left = list(dict.fromkeys(pairs))
        known: dict[tuple[str, str], Judged] = {}
        slow = 0
        while left:
            question = {"kind": self.kind, "pattern": self.pattern, "pairs": left}
            answer = child.ask("truetune.evaluation.match_worker", json.dumps(question).encode())
            # A line that was cut off belongs to the pair that stopped the child.
            lines = answer.data.decode().split("\n")[:-1]
            for pair, line in zip(left, lines, strict=False):
                right, said = json.loads(line)
                known[pair] = Judged(right, said)
            left = left[len(lines) :]
            if left:
                slow += 1
                if slow > _MOST_SLOW:
                    raise self._too_slow(answer)
                known[left.pop(0)] = Judged(False, None, slow=True)
        return [known[pair] for pair in pairs]

    def _too_slow(self, answer: child.Reply) -> UsageError:
        return UsageError(
            f"comparing took too long for more than {_MOST_SLOW} replies",
            where=f"--match {self.kind}",
            why=answer.errors.splitlines()[-1][:300]
            if answer.errors
            else "the pattern backtracks excessively on such replies",
            fix="use a pattern without nested repetition, or another --match",
            code="match-too-slow",
        )


def has_math_verify() -> bool:
    """Whether mathematics is compared by math-verify: the extra `eval`."""
    return importlib.util.find_spec("math_verify") is not None


def _pattern_problem(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error) or type(error).__name__
    return ""


def pattern_match(pattern: str | None, reply: str, expected: str) -> Judged:
    """One reply under kind regex; see `Match`."""
    compiled = re.compile(expected if pattern is None else pattern)
    if pattern is None or not compiled.groups:
        found = compiled.search(reply)
        return Judged(found is not None, None if found is None else normalised(found[0]))
    said, wanted = _caught(compiled, reply), _caught(compiled, expected)
    wanted = normalised(expected) if wanted is None else wanted
    return Judged(said is not None and said == wanted, said)


def _caught(pattern: re.Pattern[str], text: str) -> str | None:
    """What the first group catches last."""
    caught = [found[1] for found in pattern.finditer(text) if found[1] is not None]
    return normalised(caught[-1]) if caught else None


def mathematics(reply: str, expected: str) -> Judged:
    """One reply under kind number, by math-verify."""
    math_verify: Any = importlib.import_module("math_verify")
    # The child's own limit ends what takes too long.
    gold = math_verify.parse(expected, parsing_timeout=None)
    said = math_verify.parse(reply, parsing_timeout=None)
    right = bool(said) and bool(math_verify.verify(gold, said, timeout_seconds=None))
    return Judged(right, str(said[-1]) if said else None)
