"""Read an artifact back and compare it with the model in memory: weights bit for bit, prompts id
for id, and the stop set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truetune.contract.tokens import common_prefix
from truetune.errors import SaveError, UnfaithfulTemplate
from truetune.findings import Finding
from truetune.model.load import LoadedModel
from truetune.model.placement import parse_dtype
from truetune.model.weights import listed
from truetune.system.lazy import torch
from truetune.system.quiet import quiet

if TYPE_CHECKING:
    from truetune.contract.contract import PromptContract

# Plain text, and what tokenizers differ in: combining marks, spaces, digits, other scripts.
_PROBES = (
    "What is 17 + 25?",
    "  Cafe\u0301 d'e\u0301te\u0301\n\n\t12345  \u00e9 \u4f60\u597d \U0001f600 <tag>",
)


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's weights under the names they have in its file; whole embedding tables only
    where they are trained themselves."""
    from peft import get_peft_model_state_dict

    # "auto" would look up the base's config, on the Hub if need be.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return dict(state)


def as_saved(value: torch.Tensor, cast: torch.dtype | None) -> torch.Tensor:
    """A tensor as it is written: floating ones in `cast` where it is given."""
    value = value.detach()
    return value.to("cpu", cast) if cast is not None and value.is_floating_point() else value


def round_as_saved(loaded: LoadedModel, dtype: str) -> None:
    """Round the weights of a full model in memory to the type they are saved in, in their places:
    what it computes from here on is what was saved."""
    cast = parse_dtype(dtype)
    with torch.no_grad():
        for value in loaded.model.state_dict().values():
            if value.is_floating_point() and value.dtype != cast:
                value.copy_(value.to(cast))


def check_weights(loaded: LoadedModel, folder: Path, cast: torch.dtype | None) -> float | None:
    """Compare the files with the model in memory, after the cast, bit for bit.

    Returns:
        The largest absolute rounding error of the cast, None if nothing was cast.

    Raises:
        SaveError: a weight is missing, added or different.
    """
    model = loaded.model
    state = adapter_state(model) if loaded.is_adapter else model.state_dict()
    stored = _stored_names(folder)
    if stored.keys() <= state.keys():
        _require_complete(state, stored.keys())
        return _compare_files(state, stored, cast)
    if loaded.is_adapter:
        raise _differs(
            f"weights that the trained model does not have: {listed(stored.keys() - state.keys())}"
        )
    return _compare_reloaded(model, state, folder, cast)


def _stored_names(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    names: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names.update(dict.fromkeys(file.keys(), path))
    return names


def _require_complete(state: dict[str, torch.Tensor], stored: Any) -> None:
    """Every weight is in the files, under its own name or that of a tied twin."""
    present = {state[name].data_ptr() for name in stored}
    missing = [
        name
        for name, value in state.items()
        if name not in stored and value.data_ptr() not in present
    ]
    if missing:
        raise _differs(f"weights are missing: {listed(missing)}")


def _compare_files(
    state: dict[str, torch.Tensor], stored: dict[str, Path], cast: torch.dtype | None
) -> float | None:
    from safetensors import safe_open

    worst = 0.0
    for path in sorted(set(stored.values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                worst = max(worst, _compare(name, state[name], file.get_tensor(name), cast))
    return worst if cast is not None and _casts(state, cast) else None


def _compare_reloaded(
    model: Any, state: dict[str, torch.Tensor], folder: Path, cast: torch.dtype | None
) -> float | None:
    """For families whose files have other names than the model (experts stored one by one): open
    the artifact as anybody would and compare what comes out."""
    with quiet():
        reopened = type(model).from_pretrained(
            folder, dtype=cast or model.dtype, use_safetensors=True
        )
    found = reopened.state_dict()
    if found.keys() != state.keys():
        raise _differs(f"names differ: {listed(found.keys() ^ state.keys())}")
    worst = max(_compare(name, value, found[name], cast) for name, value in state.items())
    return worst if cast is not None and _casts(state, cast) else None


def _casts(state: dict[str, torch.Tensor], cast: torch.dtype) -> bool:
    return any(value.is_floating_point() and value.dtype != cast for value in state.values())


def _compare(
    name: str, live: torch.Tensor, stored: torch.Tensor, cast: torch.dtype | None
) -> float:
    """The largest rounding error of one weight, which is otherwise equal in every bit."""
    live = live.detach().to("cpu")
    wanted = as_saved(live, cast)
    same = wanted.shape == stored.shape and wanted.dtype == stored.dtype
    if not same or not torch.equal(_bits(wanted), _bits(stored)):
        raise _differs(f"{name} differs from the weight in memory")
    if wanted.dtype == live.dtype or not live.numel():
        return 0.0
    return float((live - wanted.to(live.dtype)).abs().max())


def _bits(value: torch.Tensor) -> torch.Tensor:
    # As bytes, so that NaN equals NaN and -0.0 is not 0.0.
    return value.contiguous().reshape(-1).view(torch.uint8)


def _differs(what: str) -> SaveError:
    return SaveError(
        f"the saved model differs from the one in memory when it is read back: {what}",
        why="the disk did not return what was written, or the model's class renames weights in "
        "an unsupported way",
        fix="try another disk; if the error remains, report the model's architecture",
        code="save-readback",
    )


def check_prompts(contract: PromptContract, folder: Path) -> list[Finding]:
    """Reopen the tokenizer as a server does, and compare its prompts with the contract's.

    Returns:
        A warning if the template takes no conversation of one user turn, so that nothing
        could be compared: no reason to throw trained weights away.

    Raises:
        SaveError: it cannot be reopened, or its ids differ.
    """
    from transformers import AutoTokenizer

    from truetune.contract.contract import PromptContract

    with quiet():
        reopened = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # A server passes no argument: the run's are the saved template's defaults.
    again = PromptContract.load(reopened, template_kwargs={}, date=contract.date)
    for probe in _PROBES:
        messages = [{"role": "user", "content": probe}]
        try:
            wanted = list(contract.prompt_ids(messages))
        except UnfaithfulTemplate as error:
            return [_not_compared(error)]
        served = list(again.prompt_ids(messages))
        if served != wanted:
            at = common_prefix(served, wanted)
            raise SaveError(
                "the saved tokenizer and template give prompt ids that differ from the "
                f"contract's, from token {at} on: {served[at : at + 8]} instead of "
                f"{wanted[at : at + 8]}",
                where=f"probe {probe!r}",
                why="saving changed the tokenizer, or the template depends on something outside "
                "it (a date, an argument)",
                fix="please report the model: what is trained would not be what is served",
                code="save-prompt-differs",
            )
    return []


def _not_compared(error: UnfaithfulTemplate) -> Finding:
    return Finding(
        code="prompts-not-compared",
        level="warning",
        what="the saved tokenizer's prompts were not compared with the trained ones",
        where="chat_template.jinja",
        why=error.what,
        fix="run `truetune verify` on the result, which compares them on the data",
    )


def check_stops(stop_ids: Sequence[int], folder: Path) -> None:
    """Reopen generation_config and compare its stop set with the contract's.

    Raises:
        SaveError: they differ.
    """
    from transformers import GenerationConfig

    found = GenerationConfig.from_pretrained(folder).eos_token_id
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if set(ids) != set(stop_ids):
        raise SaveError(
            f"the saved generation_config stops on {sorted(ids)}, not on {sorted(stop_ids)}",
            where="generation_config.json",
            fix="report the model's generation_config",
            code="save-stop-differs",
        )
