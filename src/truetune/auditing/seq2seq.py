"""Check encoder-decoders: targets end, are padded with -100, and are shifted once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from truetune.auditing.read import IGNORED, Reading, batch_fields
from truetune.auditing.subject import Subject
from truetune.contract.tokens import Tokens
from truetune.findings import Finding, rows_finding, share


def seq2seq_findings(subject: Subject, reading: Reading) -> Iterator[Finding]:
    """All checks of an encoder-decoder's batches."""
    names, targets = [row.name for row in reading.rows], [row.labels for row in reading.rows]
    yield from _targets_end(subject, names, targets)
    yield from _targets_begin(subject, reading)
    yield from _padding(subject, names, targets)
    yield from _start_token(subject, names, targets)
    yield from _decoder_inputs(subject, reading)


def _say(names: Sequence[str], bad: Sequence[int], **parts: Any) -> Finding:
    return rows_finding(names, bad, **parts)


def _targets_end(
    subject: Subject, names: Sequence[str], targets: Sequence[np.ndarray]
) -> Iterator[Finding]:
    tokens = Tokens(subject.tokenizer)
    stops = {*subject.served, *subject.said}
    pad = subject.tokenizer.pad_token_id
    empty, missing, tail, lengths = [], [], -1, []
    for number, labels in enumerate(targets):
        trained = labels[labels != IGNORED]
        lengths.append(len(trained))
        while len(trained) and trained[-1] == pad and pad not in stops:
            trained = trained[:-1]
        if not len(trained):
            empty.append(number)
        elif int(trained[-1]) not in stops:
            missing.append(number)
            tail = int(trained[-1])
    if empty:
        yield _say(
            names,
            empty,
            code="nothing-supervised",
            level="error",
            what=f"no token is a target in {share(len(empty), len(names))}",
            why="their targets are empty or completely masked",
            fix="remove those rows, or correct the code that builds the targets",
        )
    if missing:
        longest = max(lengths)
        cut = sum(lengths[i] == longest for i in missing) > max(1, len(missing) // 2)
        shown = tokens.named(sorted(stops)) or "nothing"
        yield _say(
            names,
            missing,
            code="answer-cut" if cut and len(missing) < len(names) else "stop-missing",
            level="error" if len(missing) > 0.01 * len(names) else "warning",
            what=f"the targets of {share(len(missing), len(names))} do not end with an end token; "
            f"the decoder stops on {shown}",
            why=f"they are cut at {longest} tokens"
            if cut and len(missing) < len(names)
            else f"the last label is {tokens.decode([tail])!r}: the end token was not appended, or "
            "another tokenizer made the targets",
            fix="raise the length limit of the targets"
            if cut and len(missing) < len(names)
            else "tokenize targets with text_target=..., so that the tokenizer appends the end "
            "token",
        )


# Rows of which a first token is looked at, and how many must begin inside a word: a tokenizer that
# marks the beginning of words never begins a text otherwise.
_LOOK, _PIECES, _PIECE_SHARE = 400, 3, 0.05


def _targets_begin(subject: Subject, reading: Reading) -> Iterator[Finding]:
    """The first label begins a text; it is not from the middle of one."""
    tokens, rows = Tokens(subject.tokenizer), reading.rows
    step = max(1, len(rows) // _LOOK)
    looked = range(0, len(rows), step)
    pieces, lowered, broken_off = [], [], 0
    for number in looked:
        trained = _text_ids(tokens, rows[number].labels)
        if len(trained) < 2 or trained[0] in tokens.special_ids:
            continue
        text = tokens.decode(trained)
        if _begins_no_text(tokens, trained[0]):
            pieces.append(number)
        elif text[:1] == " " and text[1:2].islower() and text.rstrip()[-1:] in tuple(".!?"):
            lowered.append(number)
            asked = tokens.decode(_text_ids(tokens, rows[number].ids)).rstrip()
            broken_off += asked[-1:].isalnum() or asked[-1:] == ","
    inside = len(pieces) >= max(_PIECES, _PIECE_SHARE * len(looked))
    # Sentences without their first word; where the source breaks off too, they continue it.
    headless = len(lowered) >= max(_PIECES, 0.5 * len(looked)) and 2 * broken_off < len(lowered)
    if not inside and not headless:
        return
    found = sorted({*(pieces if inside else []), *(lowered if headless else [])})
    first = repr(tokens.decode(_text_ids(tokens, rows[found[0]].labels)[:8]) + "\u2026")
    yield _say(
        [row.name for row in rows],
        found,
        code="target-start-lost",
        level="error" if inside else "warning",
        what=f"the targets of {len(found):,} of {len(looked):,} examined rows lack their first "
        f"token: {first}",
        why="their first token was shifted away: the model shifts the labels itself, so the "
        "decoder never learns how an answer begins",
        fix="pass the targets unshifted, from their first token on (labels = the ids of the "
        "target); the model prepends the start token",
    )


def _text_ids(tokens: Tokens, ids: np.ndarray) -> list[int]:
    """What is written there: no ignored labels, no special tokens at the end."""
    kept = ids[ids != IGNORED].tolist()
    while kept and kept[-1] in tokens.special_ids:
        kept.pop()
    return kept


def _begins_no_text(tokens: Tokens, first: int) -> bool:
    """Whether a token goes on with a word: alone, its text is encoded with another first token."""
    text = tokens.decode([first])
    if not text.strip() or "\ufffd" in text:
        return False
    return tokens.encode([text])[0][:1] != [first]


def _padding(
    subject: Subject, names: Sequence[str], targets: Sequence[np.ndarray]
) -> Iterator[Finding]:
    pad = subject.tokenizer.pad_token_id
    stops = {*subject.served, *subject.said}
    bad = [
        i
        for i, labels in enumerate(targets)
        if pad is not None
        and len(labels) > 1
        and labels[-1] == pad
        and (labels[-2] == pad or pad not in stops)
    ]
    if bad:
        yield _say(
            names,
            bad,
            code="padding-supervised",
            level="error",
            what=f"padding has labels in {share(len(bad), len(names))}",
            why="targets were padded with the pad token: the decoder learns to write it, and real "
            "tokens count less in the loss",
            fix="pad labels with -100 (DataCollatorForSeq2Seq does)",
        )


def _start_token(
    subject: Subject, names: Sequence[str], targets: Sequence[np.ndarray]
) -> Iterator[Finding]:
    model = subject.model
    start = getattr(model.config, "decoder_start_token_id", None)
    generation = getattr(model, "generation_config", None)
    served = getattr(generation, "decoder_start_token_id", None)
    if start is None:
        yield Finding(
            code="decoder-start",
            level="error",
            what="the model's config has no decoder_start_token_id",
            where="model.config",
            why="labels cannot be shifted for the decoder without a start token",
            fix="set model.config.decoder_start_token_id (and the one in the generation config)",
        )
        return
    if served is not None and served != start:
        yield Finding(
            code="decoder-start",
            level="error",
            what=f"training starts the decoder with token {start}, but generation starts it with "
            f"{served}",
            where="model.generation_config.decoder_start_token_id",
            why="generation starts from a token that training never started from",
            fix=f"set model.generation_config.decoder_start_token_id = {start}",
        )
    doubled = [i for i, labels in enumerate(targets) if len(labels) and int(labels[0]) == start]
    if len(doubled) > len(names) // 2:
        yield _say(
            names,
            doubled,
            code="decoder-start-doubled",
            level="error",
            what=f"the targets of {share(len(doubled), len(names))} begin with the token that "
            f"starts the decoder ({start})",
            why="the model prepends it to the labels itself: the decoder learns to begin with it "
            "twice, or the labels were already shifted",
            fix="remove it from the labels",
        )


def _decoder_inputs(subject: Subject, reading: Reading) -> Iterator[Finding]:
    """A batch's decoder inputs are the labels shifted by one."""
    start = getattr(subject.model.config, "decoder_start_token_id", None)
    pad = subject.tokenizer.pad_token_id
    for number, batch in enumerate(reading.batches):
        fields = batch_fields(batch)
        given, labels = fields.get("decoder_input_ids"), fields.get("labels")
        if given is None or labels is None or given.shape != labels.shape:
            continue
        filled = np.where(labels == IGNORED, pad if pad is not None else 0, labels)
        late = np.roll(filled, 1, axis=1)
        late[:, 0] = start if start is not None else late[:, 0]
        judged = labels != IGNORED
        if np.array_equal(given[judged], late[judged]):
            continue
        leak = np.array_equal(given[judged], filled[judged])
        yield Finding(
            code="decoder-inputs",
            level="error",
            what="decoder_input_ids are the labels themselves: the decoder sees each token that "
            "it must predict"
            if leak
            else "decoder_input_ids are not the labels shifted by one",
            where=f"batch {number}",
            why="the collator did not shift them, or shifted them twice",
            fix="omit decoder_input_ids: the model builds them from the labels",
        )
        return
