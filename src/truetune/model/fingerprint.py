"""Identify the base that an adapter was trained on, and compare it with another one.

input   the headers of a model's safetensors files, its config.json, its tokenizer
does    hashes bytes sampled across every tensor (all of them on request), so that a sibling model
        is recognised without reading gigabytes, and resharding or renaming files changes nothing
output  base_fingerprint.json beside an adapter; an error with both values where the base differs

What samples cannot show is a change of a few rows of a large table: the commit of a Hub model and
the full hashes, where they were asked for, do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.errors import ModelError
from truetune.model.quantise import NAMES, Quantised
from truetune.model.source import ModelFiles, read_json
from truetune.model.weights import TensorFacts, listed

FINGERPRINT = "base_fingerprint.json"
_FORMAT = 1
# 32 windows of 64 bytes: a base and its fine-tuned sibling differ in nearly every one of them, and
# a model of 300 tensors is sampled with 10,000 short reads.
_WINDOWS, _WINDOW = 32, 64
_BLOCK = 1 << 22
# What config.json holds beside the computation: names, defaults of generate(), where it was saved.
_NOT_COMPUTED = frozenset(
    """architectures auto_map bos_token_id chunk_size_feed_forward decoder_start_token_id dtype
    eos_token_id id2label is_encoder_decoder label2id output_attentions output_hidden_states
    pad_token_id prefix problem_type quantization_config return_dict sep_token_id
    initializer_range task_specific_params tokenizer_class torch_dtype transformers_version
    use_cache
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class TensorPrint:
    """One tensor: torch's name of its dtype, its shape, a hash of sampled bytes, and of all bytes
    where that was asked for ("" else); both hashes in hex."""

    dtype: str
    shape: tuple[int, ...]
    sample: str
    sha256: str = ""

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} {self.sha256[:16] or self.sample}"


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of a base model, saved with an adapter.

    Attributes:
        base: absolute path or Hub id; shown, not compared.
        revision: commit of a Hub model, None for a folder.
        tokenizer_size: one more than the largest id of the tokenizer saved with the adapter.
        tensors: by the name they have in the files.
        config: what config.json says of the computation.
        quantised: in how many bits the base was held in training, None as it is stored; decides
            how it is opened, and is not compared.
    """

    base: str
    revision: str | None
    tokenizer_size: int
    tensors: Mapping[str, TensorPrint]
    config: Mapping[str, Any]
    quantised: Quantised | None = None

    @property
    def digest(self) -> str:
        """sha256 over all tensors, in hex; the order of files does not matter."""
        lines = [
            f"{name} {tensor.dtype} {tensor.shape} {tensor.sample}"
            for name, tensor in sorted(self.tensors.items())
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def is_full(self) -> bool:
        """Whether every byte was hashed."""
        return all(tensor.sha256 for tensor in self.tensors.values())

    def as_dict(self) -> dict[str, Any]:
        """What base_fingerprint.json holds."""
        return {
            "format": _FORMAT,
            "base": self.base,
            "revision": self.revision,
            "digest": self.digest,
            "tokenizer_size": self.tokenizer_size,
            "quantised": self.quantised,
            "config": dict(self.config),
            "tensors": {
                name: [t.dtype, list(t.shape), t.sample, *([t.sha256] if t.sha256 else [])]
                for name, t in sorted(self.tensors.items())
            },
        }


def take_fingerprint(
    base: ModelFiles,
    tensors: Mapping[str, TensorFacts],
    config: Any,
    tokenizer_size: int,
    *,
    full: bool = False,
) -> Fingerprint:
    """The fingerprint of a model on disk.

    Args:
        base: its files.
        tensors: their headers.
        config: the transformers config that was read from them.
        tokenizer_size: one more than the largest id.
        full: hash every byte as well.
    """
    return Fingerprint(
        base=base.address,
        revision=base.revision,
        tokenizer_size=tokenizer_size,
        tensors={name: _print(facts, full=full) for name, facts in tensors.items()},
        config=_computation(config),
    )


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """The fingerprint beside an adapter; None if another tool made it.

    Raises:
        ModelError: the file is damaged, or of a later format.
    """
    path = folder / FINGERPRINT
    if not path.is_file():
        return None
    value = read_json(path)
    try:
        if value["format"] != _FORMAT:
            raise ValueError(f"format {value['format']!r} is unknown to this version of truetune")
        tensors = {
            str(name): TensorPrint(str(t[0]), tuple(int(n) for n in t[1]), str(t[2]), *t[3:])
            for name, t in value["tensors"].items()
        }
        return Fingerprint(
            str(value["base"]),
            value["revision"],
            int(value["tokenizer_size"]),
            tensors,
            dict(value["config"]),
            _known_bits(value.get("quantised")),
        )
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{FINGERPRINT} cannot be used: {error}",
            where=str(path),
            why="it was edited, cut off, or written by a later version of truetune",
            fix="copy it again from the source of the adapter",
            code="adapter-fingerprint-unreadable",
        ) from error


def _known_bits(value: Any) -> Quantised | None:
    if value is not None and value not in NAMES:
        raise ValueError(f"a base quantised as {value!r} is unknown to this version of truetune")
    return value


def write_fingerprint(fingerprint: Fingerprint, folder: Path) -> None:
    """Write it beside an adapter."""
    text = json.dumps(fingerprint.as_dict(), indent=1, ensure_ascii=False) + "\n"
    (folder / FINGERPRINT).write_text(text, encoding="utf-8")


def require_same_base(trained: Fingerprint, found: Fingerprint, adapter: Path) -> None:
    """Raise if the base is not the one that the adapter was trained on.

    Full hashes are compared where both have them.

    Raises:
        ModelError: another base, revision, config or tokenizer, with both values.
    """
    where = str(adapter)
    fix = (
        "load it on the base that it was trained on: set --base, or base_model_name_or_path in "
        "adapter_config.json"
    )
    if trained.tokenizer_size != found.tokenizer_size:
        raise ModelError(
            f"the tokenizer has {found.tokenizer_size:,} ids, but the adapter was trained with "
            f"{trained.tokenizer_size:,}",
            where=where,
            why="the adapter's folder holds a different tokenizer, or its own was removed and "
            "the base's is used",
            fix="restore the tokenizer that was saved with the adapter",
            code="adapter-wrong-tokenizer",
        )
    differing = _differing_tensors(trained.tensors, found.tensors)
    if differing:
        name = differing[0]
        raise ModelError(
            f"the base is not the one that the adapter was trained on: {len(differing):,} of "
            f"{len(trained.tensors.keys() | found.tensors.keys()):,} weights differ",
            where=where,
            why=f"trained on  {_named(trained)}  {trained.digest[:16]}\n"
            f"found       {_named(found)}  {found.digest[:16]}\n"
            f"{name}: {_shown(trained, name)} then, {_shown(found, name)} now"
            + (f"\nthe others: {listed(differing[1:])}" if differing[1:] else ""),
            fix=fix,
            code="adapter-wrong-base",
        )
    if trained.revision and found.revision and trained.revision != found.revision:
        raise ModelError(
            f"the base's revision is {found.revision}, but the adapter was trained on "
            f"{trained.revision}",
            where=where,
            why="the revision in adapter_config.json was changed; the sampled bytes are equal, "
            "but samples cannot reveal a change of a few embeddings",
            fix=f'set "revision": "{trained.revision}" in adapter_config.json',
            code="adapter-wrong-revision",
        )
    changed = sorted(
        name
        for name in trained.config.keys() & found.config.keys()
        if trained.config[name] != found.config[name]
    )
    if changed:
        sides = "\n".join(
            f"{name}: {trained.config[name]!r} then, {found.config[name]!r} now"
            for name in changed[:8]
        )
        raise ModelError(
            "the base's config.json describes a different computation from the one the adapter "
            "was trained with: " + listed(changed),
            where=str(found.base),
            why=sides,
            fix="use the config.json that the base had when the adapter was trained",
            code="adapter-wrong-config",
        )


def _named(fingerprint: Fingerprint) -> str:
    revision = f" at {fingerprint.revision}" if fingerprint.revision else ""
    return fingerprint.base + revision


def _shown(fingerprint: Fingerprint, name: str) -> str:
    return str(fingerprint.tensors.get(name, "absent"))


def _differing_tensors(
    trained: Mapping[str, TensorPrint], found: Mapping[str, TensorPrint]
) -> list[str]:
    """Names of weights that are not the same in both.

    A name that one side lacks is no difference where the other holds the same bytes under another
    name: a tied head is stored once or twice, depending on who saved the model.
    """
    differing = {
        name for name in trained.keys() & found.keys() if not _same(trained[name], found[name])
    }
    for names, others in (
        (trained.keys() - found.keys(), found),
        (found.keys() - trained.keys(), trained),
    ):
        own = trained if others is found else found
        for name in names:
            if not any(_same(own[name], other) for other in others.values()):
                differing.add(name)
    return sorted(differing)


def _same(one: TensorPrint, other: TensorPrint) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.sha256 and other.sha256:
        return one.sha256 == other.sha256
    return one.sample == other.sample


def _print(facts: TensorFacts, *, full: bool) -> TensorPrint:
    with facts.path.open("rb", buffering=0) as file:
        sample = _sample(file, facts)
        whole = _whole(file, facts) if full else ""
    return TensorPrint(facts.dtype, facts.shape, sample, whole)


def _sample(file: Any, facts: TensorFacts) -> str:
    """Hash of windows spread evenly from the first byte to the last; 16 hex digits."""
    size = facts.num_bytes
    hashed = hashlib.sha256()
    if size <= _WINDOWS * _WINDOW:
        starts, length = [0], size
    else:
        starts = [(size - _WINDOW) * i // (_WINDOWS - 1) for i in range(_WINDOWS)]
        length = _WINDOW
    for start in starts:
        file.seek(facts.start + start)
        hashed.update(file.read(length))
    return hashed.hexdigest()[:16]


def _whole(file: Any, facts: TensorFacts) -> str:
    hashed = hashlib.sha256()
    file.seek(facts.start)
    left = facts.num_bytes
    while left:
        block = file.read(min(left, _BLOCK))
        if not block:
            break
        hashed.update(block)
        left -= len(block)
    return hashed.hexdigest()


def _computation(config: Any) -> dict[str, Any]:
    """What a transformers config says of the forward pass, as JSON gives it back."""
    value = json.loads(json.dumps(config.to_dict(), default=str, sort_keys=True))
    return {
        name: entry
        for name, entry in value.items()
        if name not in _NOT_COMPUTED and not name.startswith("_")
    }
