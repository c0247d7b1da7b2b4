"""Examples to batches to loss: pure functions of model and batch, used by all who compute."""

from truetune.compute.batch import Batch, Batcher, PaddedBatcher, RowOrder, pad_and_collate
from truetune.compute.loss import cross_entropy_sum, logits_of, loss_sum, masked_cross_entropy

__all__ = [
    "Batch",
    "Batcher",
    "PaddedBatcher",
    "RowOrder",
    "cross_entropy_sum",
    "logits_of",
    "loss_sum",
    "masked_cross_entropy",
    "pad_and_collate",
]
