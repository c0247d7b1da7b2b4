"""Find rows that occur more than once: exactly, nearly, or in both training and held-out rows.

Near duplicates are found by MinHash over runs of words: each row keeps the smallest of several
hashes of its runs, rows that agree in a band of them are compared, and those whose sets of runs
overlap by at least 80 % (Jaccard) are reported. Of pairs at 80 % the bands find 98 in 100, at 90 %
all but two in 10,000.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from truetune.checks.conversations.quality import repeated_answers
from truetune.checks.conversations.rows import DataFacts, said
from truetune.checks.registry import check
from truetune.findings import Finding, rows_finding, share

_RUN = 3
_BANDS, _PER_BAND = 8, 4
_NEAR = 0.8
# Shorter rows are alike by chance: "What is 3 + 4?" and its kin.
_LEAST_WORDS = 12
_LEAST_SHARE = 0.01
_WORD = re.compile(r"\w+")

Hashes = npt.NDArray[np.uint64]


@check()
def exact_duplicates(facts: DataFacts) -> Iterator[Finding]:
    """No row occurs twice: a copy counts again in every epoch."""
    first: dict[str, int] = {}
    again = []
    for index, conversation in enumerate(facts.train):
        if first.setdefault(conversation.digest(), index) != index:
            again.append(index)
    if again:
        total = len(facts.train)
        yield rows_finding(
            facts.names,
            again,
            code="rows-duplicate",
            level="warning" if len(again) > _LEAST_SHARE * total else "note",
            what=f"{share(len(again), total)} are exact copies of earlier ones",
            why="each copy is one more pass over the row in every epoch",
            fix="remove the copies",
        )


@check()
def near_duplicates(facts: DataFacts) -> Iterator[Finding]:
    """No rows differ in only a word or two, within training rows and across the split."""
    rows = [*facts.train, *facts.held_out]
    texts = [said(conversation) for conversation in rows]
    pairs = near_pairs(texts)
    num_train = len(facts.train)
    # One long answer to many questions makes rows alike; it is reported as that.
    same = {i: text for text, found in repeated_answers(facts) for i in found} if pairs else {}
    pairs = [(a, b) for a, b in pairs if a not in same or same[a] != same.get(b)]
    digests = [c.digest() for c in rows] if pairs else []
    inside = sorted({b for a, b in pairs if b < num_train and digests[a] != digests[b]})
    across = sorted({b for a, b in pairs if a < num_train <= b})
    if inside:
        example = next(a for a, b in pairs if b == inside[0])
        yield rows_finding(
            facts.names,
            inside,
            code="rows-nearly-duplicate",
            level="warning" if len(inside) > 0.05 * num_train else "note",
            what=f"{share(len(inside), num_train)} nearly repeat earlier ones",
            why="at least 80 % of their three-word sequences are the same, as in "
            f"{rows[inside[0]].where} and {rows[example].where}",
            fix="remove them, unless they are intentional paraphrases",
        )
    if across:
        places = [conversation.where for conversation in facts.held_out]
        held = [b - num_train for b in across]
        example = next(a for a, b in pairs if b == across[0] and a < num_train)
        yield rows_finding(
            places,
            held,
            code="eval-nearly-trained",
            level="warning" if len(held) > 0.02 * len(facts.held_out) else "note",
            what=f"{share(len(held), len(facts.held_out))} of the held-out set nearly repeat a "
            "training row",
            why=f"for example, {rows[across[0]].where} repeats {rows[example].where}: the held-out "
            "loss will look better than it would on new rows",
            fix="keep paraphrases of one row on one side of the split",
        )


def near_pairs(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of texts that nearly repeat each other; each later text is paired
    with one earlier text of each cluster."""
    runs, owners = _word_runs(texts)
    if not len(runs):
        return []
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    keys = owners[starts]
    signatures = _signatures(runs, starts)
    bounds = dict(zip(keys.tolist(), pairwise([*starts.tolist(), len(runs)]), strict=True))
    found: set[tuple[int, int]] = set()
    compared: set[tuple[int, int]] = set()
    sets: dict[int, npt.NDArray[np.uint64]] = {}
    for band in range(_BANDS):
        part = signatures[:, band * _PER_BAND : (band + 1) * _PER_BAND]
        groups = defaultdict(list)
        for key, value in zip(keys.tolist(), map(bytes, part), strict=True):
            groups[value].append(key)
        for group in groups.values():
            for pair in _candidates(group):
                if pair in compared:
                    continue
                compared.add(pair)
                if _jaccard(*pair, runs, bounds, sets) >= _NEAR:
                    found.add(pair)
    return sorted(found)


