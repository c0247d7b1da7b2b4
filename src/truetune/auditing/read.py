"""Read the rows of another library's pipeline, collated by its own collator.

input   a torch DataLoader, or anything that can be iterated again and yields batches
does    takes the sampler's own index batches, fetches and collates them here (no workers, no
        device), and finds how long each row really is
output  Reading: one `ReadRow` a dataset row, with ids and labels as the loss gets them
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from truetune.data.rows import evenly
from truetune.errors import UsageError

IGNORED = -100
_SEGMENTS = ("seq_idx", "position_ids")

Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ReadRow:
    """One row of a batch, unshifted, padding included.

    Attributes:
        name: how the user can find it: `train_dataset[3]`, or `batch 2, row 0`.
        index: in the dataset; None if that cannot be known.
        batch: number of its batch.
        ids, labels: (T,).
        mask: (T,) the attention mask; None if there is none.
        real: (T,) 0 for padding, else the number of the document, from 1.
        isolated: the batch says where documents begin.
        counted: (T,) the positions that the batch brings; None if it brings none.
        line, offset: the line of the batch it lies in, and where it begins there (a flattened
            batch holds several rows in one line).
    """

    name: str
    index: int | None
    batch: int
    ids: Array
    labels: Array
    mask: Array | None
    real: Array
    isolated: bool = False
    line: int = 0
    offset: int = 0
    counted: Array | None = None

    def documents(self) -> tuple[Array, Array, Array]:
        """As the token table takes it; documents of a packed row are apart."""
        return self.ids, self.labels, self.real


@dataclass(eq=False)
class Reading:
    """What was read.

    Attributes:
        rows: in the order of the dataset if that is known.
        total: rows of the whole; None for a stream.
        batches: a few batches as the collator made them.
        failures: (row names, error) of batches that could not be made.
        pad_ends: the pad token also ends answers.
    """

    rows: list[ReadRow] = field(default_factory=list)
    total: int | None = None
    batches: list[Any] = field(default_factory=list)
    failures: list[tuple[str, Exception]] = field(default_factory=list)
    pad_ends: bool = False


def read_batches(
    source: Any,
    *,
    name: str,
    pad_id: int | None,
    max_rows: int,
    ends: Collection[int] = (),
    origin: Callable[[int], int] | None = None,
) -> Reading:
    """Read about `max_rows` rows at most, spread evenly over all batches.

    Args:
        source: a torch DataLoader, or an iterable of batches that can be iterated again.
        name: what the dataset is called in findings.
        pad_id: of the tokenizer.
        max_rows: rows to read.
        ends: ids that end an answer.
        origin: the original row number of row i of the dataset, if some rows were removed.

    Raises:
        UsageError: `source` would be used up by reading it, or its batches have no `input_ids`.
    """
    from torch.utils.data import DataLoader, IterableDataset

    reading = Reading(pad_ends=pad_id in ends)
    if isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset):
        _read_map(reading, source, _naming(name, origin), pad_id, max_rows)
    else:
        _read_stream(reading, source, name, pad_id, max_rows)
    if not reading.rows and not reading.failures:
        raise UsageError(
            f"{name} yields no rows", fix="pass data with at least one row", code="audit-no-rows"
        )
    reading.rows.sort(key=lambda row: (row.index is None, row.index or 0))
    return reading


def _naming(name: str, origin: Callable[[int], int] | None) -> Callable[[Any], str]:
    """How row i is called: as the user can index it, and which row of the data it was."""

    def named(i: Any) -> str:
        if origin is None or not isinstance(i, int) or origin(i) == i:
            return f"{name}[{i}]"
        return f"{name}[{i}], of the data row {origin(i)}"

    return named


def _read_map(
    reading: Reading,
    loader: Any,
    named: Callable[[Any], str],
    pad_id: int | None,
    max_rows: int,
) -> None:
    dataset, collate = loader.dataset, loader.collate_fn
    reading.total = len(dataset)
    if loader.batch_sampler is None:
        indices: list[Any] = list(loader.sampler)
    else:
        indices = [list(batch) for batch in loader.batch_sampler]
    size = max((len(i) for i in indices if isinstance(i, list)), default=1)
    chosen = evenly(indices, max(max_rows // size, 1))
    for number, wanted in enumerate(chosen):
        listed = wanted if isinstance(wanted, list) else [wanted]
        names = [named(i) for i in listed]
        place = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        try:
            features = _fetch(dataset, listed)
            batch = collate(features if isinstance(wanted, list) else features[0])
        except Exception as error:  # the user's own code: reported as it is, with its rows
            reading.failures.append((place, error))
            _read_apart(reading, loader, number, pad_id, names, listed)
            continue
        _take(reading, batch, number, pad_id, names, listed, features)


def _read_apart(
    reading: Reading,
    loader: Any,
    number: int,
    pad_id: int | None,
    names: Sequence[str],
    indices: Sequence[Any],
) -> None:
    """Read rows one by one that cannot be batched together."""
    for name, index in zip(names, indices, strict=True):
        try:
            features = _fetch(loader.dataset, [index])
            batch = loader.collate_fn(features)
        except Exception:  # reported already, for the batch
            continue
        _take(reading, batch, number, pad_id, [name], [index], features)


def _fetch(dataset: Any, indices: Sequence[Any]) -> list[Any]:
    many = getattr(dataset, "__getitems__", None)
    return list(many(list(indices))) if callable(many) else [dataset[i] for i in indices]


def _read_stream(
    reading: Reading, source: Any, name: str, pad_id: int | None, max_rows: int
) -> None:
    dataset = getattr(source, "dataset", None)
    for thing in (source, dataset):
        if thing is not None and hasattr(thing, "__next__"):
            raise UsageError(
                f"{name} is an iterator: reading it would remove its rows from training",
                fix="pass something that can be iterated again: a DataLoader, a dataset, a list "
                "of batches",
                code="audit-iterator",
            )
    held = (
        [k for k, v in vars(dataset).items() if hasattr(v, "__next__")]
        if dataset and hasattr(dataset, "__dict__")
        else []
    )
    if held:
        raise UsageError(
            f"{name} keeps an iterator in {held[0]!r}: reading it would remove its rows from "
            "training",
            fix="create the iterator in __iter__",
            code="audit-iterator",
        )
    count = 0
    for number, batch in enumerate(_stream(source, dataset)):
        before = len(reading.rows)
        _take(reading, batch, number, pad_id, None, None, None)
        count += len(reading.rows) - before
        if count >= max_rows:
            break
    else:
        reading.total = count


def _stream(source: Any, dataset: Any) -> Iterator[Any]:
    """Batches without the loader's workers, devices and counters."""
    collate, size = getattr(source, "collate_fn", None), getattr(source, "batch_size", None)
    if dataset is None or collate is None:
        yield from source
        return
    items = iter(dataset)
    if size is None:
        yield from map(collate, items)
        return
    while features := list(islice(items, size)):
        yield collate(features)


