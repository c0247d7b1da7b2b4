"""Compare two models on the same tokens: how far apart their logits are.

input   a loaded model, rows of ids with their supervised positions
does    one forward pass a row, no padding; keeps what the supervised positions predict
output  Measured of one model; Agreement of two

Where one model is compared with itself, saved and opened again, the likeliest tokens of each
position are kept with their probabilities (`Reading`): what two readings differ by is measured in
nats, so that it can be compared with what two computations of one model differ by.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from truetune.data.rows import evenly
from truetune.findings import Finding
from truetune.model.load import LoadedModel
from truetune.model.mode import evaluating
from truetune.system.lazy import torch

# Positions of a row that are measured, spread over it: 256 x 152k logits in float32 are 155 MB.
_POSITIONS = 256
# Of those, positions whose logits are kept for comparison with another model.
_KEPT = 16


@dataclass(frozen=True)
class Measured:
    """The predictions of a model at the supervised positions of some rows; one entry per row.

    Attributes:
        logprobs: natural logarithm of the probability of each target.
        greedy: the likeliest token at each position.
        logits: at up to 16 positions a row (P, V), float32 on CPU; () if not kept.
    """

    logprobs: tuple[tuple[float, ...], ...]
    greedy: tuple[tuple[int, ...], ...]
    logits: tuple[torch.Tensor, ...] = ()

    @property
    def loss(self) -> float:
        """Nats per measured token."""
        return -sum(map(sum, self.logprobs)) / max(sum(map(len, self.logprobs)), 1)


@dataclass(frozen=True)
class Agreement:
    """How far a model's predictions are from those of a reference.

    Attributes:
        max_difference, mean_difference: of logits; None if none were kept.
        spread: standard deviation of the reference's logits at a position, averaged.
        max_logprob_difference: of the targets' log-probabilities, in nats.
        greedy: share of the positions where both take the same token.
        reference_loss, loss: nats per token.
        num_positions: compared.
    """

    max_difference: float | None
    mean_difference: float | None
    spread: float | None
    max_logprob_difference: float
    greedy: float
    reference_loss: float
    loss: float
    num_positions: int

    @property
    def relative(self) -> float | None:
        """Mean difference in units of the spread."""
        if self.mean_difference is None or self.spread is None:
            return None
        return self.mean_difference / max(self.spread, 1e-12)


def measure(
    loaded: LoadedModel,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    keep_logits: bool = True,
) -> Measured:
    """Run a model over rows (ids, mask: 1 is supervised); rows without a target are left out.

    The model is returned to its previous mode.
    """
    logprobs, greedy, kept = [], [], []
    with evaluating(loaded.model):
        for ids, mask in rows:
            targets = [i for i, on in enumerate(mask) if on and i]
            if not targets:
                continue
            targets = list(evenly(targets, _POSITIONS, last=True))
            logits_PV = _logits(loaded, ids, [i - 1 for i in targets])
            log_PV = logits_PV.log_softmax(dim=-1)
            wanted = torch.tensor([ids[i] for i in targets], device=log_PV.device)
            logprobs.append(tuple(log_PV.gather(1, wanted[:, None])[:, 0].tolist()))
            greedy.append(tuple(logits_PV.argmax(dim=-1).tolist()))
            if keep_logits:
                some = list(evenly(range(len(targets)), _KEPT, last=True))
                kept.append(logits_PV[some].cpu())
    return Measured(tuple(logprobs), tuple(greedy), tuple(kept))


# Tokens of a forward pass over several rows, padding among them, and logits that it may hold
# (float32: 256 MB). One more pass costs a small model on a CPU no more than so much padding.
_PASS_TOKENS, _PASS_PADDING, _PASS_LOGITS = 4096, 256, 2**26


@dataclass(frozen=True)
class Scored:
    """The scores of all targets of one row.

    Attributes:
        losses: cross-entropy of each target, in nats.
        likeliest: of each target, whether it is the likeliest token at its place.
    """

    losses: tuple[float, ...] = ()
    likeliest: tuple[bool, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether each target is the likeliest token at its place."""
        return all(self.likeliest)

    @property
    def loss(self) -> float:
        """Summed over the targets."""
        return sum(self.losses)


