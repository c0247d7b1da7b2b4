"""Measure what only a forward pass shows: accumulation that changes the loss, and leaks between
packed documents.

A few dozen tokens of the trainer's own rows go through its own loss, without gradients and with
dropout off; flags and metrics are restored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from truetune.auditing.model import virtual_tokens
from truetune.auditing.read import IGNORED, Reading, ReadRow
from truetune.auditing.subject import Subject, quiet
from truetune.checks.labels.facts import LabelFacts
from truetune.checks.labels.markers import nested_rows
from truetune.findings import Finding, Level, rows_finding
from truetune.model.mode import evaluating, mode_kept
from truetune.system.lazy import torch

# Tokens of the two rows that accumulation is measured on: counts that differ, and cheap.
_WINDOWS = (16, 64)
_WINDOW = 48
# A change of logits of an isolated document is 0, or rounding: 1e-6 of their spread.
_LEAK = 1e-3
_MOST_WEIGHTS_ON_CPU = 3_000_000_000


def measured_findings(subject: Subject, reading: Reading, facts: LabelFacts) -> Iterator[Finding]:
    """Both measurements, if there is a model and running it is cheap enough."""
    can = _can_run(subject)
    if can:
        yield from _recomputing(subject, reading)
    yield from _isolation(subject, reading, facts, can)
    if can and subject.trainer is not None:
        yield from _accumulation(subject, reading)


def _can_run(subject: Subject) -> bool:
    model, trainer = subject.model, subject.trainer
    if model is None or not hasattr(model, "parameters"):
        return False
    parameters = list(model.parameters())
    if not parameters or any(p.is_meta or not p.numel() for p in parameters):
        return False
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(
        trainer, "is_fsdp_enabled", False
    ):
        return False
    on_cpu = parameters[0].device.type == "cpu"
    return not on_cpu or sum(p.numel() for p in parameters) < _MOST_WEIGHTS_ON_CPU


@contextmanager
def _asking(model: Any) -> Iterator[None]:
    """Set evaluation mode, and suppress its warnings."""
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------ gradient checkpointing


def _recomputing(subject: Subject, reading: Reading) -> Iterator[Finding]:
    """A soft prompt that is given as cached keys and values is lost where activations are computed
    again: a forward pass as in training, with and without that."""
    model = subject.model
    names = ("activation_checkpointing", "gradient_checkpointing")
    if not virtual_tokens(model) or not any(getattr(subject.args, n, False) for n in names):
        return
    row = max(reading.rows, key=lambda r: int((r.real != 0).sum()))
    ids = row.ids[row.real != 0][:_WINDOW].tolist()
    if _fails(model, ids, recomputing=False) is not None:
        return
    error = _fails(model, ids, recomputing=True)
    if error is None:
        return
    yield Finding(
        code="soft-prompt-recomputed",
        level="error",
        what="a training step fails with gradient checkpointing: "
        f"{type(error).__name__}: {str(error)[:120]}",
        where="args.gradient_checkpointing",
        why="a prefix is passed to each layer as cached keys and values, and gradient "
        "checkpointing "
        "drops the cache; without it the same row passes",
        fix="set gradient_checkpointing=False (TRL turns it on by default), or use prompt tuning",
    )


def _fails(model: Any, ids: Sequence[int], *, recomputing: bool) -> Exception | None:
    """Return the exception that a forward pass in training mode raises."""
    from torch.utils.checkpoint import checkpoint

    flags = {
        "gradient_checkpointing": recomputing,
        "_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False),
    }
    # As transformers switches it on, without the hooks that it leaves on the embedding.
    layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    kept = [(m, {n: vars(m)[n] for n in flags if n in vars(m)}) for m in layers]
    inputs = torch.tensor([list(ids)], device=next(model.parameters()).device)
    try:
        with (
            mode_kept(model),
            torch.no_grad(),
            warnings.catch_warnings(),
            quiet("transformers.modeling_layers"),
        ):
            warnings.simplefilter("ignore")
            model.train()
            for layer in layers:
                vars(layer).update(flags)
            model(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    except Exception as error:  # whatever a step would raise
        return error
    finally:
        for layer, values in kept:
            for name in flags:
                vars(layer).pop(name, None)
            vars(layer).update(values)
    return None


# ------------------------------------------------------------------ accumulation


def _accumulation(subject: Subject, reading: Reading) -> Iterator[Finding]:
    """Two micro-batches give the loss of one batch of the same rows."""
    trainer = subject.trainer
    steps = int(getattr(subject.args, "gradient_accumulation_steps", 1) or 1)
    if steps < 2 or not hasattr(trainer, "compute_loss"):
        return
    features = _two_features(subject, reading)
    if features is None:
        return
    try:
        with _asking(subject.model):
            apart, together = _losses(trainer, subject.train.collate_fn, features)
    except Exception as error:  # the user's loss may fail in its own ways outside of a step
        yield Finding(
            code="accumulation-not-measured",
            level="note",
            what=f"the loss could not be computed: {type(error).__name__}: {error}",
            where="trainer.compute_loss",
            why="it needs values that exist only during a training step; whether gradient "
            "accumulation changes it is unknown",
            fix="by hand, compare the loss of one step on 8 rows with the loss of 8 accumulated "
            "passes on one row each",
        )
        return
    ratio = apart / together if together else 1.0
    if abs(ratio - 1) <= 0.05:
        return
    level: Level = "error" if not 0.67 < ratio < 1.5 else "warning"
    yield Finding(
        code="accumulation-changes-loss",
        level=level,
        what=f"two micro-batches give a loss of {apart:.3f}, but the same rows in one batch give "
        f"{together:.3f}",
        where="compute_loss_func"
        if getattr(trainer, "compute_loss_func", None) is not None
        else f"{type(trainer).__name__}.compute_loss",
        why="the loss ignores num_items_in_batch and is a mean over each micro-batch: with "
        f"gradient_accumulation_steps={steps} the gradients are "
        + (f"about {steps} times too large" if level == "error" else "weighted by micro-batch"),
        fix="sum the loss over the tokens and divide by num_items_in_batch",
    )


def _two_features(subject: Subject, reading: Reading) -> list[Any] | None:
    """Two rows of the dataset cut to different lengths, each with targets."""
    dataset = getattr(subject.train, "dataset", None)
    candidates = [
        r for r in reading.rows if r.index is not None and (r.labels != IGNORED).sum() > 2
    ]
    if dataset is None or len(candidates) < 2 or not hasattr(subject.train, "collate_fn"):
        return None
    candidates.sort(key=lambda row: int((row.labels != IGNORED).sum()))
    chosen = []
    for row, most in zip((candidates[0], candidates[-1]), _WINDOWS, strict=True):
        feature = dataset[row.index]
        if not isinstance(feature, Mapping) or "input_ids" not in feature:
            return None
        size = len(feature["input_ids"])
        targets = np.flatnonzero(row.labels != IGNORED)
        end = min(int(targets[-1]) + 1, size)
        chosen.append(_cut(feature, max(0, end - most), end, size))
    return chosen


def _cut(feature: Mapping[str, Any], start: int, end: int, size: int) -> dict[str, Any]:
    found = {}
    for key, value in feature.items():
        if key == "seq_lengths":
            found[key] = [end - start]
        elif hasattr(value, "__len__") and not isinstance(value, str) and len(value) == size:
            found[key] = value[start:end]
        else:
            found[key] = value
    return found


def _losses(trainer: Any, collate: Any, features: Sequence[Any]) -> tuple[float, float]:
    """(sum over two micro-batches as a step scales them, one batch)."""
    device = next(trainer.model.parameters()).device
    batches = [collate([dict(f)]) for f in features]
    whole = collate([dict(f) for f in features])
    count = trainer._get_num_items_in_batch(batches, device)
    # A trainer sets it when a step begins; losses that add terms of their own divide by it.
    trainer.current_gradient_accumulation_steps = len(batches)
    apart = sum(_loss(trainer, batch, count, len(batches)) for batch in batches)
    trainer.current_gradient_accumulation_steps = 1
    return apart, _loss(trainer, whole, trainer._get_num_items_in_batch([whole], device), 1)


def _loss(trainer: Any, batch: Any, count: Any, steps: int) -> float:
    inputs = trainer._prepare_inputs(dict(batch))
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)
    if isinstance(loss, tuple):
        loss = loss[0]
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and count is not None) or (
            trainer.compute_loss_func is not None
        )
    return float(loss) / (1 if scaled else steps)


# ------------------------------------------------------------------ packing


def _isolation(
    subject: Subject, reading: Reading, facts: LabelFacts, can: bool
) -> Iterator[Finding]:
    """A document of a packed row is computed as if it stood alone."""
    if facts.plain:
        return
    # A conversation inside a turn of another one is none of its own.
    nested = {facts.names[row] for row in nested_rows(facts)}
    borders = {
        n: at
        for n, row in enumerate(reading.rows)
        if row.name not in nested and (at := _border(row, facts))
    }
    if not borders:
        return
    row = reading.rows[next(iter(borders))]
    cut = next(iter(borders.values()))
    # A loop of one's own may or may not switch the cache off; a trainer has said so already.
    alone = subject.trainer is None
    change = (
        _change(subject, reading, row, cut, use_cache=False if alone else None) if can else None
    )
    names = [r.name for r in reading.rows]
    if change is not None and change <= _LEAK:
        cached = _change(subject, reading, row, cut) if alone else None
        if cached is not None and cached > _LEAK:
            yield _only_without_cache(names, borders, cached)
        return
    if change is None and row.isolated:
        return
    said = (
        "" if change is None else (f": a different neighbour changes the logits by {change:.2g} of")
    )
    yield rows_finding(
        names,
        borders,
        code="packing-not-isolated",
        level="warning" if change is None else "error",
        what=f"{len(borders):,} rows contain conversations that attend to earlier ones"
        + (f"{said} their spread" if said else ""),
        why="this model's attention ignores the position ids of the batch (an attention mask of "
        "ones disables them)"
        if row.isolated
        else "nothing in the batch says where a conversation begins",
        fix='use packing_strategy="bfd", or a collator that passes position_ids and no '
        "attention mask",
    )


def _only_without_cache(names: Sequence[str], borders: Mapping[int, int], change: float) -> Finding:
    return rows_finding(
        names,
        borders,
        code="packing-needs-no-cache",
        level="note",
        what="packed conversations are isolated only with use_cache=False: with a cache, a "
        f"different neighbour changes the logits by {change:.2g} of their spread",
        why="transformers reads the boundaries from position_ids, but not while it fills a cache",
        fix="set model.config.use_cache = False before training",
    )


def _border(row: ReadRow, facts: LabelFacts) -> int:
    """Where a document begins behind another one in its line of the batch; 0 if nowhere."""
    inside = np.flatnonzero(row.real)
    if not len(inside):
        return 0
    if row.offset:
        return row.offset
    steps = np.flatnonzero(np.diff(row.real[inside]) != 0)
    if len(steps):
        return int(inside[steps[0] + 1])
    first, last = int(inside[0]), int(inside[-1])
    if start := _conversation_start(facts):
        size = len(start)
        hits = np.flatnonzero(row.ids[: len(row.ids) - size + 1] == start[0])
        for at in hits[(hits > first) & (hits <= last)].tolist():
            # A begin token that stands there twice begins one document.
            if size == 1 and row.ids[at - 1] == start[0]:
                continue
            if tuple(row.ids[at : at + size].tolist()) == start:
                return at
    if not _joined_at_ends(facts):
        return 0
    ends = np.flatnonzero(np.isin(row.ids, list(facts.frame.ends)))
    behind = ends[(ends > first) & (ends + 4 <= last)]
    return next((at + 1 for at in behind.tolist() if _begins(row, at + 1, facts)), 0)


def _begins(row: ReadRow, at: int, facts: LabelFacts) -> bool:
    """Whether what follows an end token is no turn of the same conversation: it begins with no
    special token, or as rows begin."""
    special = facts.tokens.special_ids
    behind = row.ids[at : at + 4].tolist()
    blank = facts.tokens.decode
    while behind and behind[0] not in special and not blank(behind[:1]).strip():
        behind = behind[1:]
    if not behind or behind[0] not in special:
        return bool(behind)
    begins = row.ids[int(np.flatnonzero(row.real)[0]) :][: len(behind)].tolist()
    return behind[:2] == begins[:2]


def _joined_at_ends(facts: LabelFacts) -> bool:
    """Whether an end token inside a row separates documents: where no template has turns, or in
    blocks of one length that begin anywhere."""
    table = facts.table
    if not facts.frame.has_template or not facts.answer_starts.any():
        return True
    if not facts.is_stream or not len(table):
        return False
    first = table.ids[table.starts[:-1][table.lengths > 0]]
    return float((first == first[0]).mean()) < 0.5


def _conversation_start(facts: LabelFacts) -> tuple[int, ...]:
    """Ids that stand at the beginning of a conversation and nowhere else; () if none do."""
    bos = facts.frame.bos
    return (bos,) if bos is not None else facts.frame.opening_ids


def _change(
    subject: Subject, reading: Reading, row: ReadRow, cut: int, *, use_cache: bool | None = None
) -> float | None:
    """By how much the logits of a document change with another neighbour in front of it, relative
    to their spread; None if it could not be asked.

    Args:
        cut: where the document begins in its line of the batch.
        use_cache: passed to the forward pass; None leaves it to the model.
    """
    batch = reading.batches[row.batch] if row.batch < len(reading.batches) else None
    if batch is None or not hasattr(batch, "keys"):
        return None
    size = batch["input_ids"].shape[1]
    start, end = max(0, cut - _WINDOW), min(size, cut + _WINDOW)
    if cut - start < 2 or end - cut < 2:
        return None
    device = next(subject.model.parameters()).device
    inputs = {
        key: window
        for key in batch
        if (window := _windowed(key, batch[key], row.line, (start, cut, end), size)) is not None
    }
    inputs = {k: v.to(device) if hasattr(v, "to") else v for k, v in inputs.items()}
    if use_cache is not None:
        inputs["use_cache"] = use_cache
    head = cut - start
    ids = inputs["input_ids"].clone()
    ids[0, :head] = ids[0].flip(0)[:head]
    try:
        with _asking(subject.model):
            # Counted from the end: virtual tokens of a soft prompt stand in front.
            tail = head - ids.shape[1]
            first = subject.model(**inputs).logits[0, tail:].float()
            second = subject.model(**{**inputs, "input_ids": ids}).logits[0, tail:].float()
    except Exception:  # a kernel that this machine lacks, a model with inputs of its own
        return None
    return float((first - second).abs().max()) / (float(first.std()) or 1.0)


def _windowed(
    key: str, value: Any, line: int, window: tuple[int, int, int], size: int
) -> Any | None:
    """A field of the batch, cut to the end of one document and the beginning of the next."""
    start, cut, end = window
    if key == "labels" or key == "shift_labels":
        return None
    if key.startswith("cu_seq"):
        return torch.tensor([0, cut - start, end - start], dtype=value.dtype)
    if key.startswith("max_length"):
        return max(cut - start, end - cut)
    if getattr(value, "ndim", 0) == 2 and value.shape[1] == size:
        row = line if len(value) > line else 0
        return value[row : row + 1, start:end]
    return None
