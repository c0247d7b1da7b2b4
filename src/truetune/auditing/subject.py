"""The subject of an audit: a trainer, or batches with their tokenizer, as one value.

input   a transformers or TRL Trainer; or anything that yields batches
does    finds loaders, tokenizer, model and the stop tokens that will be saved, without changing
        them
output  Subject
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from types import SimpleNamespace
from typing import Any

from truetune.contract.stops import listed_stop_ids, own_stop_ids
from truetune.errors import UsageError


@dataclass(frozen=True, eq=False)
class Subject:
    """What is audited.

    Attributes:
        train: yields the training batches.
        evaluation: names to what yields evaluation batches.
        tokenizer: a transformers tokenizer.
        model: with its adapter; None if there is none.
        served: ids on which the saved model's server ends an answer.
        said: ids that the tokenizer alone would add; used if nothing else specifies them.
        rows: the dataset with all of its columns, by row number; None if there is none.
        trainer: the trainer; None for plain batches.
        name: of the training dataset in findings.
    """

    train: Any
    evaluation: Mapping[str, Any]
    tokenizer: Any
    model: Any
    served: tuple[int, ...]
    said: tuple[int, ...]
    rows: Any
    trainer: Any
    name: str

    @property
    def args(self) -> Any:
        """The trainer's arguments; an empty value if there is no trainer."""
        return getattr(self.trainer, "args", None) or SimpleNamespace()

    @property
    def origin(self) -> Callable[[int], int] | None:
        """The original number of row i of a filtered or shuffled dataset; None if no row moved."""
        index = getattr(self.rows, "_indices", None)
        if index is None:
            return None
        numbers = index.column(0).to_pylist()
        return lambda i: int(numbers[i])

    @property
    def is_seq2seq(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))


def is_trainer(source: Any) -> bool:
    """Whether it is a trainer like that of transformers."""
    return callable(getattr(source, "get_train_dataloader", None))


def touched_by_reading(source: Any) -> list[Any]:
    """The objects whose state reading may change, before they are used."""
    if not is_trainer(source):
        return [source, *_parts(source)]
    trainer = source
    accelerator = getattr(trainer, "accelerator", None)
    found = [
        trainer,
        trainer.args,
        getattr(trainer, "state", None),
        getattr(trainer, "control", None),
        getattr(trainer, "data_collator", None),
        getattr(trainer, "train_dataset", None),
        getattr(trainer, "eval_dataset", None),
        accelerator,
        getattr(accelerator, "gradient_state", None),
    ]
    return [item for item in found if item is not None]


def _parts(loader: Any) -> list[Any]:
    names = ("dataset", "sampler", "batch_sampler", "collate_fn", "generator")
    found = [getattr(loader, name, None) for name in names]
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return [item for item in [*found, inner] if item is not None]


def parts_of_loader(loader: Any) -> list[Any]:
    """A loader and the objects through which it reads: reading changes their counters and
    generators."""
    return [loader, *_parts(loader)]


def subject_of_trainer(trainer: Any, tokenizer: Any, model: Any, generation_config: Any) -> Subject:
    """The subject of a Trainer.

    Raises:
        UsageError: there is no tokenizer, or no training dataset.
    """
    own = _tokenizer_of(getattr(trainer, "processing_class", None))
    tokenizer = tokenizer or own or _tokenizer_of(getattr(trainer, "data_collator", None))
    if tokenizer is None:
        raise UsageError(
            "the trainer has no tokenizer",
            why="neither its processing_class nor its data collator has one",
            fix="pass a tokenizer: truetune.audit(trainer, tokenizer)",
            code="audit-no-tokenizer",
        )
    if getattr(trainer, "train_dataset", None) is None:
        raise UsageError(
            "the trainer has no train_dataset",
            fix="pass train_dataset to the trainer",
            code="audit-no-rows",
        )
    model = model or getattr(trainer, "model", None)
    if generation_config is not None:
        served, said = _strictly(generation_config)
    else:
        served, said = _after_alignment(model, own, tokenizer)
    train = trainer.get_train_dataloader()
    evaluation = {}
    held_out = getattr(trainer, "eval_dataset", None)
    if isinstance(held_out, Mapping) and not hasattr(held_out, "features"):
        evaluation = {f"eval_dataset[{k!r}]": trainer.get_eval_dataloader(k) for k in held_out}
    elif held_out is not None:
        evaluation = {"eval_dataset": trainer.get_eval_dataloader()}
    return Subject(
        train,
        evaluation,
        tokenizer,
        model,
        served,
        said,
        trainer.train_dataset,
        trainer,
        "train_dataset",
    )


