"""A run that was stopped and resumed is the uninterrupted one, to the last bit.

The checkpoint is what a run writes: weights by the model room, the rest by the engine, dropout of
the adapter included. No tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_families import SIX
from truetune import PromptContract, SFTTrainer
from truetune.engine.checkpoint import load_state, save_state
from truetune.model.load import LoadedModel, load_model
from truetune.model.lora import LoraSettings, add_lora
from truetune.model.placement import Purpose
from truetune.model.save import save_model

RUN = {"seed": 3}


# All weights and adapters of every family; the other optimizers, and steps that count tokens.
CASES: list[tuple[str, str, str, int | None]] = [
    *((name, kind, "adamw", None) for name in SIX for kind in ("full", "lora")),
    ("llama", "lora", "sgd", 90),
    ("gemma", "full", "adamw_bf16", 90),
]


def start(base: Path, kind: str, optim: str) -> LoadedModel:
    if kind == "full":
        return load_model(base, device="cpu", bf16_weights=optim == "adamw_bf16")
    loaded = load_model(base, purpose="lora", device="cpu")
    return add_lora(loaded, LoraSettings(r=4, dropout=0.3), seed=1)


def trainer(
    loaded: LoadedModel, contract: PromptContract, optim: str, tokens: int | None = None
) -> SFTTrainer:
    chats = [
        [{"role": "user", "content": "q" * r}, {"role": "assistant", "content": f"answer {r}"}]
        for r in range(1, 7)
    ]
    return SFTTrainer(
        loaded.model,
        examples=[example for chat in chats for example in contract.encode(chat)],
        max_seq_len=64,
        pad_id=contract.pad_id,
        batch_size=None if tokens else 4,
        tokens_per_step=tokens,
        micro_batch_size=2,
        max_steps=6,
        max_lr=1e-2,
        warmup_steps=2,
        weight_decay=0.1,
        optim=optim,
        seed=3,
    )


@pytest.mark.parametrize(("name", "kind", "optim", "tokens"), CASES)
def test_resumed_is_uninterrupted(
    name: str,
    kind: str,
    optim: str,
    tokens: int | None,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    loaded = start(folder_of(name), kind, optim)
    contract = PromptContract.load(loaded.tokenizer)
    whole = trainer(loaded, contract, optim, tokens)
    torch.manual_seed(3)
    steps: list[dict[str, Any]] = []
    for step in range(6):
        if step == 3:
            save_model(loaded, contract, tmp_path / "c")
            save_state(whole, tmp_path / "c", run=RUN)
        steps.append(whole.train_step())
    torch.manual_seed(1234)
    bf16 = optim == "adamw_bf16"
    purpose: Purpose = "full" if kind == "full" else "lora"
    opened = load_model(tmp_path / "c", purpose=purpose, device="cpu", bf16_weights=bf16)
    again = trainer(opened, PromptContract.load(opened.tokenizer), optim, tokens)
    load_state(again, tmp_path / "c", run=RUN)
    assert again.step == 3
    assert [again.train_step() for _ in range(3)] == steps[3:]
    ours, theirs = dict(whole.named_trainable), dict(again.named_trainable)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_dropout_follows_seed_and_step_alone(folder_of: Callable[[str], Path]) -> None:
    """Whatever drew random numbers before a step, its losses are the same; and there is dropout."""
    loaded = start(folder_of("llama"), "lora", "sgd")
    contract = PromptContract.load(loaded.tokenizer)
    losses = []
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    for state, p in ((1, 0.05), (2, 0.05), (2, 0.0)):
        torch.manual_seed(state)
        for module in loaded.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = p
        made = trainer(loaded, contract, "sgd")
        made.max_lr = 0.0
        losses.append(made.train_step()["loss"])
    assert losses[0] == losses[1] != losses[2]