# ------------------------------------------------------------------ batches to rows


def _take(
    reading: Reading,
    batch: Any,
    number: int,
    pad_id: int | None,
    names: Sequence[str] | None,
    indices: Sequence[Any] | None,
    features: Sequence[Any] | None,
) -> None:
    values = batch_fields(batch)
    if len(reading.batches) < 8:
        reading.batches.append(batch)
    ids = values["input_ids"]
    lengths = _feature_lengths(features)
    starts = _flattened(ids, lengths)
    for row in range(len(ids)):
        pick = {k: (v[row] if len(v) > row else v[0]) for k, v in values.items() if v.ndim == 2}
        known = lengths[row] if lengths and len(lengths) == len(ids) else None
        feature = features[row] if features and len(features) == len(ids) else None
        real = _real(pick, known, feature, pad_id, reading.pad_ends)
        segments, isolated = _documents(pick, values, real, row)
        if starts is not None and names is not None and indices is not None:
            # A flattened batch: each dataset row is a stretch of the one row.
            for part, (a, b) in enumerate(pairwise(starts)):
                place = (number, row, a, b)
                reading.rows.append(
                    _row(names[part], indices[part], place, pick, segments, isolated)
                )
            continue
        exact = names is not None and indices is not None and len(names) == len(ids)
        name = names[row] if exact and names else f"batch {number}, row {row}"
        index = indices[row] if exact and indices else None
        place = (number, row, 0, len(pick["input_ids"]))
        reading.rows.append(_row(name, index, place, pick, segments, isolated))


def _row(
    name: str,
    index: Any,
    place: tuple[int, int, int, int],
    pick: Mapping[str, Array],
    segments: Array,
    isolated: bool,
) -> ReadRow:
    number, line, start, end = place
    mask, labels = pick.get("attention_mask"), pick.get("labels")
    ids, counted = pick["input_ids"][start:end], pick.get("position_ids")
    return ReadRow(
        name,
        index if isinstance(index, int) else None,
        number,
        ids,
        _along(labels, pick["input_ids"], start, end),
        mask[start:end] if mask is not None else None,
        segments[start:end],
        isolated,
        line,
        start,
        counted[start:end] if counted is not None and len(counted) >= end else None,
    )


