"""Model and batch to loss: pure functions, the same for training, evaluation and checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from truetune.system.lazy import torch

if TYPE_CHECKING:
    from truetune.compute.batch import Batch


def masked_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy in nats over the supervised positions, weighted by `mask`.

    Args:
        logits: (B, T, V).
        targets: (B, T), int64; ignored where mask is 0.
        mask: (B, T), int or float; positions with 0 do not count.

    Returns:
        A scalar in float32; 0.0, not NaN, if the mask is empty.
    """
    # In float32: a half-precision sum rounds beyond 256 (bfloat16) or 2,048 (float16) positions.
    total = mask.sum(dtype=torch.float32)
    if total == 0:
        return cross_entropy_sum(logits, targets, mask)
    return cross_entropy_sum(logits, targets, mask) / total


def cross_entropy_sum(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Like `masked_cross_entropy`, but a sum: what a step adds up over its micro-batches."""
    import torch.nn.functional as F

    # Selecting first, instead of multiplying by 0, keeps NaN at unsupervised positions out and
    # lets their targets be any number.
    keep = mask != 0
    losses = F.cross_entropy(logits[keep].float(), targets[keep], reduction="none")
    return (losses * mask[keep]).sum()


def logits_of(model: torch.nn.Module, ids_BT: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Logits (B, T, V) of a plain module that returns them or of a Hugging Face model.

    Without arguments no attention mask is passed: rows are padded right and attention is causal,
    so that no supervised position sees a pad, and kernels keep their causal fast path.
    """
    config = getattr(model, "config", None)
    # A cache of keys and values is of no use in training and costs memory.
    if hasattr(config, "use_cache"):
        arguments["use_cache"] = False
    output = model(ids_BT, **arguments)
    return output.logits if hasattr(output, "logits") else output


def loss_sum(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy in nats over the supervised positions of a batch (scalar, float32)."""
    logits_BTV = logits_of(model, batch.ids_BT)
    return cross_entropy_sum(logits_BTV, batch.targets_BT, batch.supervised_BT)
