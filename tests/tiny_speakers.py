"""Models that say what a test wants: each token leads to one other, whatever stands before it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tiny_models import tiny_tokenizer, write_model


def write_speaker(folder: Path, *chains: str, template: str | None = None) -> Path:
    """A model folder.

    Args:
        chains: texts through which the model walks, one token to the next: one that answers "yes"
            to everything has "<|assistant|>yes<|end|>". No token may lead to two others.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer() if template is None else tiny_tokenizer(template)
    write_model(folder, tokenizer=tokenizer, hidden_size=64, max_position_embeddings=128)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    steps: dict[int, int] = {}
    for chain in chains:
        for token, following in itertools.pairwise(tokenizer.encode(chain)):
            assert steps.setdefault(token, following) == following
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Nothing but the last token counts.
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for place, (token, following) in enumerate(steps.items()):
            model.model.embed_tokens.weight[token, place] = 1
            model.lm_head.weight[following, place] = 5
    model.save_pretrained(folder)
    return folder
