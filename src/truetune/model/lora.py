"""LoRA: choose the layers that get an adapter, and prepare the model for training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.errors import UsageError
from truetune.findings import Finding, near
from truetune.model.architecture import (
    causal_config,
    linear_layers,
    meta_model,
    projection_names,
)
from truetune.model.load import LoadedModel
from truetune.model.mode import random_state_kept
from truetune.model.new_tokens import NewToken, row_targets, start_adapter_rows, use_row_layers
from truetune.model.quantise import num_weights
from truetune.model.source import locate
from truetune.model.tokenizer import locate_base
from truetune.system.lazy import torch
from truetune.system.quiet import quiet

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraSettings:
    """Shape of a LoRA adapter (Hu et al. 2021).

    Attributes:
        r: rank.
        alpha: the update is scaled by alpha / r, or alpha / sqrt(r) with rslora.
        dropout: share of the adapter's inputs dropped in training.
        target_modules: "all-linear" (all but the output head), or names of layers: the last part
            of their path, or more of it.

    Raises:
        UsageError: a number out of range, or no target.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    target_modules: str | Sequence[str] = ALL_LINEAR
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        wrong = []
        if self.r < 1:
            wrong.append(f"r is {self.r}, but must be at least 1")
        if self.alpha <= 0:
            wrong.append(f"alpha is {self.alpha}, but must be above 0")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout is {self.dropout}, but must be at least 0 and below 1")
        if not self.target_modules:
            wrong.append("target_modules is empty")
        if wrong:
            raise UsageError("invalid LoRA settings: " + "; ".join(wrong), code="lora-settings")


def add_lora(
    loaded: LoadedModel,
    settings: LoraSettings,
    seed: int,
    *,
    new_tokens: Sequence[NewToken] = (),
) -> LoadedModel:
    """Freeze the model and put a LoRA adapter on it; its weights are float32.

    Args:
        loaded: a model without adapter; changed in place.
        settings: the adapter's shape.
        seed: of the adapter's first weights; the global random state is left as it was.
        new_tokens: whose rows are trained too; the model has room for them.

    Returns:
        The model with adapter; `findings` gains a warning where some targets match nothing.

    Raises:
        UsageError: no target matches, a table is both target and home of new tokens, or the model
        already has an adapter.
    """
    if loaded.is_adapter:
        raise UsageError(
            "the model already has an adapter",
            where=loaded.source,
            fix="continue training that adapter, or merge it into its base first",
            code="lora-twice",
        )
    targets, findings = _targets(loaded.model, settings.target_modules)
    findings += _experts_left_out(loaded.model)
    rows = row_targets(loaded.model, new_tokens) if new_tokens else None
    if rows:
        _refuse_table_twice(targets, rows)
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type, unused-ignore]
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type=TaskType.CAUSAL_LM,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        trainable_token_indices=rows,
    )
    with quiet(), random_state_kept():
        torch.manual_seed(seed)
        # autocast_adapter_dtype makes LoRA weights float32 on a bfloat16 base.
        model = get_peft_model(loaded.model, config, autocast_adapter_dtype=True)
        if rows:
            use_row_layers(model)
            start_adapter_rows(model, new_tokens)
    found = (*loaded.findings, *findings)
    return dataclasses.replace(loaded, model=model, is_adapter=True, findings=found)


def _refuse_table_twice(targets: Sequence[str], rows: Mapping[str, Any]) -> None:
    twice = [t for t in targets for path in rows if path == t or path.endswith(f".{t}")]
    if twice:
        raise UsageError(
            f"{twice[0]} is both a LoRA target and the embedding matrix that holds new tokens",
            why="a LoRA update changes every embedding in the matrix, including the new ones",
            fix=f"remove {twice[0]} from --target-modules, or omit --add-token",
            code="lora-table-twice",
        )


