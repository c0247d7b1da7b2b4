"""Examples to batches to loss: pure functions of model and batch, used by all who compute."""

from truetune.compute.batch import (
    Batch,
    Batcher,
    Limits,
    PaddedBatcher,
    RowOrder,
    TokenOrder,
    pad_and_collate,
)
from truetune.compute.loss import cross_entropy_sum, logits_of, loss_sum, masked_cross_entropy
from truetune.compute.memory import (
    Footprint,
    available_bytes,
    footprint,
    foreseen_footprint,
    most_bytes,
    recomputes,
)
from truetune.compute.packing import PackedBatch, PackedBatcher
from truetune.compute.route import Route, find_route

__all__ = [
    "Batch",
    "Batcher",
    "Footprint",
    "Limits",
    "PackedBatch",
    "PackedBatcher",
    "PaddedBatcher",
    "Route",
    "RowOrder",
    "TokenOrder",
    "available_bytes",
    "cross_entropy_sum",
    "find_route",
    "footprint",
    "foreseen_footprint",
    "logits_of",
    "loss_sum",
    "masked_cross_entropy",
    "most_bytes",
    "pad_and_collate",
    "recomputes",
]
