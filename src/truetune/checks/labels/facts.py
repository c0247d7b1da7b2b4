"""The facts that the label checks examine, and the conditions under which each check applies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from truetune.checks.labels.table import Indices, TokenTable
from truetune.contract.frame import Frame, Separators, separators
from truetune.contract.tokens import Tokens
from truetune.data.rows import evenly

# Rows that are decoded where a property holds for most rows or for none. If at least half of the
# rows have it, the chance that fewer than a fifth of 200 drawn evenly do is below 1e-15.
SAMPLE = 200

LossOn = Literal["assistant", "last", "all"]
Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class LabelFacts:
    """Token rows, and how the model will be served.

    Attributes:
        table: the rows.
        frame: of tokenizer and served template.
        head_rows: rows of embedding and head; None if they are not known.
        loss_on: what was declared to be trained; None if nothing was declared.
        max_length: where rows were cut; None looks for a length that many rows share.
        is_text: plain text without turns; None decides by the rows.
        proved: the prompts are known to be the served ones: they came out of a contract.
        compared: the rows are compared with the messages that they were made from, elsewhere.
    """

    table: TokenTable
    frame: Frame
    head_rows: int | None = None
    loss_on: LossOn | None = None
    max_length: int | None = None
    is_text: bool | None = None
    proved: bool = False
    compared: bool = False

    @property
    def tokens(self) -> Tokens:
        """The tokenizer."""
        return self.frame.tokens

    def named(self, ids: Iterable[int]) -> str:
        """Tokens with their ids, in the order of these; those of no vocabulary are left out."""
        return self.tokens.named(i for i in sorted(ids) if i >= 0)

    @property
    def names(self) -> Sequence[str]:
        """Places of the rows."""
        return self.table.where

    @cached_property
    def answer_starts(self) -> Indices:
        """(R,) how many answers begin in each row; all 0 if the template is unknown."""
        table, frame = self.table, self.frame
        if frame.answer_start_ids:
            hits = table.find(frame.answer_start_ids)
            return np.bincount(table.rows_of(hits), minlength=len(table)).astype(np.int64)
        if not frame.answer_start:
            return np.zeros(len(table), np.int64)
        return np.array([text.count(frame.answer_start) for text in self.texts], np.int64)

    @cached_property
    def texts(self) -> list[str]:
        """All rows decoded, with special tokens; expensive, so used only if ids do not suffice."""
        decode = self.frame.tokens.decode
        return [decode(self.table.row_ids(row)) for row in range(len(self.table))]

    @cached_property
    def sample(self) -> list[int]:
        """At most SAMPLE rows, spread evenly over all."""
        return list(evenly(range(len(self.table)), SAMPLE))

    @cached_property
    def cut_at(self) -> int | None:
        """The length that rows were cut to: the longest length, if several rows have exactly it."""
        lengths = self.table.lengths
        longest = int(lengths.max(initial=0))
        limit = self.max_length or longest
        piled = int((lengths == limit).sum())
        if piled == 0 or (self.max_length is None and (piled < 2 or longest < 32)):
            return None
        # Rows that end well at the longest length are no pile at a limit.
        return None if self.max_length is None and self._end_well(limit) else limit

    def _end_well(self, length: int) -> bool:
        """Whether half of the rows of a length close with an end token or right after one."""
        table = self.table
        last = table.starts[1:][table.lengths == length] - 1
        ends = list(self.frame.ends)
        closed = np.isin(table.ids[last], ends) | np.isin(table.ids[np.maximum(last - 1, 0)], ends)
        return float(closed.mean()) >= 0.5

    @cached_property
    def is_stream(self) -> bool:
        """Blocks of one length cut from a stream: they begin and end anywhere."""
        table = self.table
        if self.cut_at is None or len(table) < 2:
            return False
        same = float((table.lengths[:-1] == self.cut_at).mean())
        if same < 0.95:
            return False
        return self.plain or (self._ends_inside >= 0.1 and self._begin_alike < 0.5)

    @cached_property
    def _begin_alike(self) -> float:
        """Share of rows that begin with the most common first token: conversations do."""
        first = self.table.ids[self.table.starts[:-1][self.table.lengths > 0]]
        return float(np.unique(first, return_counts=True)[1].max(initial=0)) / max(len(first), 1)

    @cached_property
    def _ends_inside(self) -> float:
        """Share of rows in which an answer ends before the row does."""
        table = self.table
        ends = np.isin(table.ids, list(self.frame.ends)) & table.supervised
        positions = np.flatnonzero(ends)
        rows = table.rows_of(positions)
        # A row's own end does not count: every row of one answer has it.
        inside = table.starts[rows + 1] - positions > 3
        return len(np.unique(rows[inside])) / max(len(table), 1)

    @cached_property
    def plain(self) -> bool:
        """Text without turns: every token is a target and no answer begins anywhere."""
        if self.is_text is not None:
            return self.is_text
        everything = int(self.table.num_supervised.sum()) >= int((self.table.lengths - 1).sum())
        if not everything or self.answer_starts.any() or self.scaffold:
            return False
        return not np.isin(self.table.ids, self.turn_markers).any()

    @cached_property
    def turn_markers(self) -> list[int]:
        """Special tokens that the template writes before turns, and nowhere else."""
        tokens = self.frame.tokens
        written = tokens.encode([self.frame.answer_start + self.frame.user_start])[0]
        bos = tokens.tokenizer.bos_token_id
        return sorted((tokens.special_ids & set(written)) - self.frame.ends - {bos})

    @cached_property
    def separators(self) -> Separators | None:
        """What the template writes between turns under the arguments that are served."""
        contract, bos = self.frame.contract, self.tokens.tokenizer.bos_token_id
        if contract is None:
            return None
        return separators(contract, {}, "" if bos is None else self.tokens.decode([bos]))

    @cached_property
    def scaffold(self) -> tuple[str, ...]:
        """Headings that occur in most rows, such as `### Response:` or `Answer:`; () if there are
        fewer than two, because prompt and answer have one each."""
        counts: Counter[str] = Counter()
        for row in self.sample:
            special = self.frame.tokens.special_ids
            ids = [i for i in self.table.row_ids(row) if i not in special]
            text = self.frame.tokens.decode(ids)
            counts.update({label.strip() for label in _LABEL.findall(text)})
        least = max(2, (len(self.sample) + 1) // 2)
        common = tuple(label for label, n in counts.most_common() if n >= least)
        return common if len(common) > 1 else ()


# What people write before a turn: `Q:`, `### Response:`, `<|user|>`, `[INST]`.
_LABEL = re.compile(
    r"^[#*\s]*[^\W\d_][\w ]{0,30}:|^\#+ [^\n]{1,40}$|<\|?/?[a-z_]{1,30}\|?>|\[/?[A-Z_]{2,20}\]"
    # In the middle of a line: `### Human: ... ### Assistant: ...`, `Q: ... A: ...`.
    r"|(?<!\S)(?:#{2,} ?)?[A-Z]\w{0,20}:(?=\s)",
    re.MULTILINE,
)


def once(compute: Callable[[LabelFacts], Found]) -> Callable[[LabelFacts], Found]:
    """Cache a value that several checks need, as long as its facts exist."""
    known: WeakKeyDictionary[LabelFacts, Found] = WeakKeyDictionary()

    def asked(facts: LabelFacts) -> Found:
        if facts not in known:
            known[facts] = compute(facts)
        return known[facts]

    return asked


# ------------------------------------------------------------------ conditions of checks


def of_turns(facts: LabelFacts) -> bool:
    """Rows of turns: neither plain text nor blocks cut from a stream."""
    return bool(len(facts.table)) and not facts.plain and not facts.is_stream


def unproved(facts: LabelFacts) -> bool:
    """It has not been proved that the prompts are the served ones."""
    return not facts.proved


def has_header(facts: LabelFacts) -> bool:
    """The ids that precede an answer are known."""
    return bool(facts.frame.answer_start_ids)
