"""Tokenizers, opened the way a server opens them: through AutoTokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from truetune.errors import ModelError
from truetune.model.source import (
    ADAPTER_CONFIG,
    ModelFiles,
    first_line,
    locate,
    read_json,
    refuse_pointer,
)
from truetune.model.trial import require_harmless

# Without any of these AutoTokenizer builds an empty tokenizer from the class alone, silently.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "qwen.tiktoken",
    "tiktoken.model",
)


def load_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of a model or adapter; no weights are read.

    Raises:
        ModelError: no model there, or no tokenizer in it.
    """
    return open_tokenizer(locate(source, revision, weights=False))


def open_tokenizer(files: ModelFiles) -> Any:
    """The tokenizer in some files; an adapter without one has its base's.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if has_tokenizer(files.folder):
        return _open(files)
    if files.is_adapter:
        return open_tokenizer(locate_base(files, weights=False))
    raise ModelError(
        "the model folder has no tokenizer",
        where=str(files.folder),
        why=f"none of {', '.join(_VOCABULARIES[:4])} is in it",
        fix="copy tokenizer.json and tokenizer_config.json from the original model",
        code="model-no-tokenizer",
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def _open(files: ModelFiles) -> Any:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (files.folder / name).is_file():
            read_json(files.folder / name)
    for name in _VOCABULARIES:
        refuse_pointer(files.folder / name)
    require_harmless(files.folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False)
    except PermissionError:
        raise
    # The tokenizers library raises bare Exception on a damaged file.
    except Exception as error:
        message = first_line(error)
        remote = "trust_remote_code" in str(error)
        raise ModelError(
            f"the tokenizer cannot be opened: {message}",
            where=str(files.folder),
            why="it needs Python code from its own repository, which is not run"
            if remote
            else "a tokenizer file is damaged, or its library is not installed",
            fix="choose a model whose tokenizer is built into transformers"
            if remote
            else "copy the tokenizer files again from the source of the model",
            code="model-remote-code" if remote else "model-tokenizer-unreadable",
        ) from error
    if not len(tokenizer):
        raise ModelError(
            "the tokenizer is empty",
            where=str(files.folder),
            fix="copy the tokenizer files again from the source of the model",
            code="model-tokenizer-unreadable",
        )
    return tokenizer


def num_ids(tokenizer: Any) -> int:
    """One more than the largest id: what an embedding must have rows for."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def locate_base(
    adapter: ModelFiles, *, weights: bool, instead: str | Path | None = None
) -> ModelFiles:
    """The base model that an adapter's config names.

    Args:
        weights: also fetch the weights of a Hub model.
        instead: where the base is now, if not where the config says.

    Raises:
        ModelError: it names none, it is not there, or is itself an adapter.
    """
    path = adapter.folder / ADAPTER_CONFIG
    config = read_json(path)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if instead is not None:
        name = str(instead)
        revision = None if Path(name).expanduser().is_dir() else revision
    fix = f"write the base's folder or Hub id as base_model_name_or_path in {path}"
    if not name:
        raise ModelError(
            "the adapter does not say which base model it belongs to",
            where=str(path),
            fix=fix,
            code="adapter-no-base",
        )
    try:
        base = locate(name, revision, weights=weights)
    except ModelError as error:
        raise ModelError(
            f"the adapter's base model was not found: {name}",
            where=str(path),
            why=error.why or error.what,
            fix=fix,
            code="adapter-no-base",
        ) from error
    if base.is_adapter:
        raise ModelError(
            f"the adapter's base is itself an adapter: {name}",
            where=str(path),
            fix="merge that adapter into its base first, and use the merged model",
            code="adapter-no-base",
        )
    return base
