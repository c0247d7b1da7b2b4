"""Check padding, attention masks, packing and held-out rows on the collated batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from truetune.auditing.read import IGNORED, Reading, ReadRow, hidden_text, miscounted
from truetune.auditing.subject import Subject
from truetune.checks.labels.facts import LabelFacts
from truetune.findings import Finding, rows_finding, share


def batch_findings(subject: Subject, reading: Reading, facts: LabelFacts) -> Iterator[Finding]:
    """Findings that need the collated batches with their padding and masks."""
    yield from _labels_outside(reading.rows, facts)
    yield from _padding_attended(subject, reading.rows)
    yield from _attention_holes(reading.rows, subject.tokenizer.pad_token_id)
    yield from _positions_count(reading.rows)
    yield from _rows_again(subject, reading.rows)
    yield from _dropped_rows(subject)


def _finding(rows: Sequence[ReadRow], bad: Sequence[int], **parts: Any) -> Finding:
    return rows_finding([row.name for row in rows], bad, **parts)


def _labels_outside(rows: Sequence[ReadRow], facts: LabelFacts) -> Iterator[Finding]:
    """A label is an id of the vocabulary, or -100."""
    most = facts.head_rows or 2**31
    bad, seen = [], set()
    for number, row in enumerate(rows):
        outside = row.labels[((row.labels < 0) & (row.labels != IGNORED)) | (row.labels >= most)]
        if len(outside):
            bad.append(number)
            seen.update(outside[:4].tolist())
    if bad:
        yield _finding(
            rows,
            bad,
            code="label-outside",
            level="error",
            what=f"labels of {share(len(bad), len(rows))} are not ids of the model: "
            f"{', '.join(map(str, sorted(seen)[:4]))}",
            why="the loss ignores only -100 and uses any other value as an index, which fails on "
            "a GPU with an unclear message",
            fix="use labels that are ids below the size of the head, and -100 where nothing is to "
            "be learned",
        )


def _padding_attended(subject: Subject, rows: Sequence[ReadRow]) -> Iterator[Finding]:
    """Padding before a row is hidden by the mask; otherwise every later token attends to it."""
    pad = subject.tokenizer.pad_token_id
    if pad is None:
        return
    bad = []
    for number, row in enumerate(rows):
        ids = row.ids
        lead = int(np.argmax(ids != pad)) if (ids != pad).any() else len(ids)
        # One may be a begin token that the pad token is; two are padding.
        if lead < 2 or lead == len(ids):
            continue
        if row.mask is None or row.mask.shape != ids.shape or row.mask[:lead].any():
            bad.append(number)
    if bad:
        yield _finding(
            rows,
            bad,
            code="padding-attended",
            level="error",
            what=f"{share(len(bad), len(rows))} begin with padding that the model attends to",
            why="the attention mask is missing or 1 there: every token attends to the pad tokens "
            "before it, which no served prompt has",
            fix="pass the tokenizer's attention_mask to the model, or pad on the right",
        )


def _attention_holes(rows: Sequence[ReadRow], pad: int | None) -> Iterator[Finding]:
    """The attention mask hides no tokens of a row."""
    found: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if kind := _hides(row, pad):
            found.setdefault(kind, []).append(number)
    if "inverted" in found:
        # A row without padding has nothing that the mask could show.
        found["inverted"] += found.pop("all", [])
    total = len(rows)
    for kind, bad in found.items():
        what, why, fix = _HIDDEN[kind]
        yield _finding(
            rows,
            bad,
            code="attention-hole",
            # The model sees part of what it is to answer, and the rest as it is served.
            level="warning" if kind in _MILD else "error",
            what=what.format(rows=share(len(bad), total)),
            why=why,
            fix=fix,
        )


# By what is hidden: what, why, fix.
_HIDDEN = {
    "all": (
        "the attention mask is 0 on every token of {rows}",
        "it was created with zeros and never filled: no token attends to another, so the prompt "
        "is not read",
        "take the attention mask from the tokenizer: 1 on every token of the row, 0 on padding",
    ),
    "inverted": (
        "the attention mask of {rows} is inverted: it is 0 on the tokens and 1 on the padding",
        "the mask follows the opposite convention (1 - mask, ~mask, or True for hidden tokens, as "
        "in torch's key_padding_mask): the model reads only padding",
        "invert it: 1 (or True) on every token of the row, 0 on padding",
    ),
    "labels": (
        "the attention mask hides the beginning of {rows}: the prompt is in the ids, but the model "
        "does not see it",
        "the attention mask was made from the labels: a label of -100 excludes a token from the "
        "loss, but an attention mask of 0 hides it, so answers are learned without a question",
        "set the attention mask to 1 on every token of the row and to 0 only on padding; let the "
        "labels control the loss",
    ),
    "front": (
        "the attention mask hides the beginning of {rows}: it is in the ids, but the model does "
        "not see it",
        "the mask was built for rows of different lengths, or padded on the other side: answers "
        "are learned with only part of their question",
        "set the attention mask to 1 on every token of the row and to 0 only on padding",
    ),
    "pad": (
        "the attention mask hides tokens inside {rows}",
        "a mask made from `ids != pad` hides the end tokens of earlier turns if pad and end are "
        "the same token; the served model sees them",
        "take the attention mask from the tokenizer, or build it from lengths",
    ),
    "tail": (
        "the attention mask hides the last tokens of {rows}",
        "the mask was built from the wrong lengths: they were measured before the end token was "
        "appended, or belong to other rows",
        "take the attention mask from the tokenizer, or build it from the lengths of the final ids",
    ),
    "inside": (
        "the attention mask hides tokens inside {rows}",
        "it was not built from the lengths of these rows: it belongs to other rows, or hides "
        "tokens on purpose; the served model sees these tokens",
        "take the attention mask from the tokenizer, or build it from lengths",
    ),
}
_MILD = frozenset({"pad", "tail", "inside"})


def _hides(row: ReadRow, pad: int | None) -> str:
    """What the attention mask of a row hides, as a key of the reasons; "" for nothing."""
    mask = row.mask
    if mask is None or mask.shape != row.ids.shape:
        return ""
    mask = mask != 0
    hidden = hidden_text(row.ids, row.labels, mask, pad)
    text = np.flatnonzero(row.ids != pad) if pad is not None else np.arange(len(mask))
    if not mask.any():
        return "all" if hidden.any() and len(text) else ""
    seen = np.flatnonzero(mask)
    first, last = int(seen[0]), int(seen[-1])
    gaps = hidden[first:].any() or not mask[first : last + 1].all()
    if not hidden.any() and not gaps:
        return ""
    if len(text) and not mask[text].any():
        return "inverted"
    if hidden[:first].any():
        labelled = row.labels != IGNORED
        return "labels" if labelled.any() and (mask == labelled).mean() > _ALIKE else "front"
    lost = row.ids[: last + 1][~mask[: last + 1]]
    if pad is not None and len(lost) and (lost == pad).all() and not hidden[last + 1 :].any():
        return "pad"
    return "tail" if mask[first : last + 1].all() else "inside"


# A mask that was made from labels may take a token more or less.
_ALIKE = 0.9


def _positions_count(rows: Sequence[ReadRow]) -> Iterator[Finding]:
    """Position ids count up inside a document."""
    bad: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if row.counted is not None and (kind := miscounted(row.counted[row.real != 0])):
            bad.setdefault(kind, []).append(number)
    fix = "omit position_ids (the model creates them), or count from 0 in each document"
    if still := bad.get("still"):
        yield _finding(
            rows,
            still,
            code="positions-constant",
            level="error",
            what=f"the position ids of {share(len(still), len(rows))} do not increase: the first "
            f"are {_positions(rows[still[0]])}",
            why="several tokens share one position: the model cannot see the order of the words, "
            "but a server numbers every position",
            fix=fix,
        )
    if wild := bad.get("disordered"):
        yield _finding(
            rows,
            wild,
            code="positions-disordered",
            level="error",
            what=f"the position ids of {share(len(wild), len(rows))} do not count up one by one: "
            f"the first are {_positions(rows[wild[0]])}",
            why="the model reads words in the order of their positions, and these are out of "
            "order: a server counts up from 0, so what is learned has no effect when the "
            "model is served",
            fix=fix,
        )


def _positions(row: ReadRow) -> list[int]:
    assert row.counted is not None
    return [int(position) for position in row.counted[row.real != 0][:4]]


# Times that a row is trained before its copies are reported, and the share of all rows they have.
_AGAIN, _AGAIN_SHARE = 10, 0.01


def _rows_again(subject: Subject, rows: Sequence[ReadRow]) -> Iterator[Finding]:
    """No row occurs many times: each copy trains it once more in every epoch."""
    ends = {subject.tokenizer.pad_token_id, subject.tokenizer.eos_token_id, *subject.served}
    first: dict[bytes, int] = {}
    times: dict[bytes, list[int]] = {}
    indices: set[int] = set()
    for number, row in enumerate(rows):
        # A sampler may draw a row of the dataset more than once, as it was asked to.
        if row.index is not None and row.index in indices:
            continue
        indices.update([row.index] if row.index is not None else [])
        for whole, _ in _keys(row, ends):
            if first.setdefault(whole, number) != number:
                times.setdefault(whole, []).append(number)
    copies = [number for again in times.values() for number in again]
    if not copies:
        return
    most, again = max(times.items(), key=lambda item: len(item[1]))
    often = len(again) + 1 >= _AGAIN and len(copies) > _AGAIN_SHARE * len(rows)
    yield _finding(
        rows,
        copies,
        code="rows-duplicate",
        level="warning" if often else "note",
        what=f"{share(len(set(copies)), len(rows))} are exact copies of earlier ones; "
        f"{rows[first[most]].name} occurs {len(again) + 1:,} times",
        why="each copy is one more pass over the row in every epoch: the model memorises it, and "
        "other rows count less",
        fix="remove the copies",
    )


# ------------------------------------------------------------------ rows that are gone


def _dropped_rows(subject: Subject) -> Iterator[Finding]:
    """The preparation dropped no rows because truncation left them without a label.

    `datasets` keeps them in the table behind the index of a filtered dataset.
    """
    dataset = subject.rows
    table, kept = getattr(dataset, "_data", None), getattr(dataset, "_indices", None)
    if table is None or kept is None or "labels" not in getattr(table, "column_names", ()):
        return
    total = table.num_rows
    if total <= len(dataset) or total > 200_000:
        return
    present = set(kept.column(0).to_pylist())
    gone = [i for i in range(total) if i not in present]
    column = table.column("labels")
    empty = [i for i in gone if not any(v != IGNORED for v in column[i].as_py() or ())]
    if empty:
        names = [f"of the data row {i}" for i in empty]
        yield rows_finding(
            names,
            range(len(names)),
            code="rows-dropped",
            level="error" if len(empty) > 0.05 * total else "warning",
            what=f"{share(len(empty), total)} were silently dropped before training",
            why="the prompt alone fills the length limit"
            + (f" of {limit:,} tokens" if (limit := _limit(subject)) else "")
            + ": no token of the answer remained",
            fix="raise max_length above the longest row, or remove those rows deliberately",
        )


def _limit(subject: Subject) -> int | None:
    return getattr(subject.args, "max_length", None)


# ------------------------------------------------------------------ held-out rows


def held_out_findings(
    reading: Reading, held_out: Mapping[str, Reading], subject: Subject
) -> Iterator[Finding]:
    """No evaluation row is trained: the loss on it would be meaningless."""
    if not held_out:
        return
    ends = {subject.tokenizer.pad_token_id, subject.tokenizer.eos_token_id, *subject.served}
    trained: dict[bytes, str] = {}
    prompts: dict[bytes, str] = {}
    for row in reading.rows:
        for whole, prompt in _keys(row, ends):
            trained.setdefault(whole, row.name)
            if prompt:
                prompts.setdefault(prompt, row.name)
    for evaluated in held_out.values():
        rows = evaluated.rows
        same, asked, twins = [], [], ""
        for number, row in enumerate(rows):
            keys = _keys(row, ends)
            if any(whole in trained for whole, _ in keys):
                same.append(number)
                twins = twins or next(trained[w] for w, _ in keys if w in trained)
            elif any(prompt and prompt in prompts for _, prompt in keys):
                asked.append(number)
        if same:
            yield _finding(
                rows,
                same,
                code="eval-in-train",
                level="error" if len(same) > 0.1 * len(rows) else "warning",
                what=f"{share(len(same), len(rows))} held out for evaluation are also training "
                f"rows (the first is {twins})",
                why="the evaluation rows were drawn from the training rows without removing them, "
                "or the data has duplicates: the evaluation loss measures memorisation",
                fix="remove duplicates, split the dataset (dataset.train_test_split), and train "
                "only on the train part",
            )
        if asked:
            yield _finding(
                rows,
                asked,
                code="eval-prompt-in-train",
                level="warning" if len(asked) > 0.1 * len(rows) else "note",
                what=f"{share(len(asked), len(rows))} held out for evaluation have a prompt that "
                "also occurs in training",
                why="rows with the same prompt are on both sides of the split",
                fix="keep rows with the same prompt on one side of the split",
            )


def _keys(row: ReadRow, ends: set[int | None]) -> list[tuple[bytes, bytes]]:
    """(the document without end and pad tokens, its prompt where that is masked), hashed."""
    keys = []
    for number in range(1, int(row.real.max(initial=0)) + 1):
        at = np.flatnonzero(row.real == number)
        if not len(at):
            continue
        ids, labels = row.ids[at], row.labels[at]
        last = len(ids)
        while last and int(ids[last - 1]) in ends:
            last -= 1
        if last < 4:
            continue
        first = int(np.argmax(labels != IGNORED)) if (labels != IGNORED).any() else 0
        keys.append((_hash(ids[:last]), _hash(ids[:first]) if first >= 4 else b""))
    return keys


def _hash(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(
        np.ascontiguousarray(ids, dtype=np.int64).tobytes(), digest_size=16
    ).digest()