def lora_target_findings(
    source: str, targets: str | Sequence[str], revision: str | None = None
) -> list[Finding]:
    """What `add_lora` will find for the names of layers, judged by the config: no weights are read.

    Raises:
        ModelError: the model's files cannot be read.
        UsageError: no name matches a layer.
    """
    files = locate(source, revision, weights=False)
    base = locate_base(files, weights=False) if files.is_adapter else files
    return _targets(meta_model(causal_config(base)), targets)[1]


def _targets(model: Any, asked: str | Sequence[str]) -> tuple[list[str], list[Finding]]:
    """Names or paths of layers for peft, and a warning for names that match nothing."""
    if asked == ALL_LINEAR:
        return _all_linear(model), []
    names = [asked] if isinstance(asked, str) else list(dict.fromkeys(asked))
    paths = [path for path, module in model.named_modules() if _takes_lora(module)]
    counts = {
        name: sum(path == name or path.endswith(f".{name}") for path in paths) for name in names
    }
    unmatched = [name for name, count in counts.items() if not count]
    if not unmatched:
        return names, []
    known = projection_names(model)
    close = [match for name in unmatched for match in near(name, known) if match not in names]
    meant = f"did you mean {', '.join(dict.fromkeys(close))}? " if close else ""
    listing = ", ".join(f"{name} ({count})" for name, count in known.items())
    if len(unmatched) == len(names):
        raise UsageError(
            f"no layer is called {' or '.join(unmatched)}",
            why=f"{type(model).__name__} has these linear layers: {listing}",
            fix=f"{meant}Name some of them, or {ALL_LINEAR}",
            code="lora-targets",
        )
    matched = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    finding = Finding(
        code="lora-targets-unmatched",
        level="warning",
        what=f"no layer is called {' or '.join(unmatched)}; layers matched: {matched}",
        count=len(unmatched),
        why=f"{type(model).__name__} has these linear layers: {listing}",
        fix=f"{meant}Remove the names that match no layer",
    )
    return [name for name in names if counts[name]], [finding]


def _takes_lora(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D)


def _all_linear(model: Any) -> list[str]:
    paths = [path for path, _ in linear_layers(model)]
    names = sorted({path.rpartition(".")[2] for path in paths})
    # peft matches by the end of a path: full paths where a short name would catch the head too.
    head = next(
        (path for path, module in model.named_modules() if module is model.get_output_embeddings()),
        "",
    )
    return paths if head.rpartition(".")[2] in names else names


def _experts_left_out(model: Any) -> list[Finding]:
    """Experts that a family keeps in one tensor of three dimensions are no linear layers."""
    stacked = [
        (f"{path}.{name}", parameter.numel())
        for path, module in model.named_modules()
        if not isinstance(module, torch.nn.Conv1d)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]
    if not stacked:
        return []
    share = sum(size for _, size in stacked) / trainable_share(model)[1]
    return [
        Finding(
            code="lora-experts-left-out",
            level="warning",
            what=f"the experts get no adapter: {share:.0%} of the model's weights",
            where=stacked[0][0],
            count=len(stacked),
            why="they are stacked in one tensor per layer, and LoRA applies only to linear layers",
            fix="nothing to do if adapting attention and shared layers is enough; otherwise "
            "train all weights",
        )
    ]


def trainable_share(model: Any) -> tuple[int, int]:
    """(trainable, all) weights; a matrix used twice counts once, one of 4 bits in full."""
    sizes = [(num_weights(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass instead of keeping them (training mode only).

    The non-reentrant kind: it passes gradients to adapters above a frozen embedding, which the
    reentrant kind drops silently unless the embedding's output is made to require them.

    Raises:
        UsageError: the architecture has no support for it.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise UsageError(
            f"{type(inner).__name__} does not support gradient checkpointing",
            fix="omit --gradient-checkpointing",
            code="gradient-checkpointing",
        )
    # transformers called it so in 5.17, and warns of that name since.
    enable = getattr(inner, "activation_checkpointing_enable", None)
    (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})
