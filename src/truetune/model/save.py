"""Save a model atomically: read it back before the folder gets its final name.

input   a loaded model, the contract it was trained under, a folder that does not exist
does    writes weights, config, tokenizer with the contract's template, and generation_config with
        its stop set to a temporary sibling; reads all of it back; flushes; renames
output  SaveReport
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truetune.errors import OutputExists, SaveError, TruetuneError
from truetune.findings import Finding
from truetune.model.fingerprint import write_fingerprint
from truetune.model.generation_config import served_generation_config
from truetune.model.load import LoadedModel
from truetune.model.placement import dtype_name, parse_dtype
from truetune.model.readback import (
    adapter_state,
    as_saved,
    check_prompts,
    check_stops,
    check_weights,
)
from truetune.model.source import first_line, read_json
from truetune.model.tokenizer import num_ids
from truetune.model.weights import ADAPTER_WEIGHTS
from truetune.run_dir import flush_folder, settle
from truetune.system.lazy import torch
from truetune.system.quiet import quiet

if TYPE_CHECKING:
    from truetune.contract.contract import PromptContract


@dataclass(frozen=True)
class SavedFile:
    """A file of the artifact: name relative to its folder, bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class SaveReport:
    """What was saved, after it was read back.

    Attributes:
        folder: the artifact.
        files: sorted by name.
        dtype: torch name of the dtype the weights were written in.
        cast_error: largest absolute rounding error of a weight; None if nothing was cast.
        findings: notes.
    """

    folder: Path
    files: tuple[SavedFile, ...]
    dtype: str
    cast_error: float | None
    findings: tuple[Finding, ...]


def save_model(
    loaded: LoadedModel,
    contract: PromptContract,
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
) -> SaveReport:
    """Write a complete artifact that transformers (or peft), servers and `load_model` open.

    Args:
        loaded: a full model is saved whole, an adapter as a standard peft adapter.
        contract: gives tokenizer, template and stop set.
        folder: must not exist; its parents are made.
        dtype: cast the weights on writing; None keeps the parameters' own type.

    Raises:
        OutputExists: the folder is there already.
        UsageError: an unknown dtype.
        SaveError: writing failed, or the saved files differ from the model when they are read back.
            Nothing is left behind in both cases.
    """
    folder = Path(folder)
    cast = None if dtype is None else parse_dtype(dtype)
    if folder.exists():
        raise OutputExists(
            f"{folder} already exists", fix="choose another folder", code="output-exists"
        )
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        findings = _write(loaded, contract, partial, cast)
        cast_error = check_weights(loaded, partial, cast)
        findings += check_prompts(contract, partial)
        check_stops(contract.stop_ids, partial)
        files = tuple(
            SavedFile(path.relative_to(partial).as_posix(), path.stat().st_size, settle(path))
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        )
        flush_folder(partial)
        partial.rename(folder)
        flush_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, TruetuneError) or not isinstance(error, Exception):
            raise
        raise _failed(error, folder) from error
    saved_as = cast if cast is not None else _own_dtype(loaded)
    return SaveReport(folder, files, dtype_name(saved_as), cast_error, tuple(findings))


def _failed(error: Exception, folder: Path) -> SaveError:
    message = first_line(error)
    # safetensors reports a full disk as its own exception, with the system's text in it.
    full = getattr(error, "errno", None) == 28 or "No space left" in message
    return SaveError(
        f"the model could not be saved: {message}",
        where=str(folder),
        why="the disk is full" if full else f"{type(error).__name__} while writing",
        fix="free some space, or save to another disk; no partial files were left behind"
        if full
        else "no partial files were left behind; the model in memory is unaffected",
        code="save-failed",
    )


def _write(
    loaded: LoadedModel, contract: PromptContract, folder: Path, cast: torch.dtype | None
) -> list[Finding]:
    config, findings = served_generation_config(
        loaded.transformers_model, contract.stop_ids, contract.tokenizer
    )
    with quiet():
        if loaded.is_adapter:
            _write_adapter(loaded, folder, cast)
            _write_origin(loaded, contract, folder)
            config.save_pretrained(folder)
        else:
            _write_full(loaded.model, config, folder, cast)
    findings += _write_tokenizer(contract, folder)
    return findings + forget_code(folder)


# Files of a model that may name code, and the keys that do.
_NAME_CODE = ("config", "generation_config", "tokenizer_config", "processor_config")
_CODE_KEYS = ("auto_map", "custom_generate")