def subject_of_batches(
    batches: Any, tokenizer: Any, model: Any, generation_config: Any, evaluation: Any
) -> Subject:
    """The subject of a DataLoader or of batches.

    Raises:
        UsageError: no tokenizer was given, or `batches` cannot be iterated.
    """
    if isinstance(batches, str | PathLike):
        raise UsageError(
            f"{str(batches)!r} is a string, not a trainer or batches",
            why="an audit reads the batches of a trainer; a data file is checked together with a "
            "model",
            fix=f"use truetune check MODEL {batches}, or truetune.check(model, {str(batches)!r}); "
            f"to "
            "audit, pass the trainer or its DataLoader",
            code="audit-subject",
        )
    if isinstance(batches, Mapping) or hasattr(batches, "input_ids"):
        raise UsageError(
            f"{type(batches).__name__} is one batch, not an iterable of batches",
            fix="pass a list: truetune.audit([batch], tokenizer)",
            code="audit-subject",
        )
    if tokenizer is None:
        raise UsageError(
            "the ids of batches cannot be decoded without their tokenizer",
            fix="pass their tokenizer: truetune.audit(dataloader, tokenizer)",
            code="audit-no-tokenizer",
        )
    if not hasattr(batches, "__iter__"):
        raise UsageError(
            f"{type(batches).__name__} is neither a trainer nor an iterable of batches",
            fix="pass a transformers or TRL Trainer, or a DataLoader",
            code="audit-subject",
        )
    found = _tokenizer_of(tokenizer)
    if found is None and not hasattr(tokenizer, "eos_token_id"):
        swapped = _tokenizer_of(model) is not None
        raise UsageError(
            f"the second argument is {_article(tokenizer)}, not a tokenizer",
            why="tokenizer and model are swapped" if swapped else "",
            fix="use this order: truetune.audit(batches, tokenizer, model)",
            code="audit-no-tokenizer",
        )
    tokenizer = found or tokenizer
    eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    if generation_config is not None:
        served, said = _strictly(generation_config)
    else:
        served, said = _own_eos(model) or _folder_eos(tokenizer), eos
    dataset = getattr(batches, "dataset", None)
    return Subject(
        batches,
        {"evaluation": evaluation} if evaluation is not None else {},
        tokenizer,
        model,
        served,
        said,
        dataset,
        None,
        "dataset",
    )


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


def _tokenizer_of(holder: Any) -> Any:
    """The tokenizer itself, of a processor, or of a collator."""
    for candidate in (holder, getattr(holder, "tokenizer", None)):
        if hasattr(candidate, "convert_ids_to_tokens") and hasattr(candidate, "special_tokens_map"):
            return candidate
    return None


def _own_eos(model: Any) -> tuple[int, ...]:
    configs = (getattr(model, name, None) for name in ("generation_config", "config"))
    return next((ids for config in configs if (ids := listed_stop_ids(config))), ())


def _folder_eos(tokenizer: Any) -> tuple[int, ...]:
    name = str(getattr(tokenizer, "name_or_path", "") or "") or None
    return own_stop_ids(name, None, tokenizer, local_only=True)


def _strictly(generation_config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return only the stop ids of the given generation config."""
    return listed_stop_ids(generation_config) or (), ()


def _after_alignment(
    model: Any, own: Any, tokenizer: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(stop ids that the trainer will save, ids that only the tokenizer says).

    `train()` aligns the configs with the trainer's tokenizer; the same is done here on copies.
    """
    eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    if own is None or model is None or not hasattr(model, "config"):
        return _own_eos(model) or eos, eos
    try:
        from transformers.trainer_utils import align_special_tokens
    except ImportError:
        return _own_eos(model) or eos, eos
    copied = SimpleNamespace(
        config=copy.deepcopy(model.config),
        generation_config=copy.deepcopy(getattr(model, "generation_config", None)),
    )
    with quiet("transformers.trainer_utils"):
        align_special_tokens(copied, own)
    return _own_eos(copied) or eos, ()


@contextmanager
def quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