def _candidates(group: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbours in a group, and each with its first: a cluster of n rows is no n x n pairs."""
    for index, later in enumerate(group[1:], 1):
        yield group[index - 1], later
        if index > 1:
            yield group[0], later


def _word_runs(texts: Sequence[str]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Hashes of all runs of three words, and the text that each belongs to; short texts have
    none."""
    numbers: dict[str, int] = {}
    flat: list[npt.NDArray[np.int64]] = []
    owners: list[int] = []
    lengths: list[int] = []
    for index, text in enumerate(texts):
        said_words = _WORD.findall(text.lower())
        if len(said_words) < _LEAST_WORDS:
            continue
        known = (numbers.setdefault(word, len(numbers)) for word in said_words)
        flat.append(np.fromiter(known, np.int64, len(said_words)))
        owners.append(index)
        lengths.append(len(said_words))
    if not flat:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    words = np.concatenate(flat).astype(np.uint64)
    owner = np.repeat(np.array(owners, np.int64), lengths)
    with np.errstate(over="ignore"):
        hashed = _mixed(words[: 1 - _RUN or None])
        for offset in range(1, _RUN):
            stop = len(words) - _RUN + 1 + offset
            hashed = _mixed(hashed * np.uint64(31) + words[offset:stop])
    inside = owner[: len(hashed)] == owner[_RUN - 1 :]
    return hashed[inside], owner[: len(hashed)][inside]


def _mixed(values: Hashes) -> Hashes:
    """A 64-bit finaliser (splitmix64, Steele et al. 2014): nearby numbers come out unrelated."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _signatures(runs: Hashes, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """(rows, bands x per band) smallest value of each hash function over each row's runs."""
    found = np.empty((len(starts), _BANDS * _PER_BAND), np.uint32)
    for number in range(found.shape[1]):
        seed = int.from_bytes(hashlib.sha256(b"%d" % number).digest()[:8], "little")
        values = (_mixed(runs ^ np.uint64(seed)) >> np.uint64(32)).astype(np.uint32)
        found[:, number] = np.minimum.reduceat(values, starts)
    return found


def _jaccard(
    a: int,
    b: int,
    runs: Hashes,
    bounds: dict[int, tuple[int, int]],
    sets: dict[int, npt.NDArray[np.uint64]],
) -> float:
    for key in (a, b):
        if key not in sets:
            sets[key] = np.unique(runs[slice(*bounds[key])])
    both = len(np.intersect1d(sets[a], sets[b], assume_unique=True))
    return both / max(len(sets[a]) + len(sets[b]) - both, 1)


@check()
def prompts_agree(facts: DataFacts) -> Iterator[Finding]:
    """No prompt has several different answers."""
    prompts = Counter(c.key() for c in facts.train if c.text is None)
    repeated = {key for key, n in prompts.items() if n > 1}
    answers: dict[str, set[str]] = defaultdict(set)
    members: dict[str, list[int]] = defaultdict(list)
    for index, conversation in enumerate(facts.train if repeated else ()):
        key = conversation.key() if conversation.text is None else ""
        if key in repeated:
            answers[key].add(conversation.digest())
            members[key].append(index)
    rows = sorted(i for key, kinds in answers.items() if len(kinds) > 1 for i in members[key])
    if rows:
        yield rows_finding(
            facts.names,
            rows,
            code="prompt-repeated",
            level="note",
            what=f"{share(len(rows), len(facts.train))} share their prompt with a row that has a "
            "different answer",
            why="the model learns to give each of the answers some of the time",
            fix="nothing to do if several answers are correct",
        )