def forget_code(folder: Path) -> list[Finding]:
    """Remove what refers to Python code from the files of a saved model: no code is saved, and a
    loader that may run it would look for it, or fetch it.

    Raises:
        ModelError: a file that names code is not JSON.
    """
    removed = []
    for path in [folder / f"{name}.json" for name in (*_NAME_CODE, "preprocessor_config")]:
        if not path.is_file() or not any(key in path.read_text("utf-8") for key in _CODE_KEYS):
            continue
        settings = read_json(path)
        found = [key for key in _CODE_KEYS if settings.pop(key, None) is not None]
        if found:
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
            removed += [f"{key} in {path.name}" for key in found]
    if not removed:
        return []
    return [
        Finding(
            code="code-forgotten",
            level="note",
            what=f"references to Python code were removed: {', '.join(removed)}",
            count=len(removed),
            why="truetune does not run code that comes with weights and does not save it, so the "
            "references would point to files that are not there",
            fix="nothing to do: transformers includes this architecture",
        )
    ]


def _write_full(model: Any, generation_config: Any, folder: Path, cast: torch.dtype | None) -> None:
    state = None
    if cast is not None:
        state = _cast_once(model.state_dict(), cast)
    with _changed(model, generation_config=generation_config), _kept(model.config, "dtype"):
        model.save_pretrained(folder, state_dict=state)
        if cast is not None:
            # save_pretrained has recorded the type of the weights in memory.
            model.config.dtype = dtype_name(cast)
            model.config.save_pretrained(folder)


def _cast_once(state: dict[str, torch.Tensor], cast: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights as they are written; those that are one in memory (a tied head) stay one, or the
    file would hold it twice."""
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    found = {}
    for name, value in state.items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if not value.numel() or place not in made:
            made[place] = as_saved(value, cast)
        found[name] = made[place]
    return found


def _write_adapter(loaded: LoadedModel, folder: Path, cast: torch.dtype | None) -> None:
    from safetensors.torch import save_file

    state = adapter_state(loaded.model)
    _require_all_trained(loaded.model, state)
    tensors = {name: as_saved(value, cast).contiguous() for name, value in state.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(loaded.model.active_peft_config)
    config.base_model_name_or_path = loaded.base
    config.revision = loaded.base_revision
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        # A set is written in another order by every process.
        config.target_modules = sorted(config.target_modules)
    config.task_type = config.task_type or "CAUSAL_LM"
    config.save_pretrained(folder)


def _write_origin(loaded: LoadedModel, contract: PromptContract, folder: Path) -> None:
    """What ties the adapter to its base and tokenizer."""
    if loaded.fingerprint:
        known = dataclasses.replace(
            loaded.fingerprint,
            tokenizer_size=num_ids(contract.tokenizer),
            quantised=loaded.quantised,
        )
        write_fingerprint(known, folder)


def _require_all_trained(model: Any, state: dict[str, torch.Tensor]) -> None:
    kept = {value.data_ptr() for value in state.values()}
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in kept]
    if lost:
        raise SaveError(
            f"{len(lost)} trained weights are not part of the adapter: {', '.join(lost[:4])}",
            why="they were made trainable outside peft",
            fix="list them in modules_to_save, or train and save the full model",
            code="save-incomplete",
        )


def _own_dtype(loaded: LoadedModel) -> torch.dtype:
    weights = adapter_state(loaded.model) if loaded.is_adapter else loaded.model.state_dict()
    found: torch.dtype = next(v.dtype for v in weights.values() if v.is_floating_point())
    return found


def _write_tokenizer(contract: PromptContract, folder: Path) -> list[Finding]:
    tokenizer = contract.tokenizer
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    saved = contract.saved_template()
    with _changed(tokenizer, chat_template=saved):
        tokenizer.save_pretrained(folder)
    _forget_origin(folder / "tokenizer_config.json")
    kept = set(saved) if isinstance(saved, dict) else {"default"}
    dropped = sorted(set(named) - kept) if len(named) > 1 else []
    if not dropped:
        return []
    return [
        Finding(
            code="templates-dropped",
            level="note",
            what="only the chat templates that training used are saved; the tokenizer also had: "
            + ", ".join(dropped),
            where="chat_template.jinja",
            count=len(dropped),
            why="with several templates, a server chooses one per request, and may use one that "
            "training never used",
        )
    ]


def _forget_origin(path: Path) -> None:
    """Drop what transformers notes about where the tokenizer was loaded from."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(name, None)
    text = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


@contextmanager
def _changed(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes for a while."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def _kept(target: Any, name: str) -> Any:
    """Put an attribute back afterwards, whoever changed it."""
    return _changed(target, **{name: getattr(target, name)})