def row_losses(
    loaded: LoadedModel,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Summed cross-entropy in nats of each row's targets, as `row_scores` finds them."""
    return [scored.loss for scored in row_scores(loaded, rows, on_progress)]


def row_scores(
    loaded: LoadedModel,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Scored]:
    """Score every target of each row; rows as of `measure`.

    Rows of similar length share a forward pass, padded right: attention is causal, so no target
    sees the padding. The model is returned to its previous mode.

    Args:
        on_progress: is called with the number of rows so far and of all.
    """
    order = sorted(range(len(rows)), key=lambda row: (len(rows[row][0]), row))
    targets = [[i for i, on in enumerate(mask) if on and i] for _, mask in rows]
    found = [Scored()] * len(rows)
    done = 0
    with evaluating(loaded.model):
        for batch in _passes(loaded, rows, targets, order):
            wanted = sorted({i - 1 for row in batch for i in targets[row]})
            width = len(rows[batch[-1]][0])
            ids = [[*rows[row][0], *[0] * (width - len(rows[row][0]))] for row in batch]
            at = {position: place for place, position in enumerate(wanted)}
            logits_BPV = _forward(loaded, torch.tensor(ids, device=loaded.device), wanted, {})
            for row, logits_PV in zip(batch, logits_BPV, strict=True):
                if targets[row]:
                    chosen_PV = logits_PV[[at[i - 1] for i in targets[row]]].float()
                    gold = torch.tensor([rows[row][0][i] for i in targets[row]])
                    gold = gold.to(chosen_PV.device)
                    losses = torch.nn.functional.cross_entropy(chosen_PV, gold, reduction="none")
                    likeliest = (chosen_PV.argmax(dim=-1) == gold).tolist()
                    found[row] = Scored(tuple(losses.double().tolist()), tuple(likeliest))
            done += len(batch)
            if on_progress:
                on_progress(done, len(rows))
    return found


def _passes(
    loaded: LoadedModel,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    targets: Sequence[Sequence[int]],
    order: Sequence[int],
) -> Iterator[list[int]]:
    """Group rows into forward passes, the longest row of each pass last."""
    vocabulary = loaded.transformers_model.get_input_embeddings().weight.shape[0]
    batch: list[int] = []
    wanted: set[int] = set()
    tokens = 0
    for row in order:
        more = wanted.union(targets[row])
        width = len(rows[row][0])
        # Where the model cannot be asked for some positions, it computes all.
        kept = len(more) if _selects(loaded) else width
        computed = (len(batch) + 1) * width
        fits = computed <= min(_PASS_TOKENS, tokens + width + _PASS_PADDING)
        if batch and not (fits and (len(batch) + 1) * kept * vocabulary <= _PASS_LOGITS):
            yield batch
            batch, more, tokens = [], set(targets[row]), 0
        batch, wanted, tokens = [*batch, row], more, tokens + width
    if batch:
        yield batch


def agreement(reference: Measured, other: Measured) -> Agreement:
    """Compare two models measured on the same rows."""
    pairs = [
        (a, b)
        for one, two in zip(reference.logprobs, other.logprobs, strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    same = [
        a == b
        for one, two in zip(reference.greedy, other.greedy, strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    worst = mean = spread = None
    if reference.logits and other.logits:
        total, count, worst, deviation = 0.0, 0, 0.0, 0.0
        for one_PV, two_PV in zip(reference.logits, other.logits, strict=True):
            columns = min(one_PV.shape[-1], two_PV.shape[-1])
            apart = (one_PV[:, :columns] - two_PV[:, :columns]).abs()
            worst = max(worst, float(apart.max()))
            total, count = total + float(apart.sum()), count + apart.numel()
            deviation += float(one_PV.std(dim=-1).sum())
        mean = total / max(count, 1)
        spread = deviation / max(sum(len(rows) for rows in reference.logits), 1)
    return Agreement(
        max_difference=worst,
        mean_difference=mean,
        spread=spread,
        max_logprob_difference=max((abs(a - b) for a, b in pairs), default=0.0),
        greedy=sum(same) / max(len(same), 1),
        reference_loss=reference.loss,
        loss=other.loss,
        num_positions=len(pairs),
    )


# A lead that a difference of this many times the average one does not turn by chance: 4.5 standard
# deviations of the difference of two logits.
_CLEAR = 8.0


def at_clear_leads(reference: Measured, other: Measured) -> Agreement:
    """Compare two models as `agreement` does, but count the same tokens only at positions where the
    reference has a clear favourite: a model that is unsure of every token, such as one that has
    hardly been trained, changes its mind at any rounding.

    Raises:
        ValueError: the logits were not kept.
    """
    found = agreement(reference, other)
    if found.mean_difference is None:
        raise ValueError("the logits were not kept")
    same = []
    for one_PV, two_PV in zip(reference.logits, other.logits, strict=True):
        best_P2 = one_PV.topk(2, dim=-1).values
        clear_P = best_P2[:, 0] - best_P2[:, 1] > _CLEAR * found.mean_difference
        same_P = one_PV.argmax(dim=-1) == two_PV.argmax(dim=-1)
        same += same_P[clear_P].tolist()
    return replace(found, greedy=sum(same) / len(same) if same else 1.0, num_positions=len(same))


# Tokens of a position that are kept with their probabilities; all others are one sum.
_TOP = 64


@dataclass(frozen=True)
class Probe:
    """A sequence of ids, and the positions at which its predictions are read."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """What a model predicts at the positions of some probes, all of them one after the other.

    Attributes:
        top: ids (P, K) of the tokens that are kept.
        logprobs: (P, K + 1), of those tokens and, last, of all others together; float32.
        greedy: (P,), the likeliest token.
        spread: standard deviation of the logits at a position, averaged.
        digest: sha256 of all logits at these positions, as float32.
    """

    top: torch.Tensor
    logprobs: torch.Tensor
    greedy: torch.Tensor
    spread: float
    digest: str

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values; tensors in base64 of little-endian 32-bit numbers."""
        return {
            "top": _packed(self.top.to(torch.int32)),
            "logprobs": _packed(self.logprobs),
            "greedy": self.greedy.tolist(),
            "spread": self.spread,
            "digest": self.digest,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Reading:
        """Restore the value from the output of `as_dict`.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        greedy = torch.tensor([int(i) for i in value["greedy"]], dtype=torch.int64)
        rows = len(greedy)
        return cls(
            _unpacked(value["top"], torch.int32).view(rows, -1).long(),
            _unpacked(value["logprobs"], torch.float32).view(rows, -1),
            greedy,
            float(value["spread"]),
            str(value["digest"]),
        )


def _packed(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode("ascii")


def _unpacked(text: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(str(text), validate=True)), dtype=dtype)


def read(
    loaded: LoadedModel,
    probes: Sequence[Probe],
    top: torch.Tensor | None = None,
    *,
    padding: int = 0,
) -> Reading:
    """Run a model over probes, one at a time.

    Args:
        loaded: returned to its previous mode.
        top: ids (P, K) to be kept; None keeps the likeliest.
        padding: tokens behind each probe that nothing attends to: the same model computed in
            another shape.
    """
    tops, kept, greedy, spreads = [], [], [], []
    digest = hashlib.sha256()
    at = 0
    with evaluating(loaded.model):
        for probe in probes:
            logits_PV = _logits(loaded, probe.ids, probe.positions, padding)
            digest.update(logits_PV.cpu().contiguous().numpy().tobytes())
            # Where the logits are, but Apple's GPUs have no float64.
            wide_PV = (logits_PV.cpu() if logits_PV.is_mps else logits_PV).double()
            log_PV = wide_PV.log_softmax(dim=-1)
            if top is None:
                ids_PK = logits_PV.topk(min(_TOP, logits_PV.shape[-1]), dim=-1).indices
            else:
                ids_PK = top[at : at + len(probe.positions)]
                at += len(probe.positions)
            ids_PK = ids_PK.to(log_PV.device)
            known_PK = log_PV.gather(1, ids_PK.clamp(max=logits_PV.shape[-1] - 1))
            rest_P = (1 - known_PK.exp().sum(dim=-1)).clamp(min=1e-9).log()
            tops.append(ids_PK.cpu())
            kept.append(torch.cat([known_PK, rest_P[:, None]], dim=-1).float().cpu())
            greedy.append(logits_PV.argmax(dim=-1).cpu())
            spreads += logits_PV.std(dim=-1).tolist()
    return Reading(
        torch.cat(tops),
        torch.cat(kept),
        torch.cat(greedy),
        sum(spreads) / len(spreads),
        digest.hexdigest(),
    )


@dataclass(frozen=True)
class Distance:
    """How far a reading is from a reference of the same model.

    The divergence of a position is half the variance of the differences of log-probabilities,
    weighted with the reference's probabilities: the Kullback-Leibler divergence to second order. A
    sum of small differences of float32 numbers, it does not drown in their rounding.

    Attributes:
        mean, largest: divergence in nats, over the positions.
        flips: positions where the likeliest token is different, though the reference's lead was
            more than four times what the reading may be off by (see `distance`).
        greedy: share of the positions with the same likeliest token.
        positions: compared.
        bit_equal: whether all logits are equal to the last bit.
    """

    mean: float
    largest: float
    flips: int
    greedy: float
    positions: int
    bit_equal: bool


def divergence(p_PK: torch.Tensor, apart_PK: torch.Tensor) -> torch.Tensor:
    """(P,) in nats, from a reference's probabilities and the differences of log-probabilities."""
    p_PK = p_PK / p_PK.sum(dim=-1, keepdim=True)
    mean_P1 = (p_PK * apart_PK).sum(dim=-1, keepdim=True)
    return (p_PK * (apart_PK - mean_P1).square()).sum(dim=-1) / 2


def distance(reference: Reading, other: Reading, *, allowed: float = 0.0) -> Distance:
    """Compare a reading with its reference, whose tokens it was asked for.

    Args:
        allowed: divergence that a position may have; decides what counts as a flip.
    """
    own_PK = reference.logprobs.double()
    found_P = divergence(own_PK.exp(), other.logprobs.double() - own_PK)
    lead_P = reference.logprobs[:, 0] - reference.logprobs[:, 1]
    same_P = reference.greedy == other.greedy
    clear_P = lead_P > 4 * (2 * allowed) ** 0.5
    return Distance(
        mean=float(found_P.mean()),
        largest=float(found_P.max()),
        flips=int((clear_P & ~same_P).sum()),
        greedy=float(same_P.double().mean()),
        positions=len(found_P),
        bit_equal=reference.digest == other.digest,
    )


# What rounding the base may cost before it is a warning. QLoRA's promise is none (Dettmers et al.
# 2023, section 4); small models lose more than the large ones it was shown on.
_MOST_LOSS, _LEAST_GREEDY = 0.1, 0.8


def rounding_finding(found: Agreement, bits: str, num_rows: int) -> Finding:
    """Report what quantising the base costs before any training, as a note or a warning.

    Args:
        found: the quantised base against the original.
        bits: the kind, in words.
        num_rows: that were compared.
    """
    rise = found.loss - found.reference_loss
    what = (
        f"before training, the base in {bits} has a loss of {found.loss:.3f} on {num_rows} rows, "
        f"compared with {found.reference_loss:.3f} as stored, and predicts the same token at "
        f"{100 * found.greedy:.1f} % of {found.num_positions:,} positions"
    )
    if rise <= _MOST_LOSS and found.greedy >= _LEAST_GREEDY:
        return Finding("quantised-base", "note", what, count=num_rows)
    return Finding(
        "quantised-base-differs",
        "warning",
        what,
        count=num_rows,
        why=f"this is more than {_MOST_LOSS:g} nats of loss, or less than "
        f"{100 * _LEAST_GREEDY:.0f} % of "
        "the tokens: rounding damages this model, and the adapter would be trained on the damaged "
        "one",
        fix="use --lora or --load-in-8bit, or a larger model in 4 bits",
    )


def _logits(
    loaded: LoadedModel, ids: Sequence[int], positions: Sequence[int], padding: int = 0
) -> torch.Tensor:
    """Logits (P, V) of one row at some positions, float32."""
    ids_BT = torch.tensor([[*ids, *[ids[0]] * padding]], device=loaded.device)
    asked: dict[str, Any] = {}
    if padding:
        asked["attention_mask"] = torch.ones_like(ids_BT)
        asked["attention_mask"][:, -padding:] = 0
    return _forward(loaded, ids_BT, positions, asked)[0].float()


def _selects(loaded: LoadedModel) -> bool:
    """Whether the model can be asked for the logits of some positions alone."""
    return "logits_to_keep" in inspect.signature(loaded.transformers_model.forward).parameters


def _forward(
    loaded: LoadedModel, ids_BT: torch.Tensor, positions: Sequence[int], asked: dict[str, Any]
) -> torch.Tensor:
    """Logits (B, P, V) at some positions, as the model computes them."""
    wanted = torch.tensor(list(positions), device=loaded.device, dtype=torch.int64)
    asked = {**asked, "use_cache": False}
    selects = _selects(loaded)
    if selects:
        asked["logits_to_keep"] = wanted
    autocast = (
        torch.autocast(loaded.device.type, dtype=loaded.compute_dtype)
        if loaded.compute_dtype is not None
        else contextlib.nullcontext()
    )
    with torch.no_grad(), autocast:
        logits_BPV: torch.Tensor = loaded.model(ids_BT, **asked).logits
    return logits_BPV if selects else logits_BPV[:, wanted]