def _along(labels: Array | None, ids: Array, start: int, end: int) -> Array:
    """The labels of a stretch of ids; all of them where they are a sequence of their own, as those
    of an encoder-decoder are."""
    if labels is None:
        return np.full(end - start, IGNORED)
    return labels[start:end] if labels.shape == ids.shape else labels


def batch_fields(batch: Any) -> dict[str, Array]:
    """The integer fields of a batch by name, each (B, T); labels unshifted.

    Raises:
        UsageError: nothing in it is called `input_ids`.
    """
    if not isinstance(batch, Mapping) and not hasattr(batch, "keys"):
        if isinstance(batch, tuple | list) and len(batch) in (2, 3):
            names = ("input_ids", "labels", "attention_mask")
            batch = dict(zip(names, batch, strict=False))
        else:
            batch = {k: getattr(batch, k) for k in ("input_ids", "labels") if hasattr(batch, k)}
    values: dict[str, Array] = {}
    for key in batch:
        value = batch[key]
        if hasattr(value, "detach"):
            if value.is_floating_point():
                continue
            value = value.detach().cpu().numpy()
        elif not isinstance(value, np.ndarray | list | tuple):
            continue
        try:
            array = np.asarray(value, dtype=np.int64)
        except (TypeError, ValueError):
            continue
        values[str(key)] = array[None] if array.ndim == 1 and "cu_seq" not in str(key) else array
    if "input_ids" not in values:
        raise UsageError(
            "the batches have no input_ids",
            why=f"they hold {', '.join(map(str, batch)) or 'no fields'}",
            fix="pass batches that are mappings with input_ids and labels",
            code="audit-no-ids",
        )
    if "labels" not in values and "shift_labels" in values:
        shifted = values["shift_labels"]
        values["labels"] = np.concatenate(
            [np.full((len(shifted), 1), IGNORED), shifted[:, :-1]], axis=1
        )
    return values


def _feature_lengths(features: Sequence[Any] | None) -> list[int] | None:
    """Tokens of each row before it was padded."""
    if not features:
        return None
    try:
        return [len(f["input_ids"]) for f in features]
    except (TypeError, KeyError, IndexError):
        return None


def _flattened(ids: Array, lengths: list[int] | None) -> list[int] | None:
    """Where the dataset rows begin in a batch that was laid out as one row."""
    if lengths is None or len(ids) != 1 or len(lengths) < 2 or sum(lengths) > ids.shape[1]:
        return None
    return np.concatenate([[0], np.cumsum(lengths)]).tolist()


def _real(
    pick: Mapping[str, Array], known: int | None, feature: Any, pad_id: int | None, pad_ends: bool
) -> Array:
    """(T,) 1 on tokens of the row, 0 on padding.

    The dataset's own row says it best; then the attention mask; then the pad tokens without a
    label at either end. Of those the first at the right may be the real end, where the pad token
    also ends answers (`pad_ends`).
    """
    ids = pick["input_ids"]
    size = len(ids)
    mask, labels = pick.get("attention_mask"), pick.get("labels")
    own = _own_mask(feature, known)
    # What a mask hides of a row is reported as that; the row is judged as its ids are.
    hidden = hidden_text(ids, labels, mask, pad_id)
    if known is not None and own is not None and known <= size:
        source = np.asarray(feature["input_ids"], dtype=np.int64).reshape(-1)
        for start in (0, size - known):
            if np.array_equal(ids[start : start + known], source):
                real = hidden.astype(np.int64)
                real[start : start + known] |= own
                return _without_pad_runs(real, ids, pad_id, pad_ends)
    if mask is not None and mask.shape == ids.shape:
        return _without_pad_runs(((mask != 0) | hidden).astype(np.int64), ids, pad_id, pad_ends)
    solid = ids != pad_id if pad_id is not None else np.ones(size, bool)
    labelled = np.zeros(size, bool)
    if labels is not None and labels.shape == ids.shape:
        labelled = labels != IGNORED
    real = np.zeros(size, np.int64)
    places = np.flatnonzero(solid | labelled)
    if len(places):
        last = int(places[-1]) + 1
        # A pad token with a label near the end is the end: no other one has to be looked for.
        ended = bool((labelled & ~solid)[max(0, last - 3) : last].any())
        real[int(places[0]) : last if ended else min(last + pad_ends, size)] = 1
    return _without_pad_runs(real, ids, pad_id, pad_ends)


