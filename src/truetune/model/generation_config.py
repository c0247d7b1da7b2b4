"""The generation_config that is saved: the model's own, with the contract's stop set.

A server reads its stop ids and sampling defaults from there. transformers refuses to save flags
that have no effect (a temperature without do_sample) once anything in the config was changed, so
those are dropped and named.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from truetune.findings import Finding

# Flags with effect only where do_sample is true, or only with beams; with the values that
# transformers takes as unset.
_SAMPLING: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_BEAMS: dict[str, Any] = {"early_stopping": False, "length_penalty": 1.0}


def served_generation_config(
    model: Any, stop_ids: Sequence[int], tokenizer: Any
) -> tuple[Any, list[Finding]]:
    """The generation_config to save.

    Args:
        model: a transformers model; its own config is left as it is.
        stop_ids: the contract's stop set.
        tokenizer: gives the pad id if the model has none.

    Returns:
        A transformers GenerationConfig, and notes on what was dropped from the model's own.
    """
    from transformers import GenerationConfig

    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    _set_ids(config, stop_ids, tokenizer)
    dropped: list[str] = []
    if config.do_sample is not True:
        dropped += _drop(config, _SAMPLING)
    if (config.num_beams or 1) == 1:
        dropped += _drop(config, _BEAMS)
    try:
        config.validate(strict=True)
    except ValueError:
        # Something else that transformers does not save: keep the ids, drop the rest.
        dropped = sorted(
            config.to_diff_dict().keys() - {"transformers_version", "_from_model_config"}
        )
        config = GenerationConfig(bos_token_id=config.bos_token_id)
        _set_ids(config, stop_ids, tokenizer)
        dropped = [name for name in dropped if not name.endswith("_token_id")]
    return config, [_note(dropped)] if dropped else []


def _set_ids(config: Any, stop_ids: Sequence[int], tokenizer: Any) -> None:
    ids = [int(i) for i in stop_ids]
    config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = tokenizer.pad_token_id


def _drop(config: Any, flags: dict[str, Any]) -> list[str]:
    dropped = []
    for name, unset in flags.items():
        value = getattr(config, name, None)
        if value is not None and value != unset:
            dropped.append(f"{name} {value}")
            setattr(config, name, None)
    return dropped


def _note(dropped: Sequence[str]) -> Finding:
    return Finding(
        code="generation-flags-dropped",
        level="note",
        what=f"the saved generation_config leaves out {', '.join(dropped)}",
        where="generation_config.json",
        count=len(dropped),
        why="the model's own generation_config sets them without the switch that activates them "
        "(do_sample, num_beams): they never had an effect, and transformers refuses to save them",
        fix="nothing to do; pass them to the server if they are intended",
    )