def hidden_text(
    ids: Array, labels: Array | None, mask: Array | None, pad_id: int | None
) -> npt.NDArray[np.bool_]:
    """(T,) tokens of the row that its attention mask hides.

    Padding repeats one token; after the row it may be anything without a label. Inside the row it
    is several pad tokens.
    """
    hidden = np.zeros(len(ids), bool)
    if mask is None or mask.shape != ids.shape or mask.all():
        return hidden
    labelled = labels is not None and labels.shape == ids.shape
    edges = np.flatnonzero(np.diff((mask == 0).astype(np.int8), prepend=0, append=0))
    for start, end in edges.reshape(-1, 2).tolist():
        stretch = ids[start:end]
        solid = stretch[stretch != pad_id] if pad_id is not None else stretch
        behind = start > 0 and end == len(ids)
        if behind and not (labelled and (labels[start:end] != IGNORED).any()):  # type: ignore[index]
            continue
        inside = start > 0 and end < len(ids)
        alone = (inside and (len(solid) > 0 or end - start == 1)) or (behind and len(solid) == 1)
        hidden[start:end] = alone or len(np.unique(solid)) > 1
    return hidden


def _without_pad_runs(real: Array, ids: Array, pad_id: int | None, pad_ends: bool) -> Array:
    """Two pad tokens and more at either end are padding, whatever mask and labels say of them; the
    first at the right is the end of the row where the pad token ends answers."""
    inside = np.flatnonzero(real)
    if pad_id is None or not len(inside):
        return real
    solid = inside[ids[inside] != pad_id]
    if not len(solid):
        return real
    lead = inside[inside < solid[0]]
    if len(lead) > 1:
        real[lead] = 0
    tail = inside[inside > solid[-1]]
    if len(tail) > 1:
        real[tail[1:] if pad_ends else tail] = 0
    return real


def _own_mask(feature: Any, known: int | None) -> Array | None:
    """The mask that the dataset's row brings, ones if it brings none; None if it is odd."""
    if known is None:
        return None
    try:
        own = feature["attention_mask"]
    except (TypeError, KeyError, IndexError):
        return np.ones(known, np.int64)
    array = np.asarray(own, dtype=np.int64).reshape(-1)
    return (array != 0).astype(np.int64) if len(array) == known else None


def _documents(
    pick: Mapping[str, Array], values: Mapping[str, Array], real: Array, row: int
) -> tuple[Array, bool]:
    """((T,) number of the document at each token, whether the batch itself says so)."""
    size = len(real)
    cuts = np.zeros(size, bool)
    said = False
    for key in _SEGMENTS:
        value = pick.get(key)
        if value is None or len(value) != size:
            continue
        inside = np.flatnonzero(real)
        if key == "position_ids":
            # Positions that do not increase say nothing here, and are judged separately.
            if miscounted(value[inside]):
                continue
            # Positions of padding are anything; only a return to 0 begins a document.
            begins = inside[1:][value[inside[1:]] == 0]
        else:
            begins = inside[1:][value[inside[1:]] != value[inside[:-1]]]
        cuts[begins] = True
        said = said or bool(len(begins))
    for key in ("cu_seq_lens_q", "cu_seqlens"):
        offsets = values.get(key)
        if offsets is not None and row == 0 and len(values["input_ids"]) == 1:
            flat = offsets.reshape(-1)
            flat = flat[(flat > 0) & (flat < size)]
            cuts[flat] = True
            said = said or bool(len(flat))
    mask = pick.get("attention_mask")
    if mask is not None and mask.shape == real.shape and mask.max(initial=0) > 1:
        inside = np.flatnonzero(real)
        cuts[inside[1:][mask[inside[1:]] != mask[inside[:-1]]]] = True
        said = True
    return np.where(real != 0, np.cumsum(cuts) + 1, 0), said


# Steps from token to token that go up, as a share of all, where positions count.
_COUNTING = 0.6


def miscounted(positions: Array) -> Literal["", "still", "disordered"]:
    """How position ids fail to increase from token to token; "" if they do increase.

    A return to the first of them, or to 0, begins another document.
    """
    steps = np.diff(positions)
    steps = steps[(positions[1:] != 0) & (positions[1:] != positions[:1]) | (steps == 0)]
    if len(steps) < 2 or (steps > 0).mean() >= _COUNTING:
        return ""
    return "still" if (steps == 0).mean() >= 1 - _COUNTING else "disordered"
