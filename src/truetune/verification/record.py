"""The record that training leaves for verification: the last line of verify_rows.jsonl.

input   the trained model in memory as it is saved, its contract, the rows, the saved folder
does    reads what the model predicts at some positions, and what two computations of it differ by;
        writes down the tokenizer's behaviour, the settings and the hashes of the saved folder
output  Record

A row of random ids as long as the budget allows stands among the probes: rotary embeddings and
windows show at long distances, and rows may all be short.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truetune.compare import Agreement, Measured, Probe, Reading, distance, measure, read
from truetune.contract.contract import PromptContract
from truetune.errors import InputError
from truetune.model.load import LoadedModel
from truetune.model.lora import trainable_share
from truetune.run_dir import CONTRACT, DATA, RECIPE, RunDir, sha256
from truetune.system.lazy import torch
from truetune.system.quiet import quiet
from truetune.verification.rows import VERIFY_ROWS, VerifyRow, examples_of, row_as_dict

FORMAT = 1
# Written before training and never again: a verified artifact was made under them.
RUN_FILES = (RECIPE, CONTRACT, DATA)
# Multiply-adds that all readings of rows may cost, and as many again for the long probe: seconds
# on a processor. More tokens than this make no reading sharper.
_WORK, _FEWEST, _MOST = 1e12, 256, 2048
# Positions that are read, of rows and of the long probe.
_ROW_POSITIONS, _LONG_POSITIONS = 192, 64
# Tokens behind a probe in the second computation of the floor.
PADDING = 7
# A JSON file of a model folder above this is a vocabulary, and is compared by its sections.
_LARGE = 1 << 17
# What may be changed in a saved adapter: its base lies elsewhere now.
MOVABLE = {"adapter_config.json": frozenset({"base_model_name_or_path", "revision"})}

# Scripts, whitespace, digits, code, marks that combine, characters outside the first plane.
TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 17 + 25 = 42.",
    "  \u00c0 la carte: na\u00efve fa\u00e7ade, stra\u00dfe, \u0141\u00f3d\u017a, \u010de\u0161tina"
    ", cafe\u0301\n\n\t12345 67,890.12 1e-7",
    "\u0421\u044a\u0435\u0448\u044c \u0435\u0449\u0451 \u044d\u0442\u0438\u0445 "
    "\u0431\u0443\u043b\u043e\u043a; \u0393\u03b1\u03b6\u03ad\u03b5\u03c2 \u03ba\u03b1\u1f76",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3044\u308d\u306f\u306b\u307b\u3078\u3068 "
    "\u30a2\u30a4\u30a6 \ub2e4\ub78c\uc950",
    "\u0635\u0650\u0641 \u062e\u064e\u0644\u0642\u064e \u05d3\u05d2 \u05e1\u05e7\u05e8\u05df "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 "
    "\u09a8\u09ae\u09b8\u09cd\u0995\u09be\u09b0 \u12a0\u121b\u122d\u129b \u10d2\u10d0",
    'def f(x: int) -> str:\n    return f"{x!r}"  # <tag attr=\'1\'/> {"key": [null, -0.5]}\r\n',
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2211\u222b\u221a\u2260 \u00b1\u00bd "
    "\ufb01 \u200b\ufeff\u00a0end",
)


@dataclass(frozen=True)
class Record:
    """The values with which a fresh process compares its own.

    Attributes:
        rows: sha256 of the rows' lines.
        run: file of the run to its sha256.
        files: file of the artifact to its sha256.
        settings: JSON file of the artifact to what it holds; of a large one to the sha256 of each
            section.
        tokenizer: see `behaviour_of`.
        way: how the model is to be opened, so that it computes as it did here.
        machine: see `machine_of`; readings of another one differ by rounding.
        probes: what is read.
        reading: of the trained model in memory, its weights rounded as they are saved.
        floor: divergence of two computations of it, mean and largest.
        rounding: what rounding the weights changed, as an `Agreement` at clear leads; None if none
            was.
        dtype: that the weights were saved in.
    """

    rows: str
    run: dict[str, str]
    files: dict[str, str]
    settings: dict[str, Any]
    tokenizer: dict[str, Any]
    way: dict[str, Any]
    machine: dict[str, Any]
    probes: tuple[Probe, ...]
    reading: Reading
    floor: dict[str, float]
    dtype: str
    rounding: dict[str, Any] | None = None
    format: int = field(default=FORMAT)

    def as_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **plain,
            "probes": [[list(probe.ids), list(probe.positions)] for probe in self.probes],
            "reading": self.reading.as_dict(),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Record:
        """Raises ValueError, KeyError or TypeError where it is no record of this format."""
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r} is unknown")
        given = {f.name: value[f.name] for f in dataclasses.fields(cls)}
        given["probes"] = probes_from(value["probes"])
        given["reading"] = Reading.from_dict(value["reading"])
        for name in ("run", "files", "settings", "tokenizer", "way", "machine", "floor"):
            if not isinstance(given[name], dict):
                raise TypeError(f"{name} is not an object")
        return cls(**given)


def probes_from(value: Any) -> tuple[Probe, ...]:
    """Probes from their JSON form."""
    return tuple(Probe(tuple(map(int, ids)), tuple(map(int, at))) for ids, at in value)


def cut_rows(
    examples: Sequence[tuple[Sequence[int], Sequence[int]]], parameters: int, room: int = _MOST
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(ids, mask) of the examples, each cut so that several fit the budget and none is longer than
    `room`; what comes later changes nothing of what is predicted before it."""
    left = token_budget(parameters)
    longest = min(max(left // 8, 64), room)
    cut = []
    for ids, mask in examples:
        size = min(len(ids), longest, left)
        if size < 2:
            continue
        on = tuple(mask[:size])
        # Cut before its first target, every token is one.
        cut.append((tuple(ids[:size]), on if any(on[1:]) else (1,) * size))
        left -= size
    return cut


def token_budget(parameters: int) -> int:
    """Tokens that rows may cost, and the long probe again."""
    return int(min(max(_WORK / (2 * max(parameters, 1)), _FEWEST), _MOST))


def probes_of(
    rows: Sequence[VerifyRow], *, parameters: int, known_ids: Sequence[int], context: int | None
) -> tuple[Probe, ...]:
    """Where the model is read: predictions of targets, and a long row of random ids.

    Args:
        parameters: of the model.
        known_ids: ids that the tokenizer and the model have, without special ones.
        context: positions that the model was made for, None if it does not say.
    """
    # Learned positions end with the context, and every probe is read once more with padding.
    room = max((context or _MOST + PADDING) - PADDING, 2)
    cut = cut_rows(examples_of(rows), parameters, room)
    each = max(_ROW_POSITIONS // max(len(cut), 1), 1)
    probes = []
    for ids, mask in cut:
        targets = [i - 1 for i, on in enumerate(mask) if on and i]
        probes.append(Probe(ids, tuple(_some(targets, each))))
    length = min(token_budget(parameters), room)
    drawn = random.Random(FORMAT).choices(list(known_ids), k=length)
    probes.append(Probe(tuple(drawn), tuple(_some(range(length), _LONG_POSITIONS))))
    return tuple(probes)


def _some(places: Sequence[int], most: int) -> list[int]:
    """At most so many of them, evenly spread, the last among them."""
    step = max(len(places) / most, 1.0)
    return [places[round(len(places) - 1 - step * i)] for i in range(min(most, len(places)))][::-1]


def way_of(loaded: LoadedModel) -> dict[str, Any]:
    """How to open a saved model so that it computes as this one does."""
    weights = next(p for p in loaded.model.parameters() if p.is_floating_point())
    in_bf16 = not loaded.is_adapter and weights.dtype == torch.bfloat16
    compute = loaded.compute_dtype or (torch.bfloat16 if in_bf16 else torch.float32)
    return {
        "purpose": "lora" if loaded.is_adapter else "full",
        "dtype": str(compute).removeprefix("torch."),
        "bf16_weights": in_bf16,
    }


def machine_of(device: torch.device) -> dict[str, Any]:
    """What decides how a computation rounds, beside its types."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = torch.backends.cpu.get_cpu_capability()
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def behaviour_of(contract: PromptContract) -> dict[str, Any]:
    """What a tokenizer and its template do, beyond the rows: ids and texts of many scripts, the
    whole vocabulary, the special tokens, the template's source; hashes where values are long."""
    tokenizer = contract.tokenizer
    # A call that padded or cut leaves that setting in the tokenizer; this one takes it out.
    contract.tokens.encode(["a"])
    added = {
        str(token): [str(entry), entry.special, entry.lstrip, entry.rstrip, entry.single_word]
        for token, entry in sorted(getattr(tokenizer, "added_tokens_decoder", {}).items())
    }
    ids = [list(tokenizer(text, verbose=False)["input_ids"]) for text in TEXTS]
    with quiet():  # transformers warns of a cleaning of texts that it leaves out
        texts = [tokenizer.decode(row) for row in ids]
        readable = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    return {
        "ids": ids,
        "texts": _digest(texts),
        "readable": _digest(readable),
        "vocabulary": _digest(sorted(tokenizer.get_vocab().items())),
        "added": _digest(added),
        "special": {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())},
        "side": tokenizer.padding_side,
        "stop": sorted(contract.stop_ids),
    }


def template_digest(template: Any) -> str:
    """Of a chat template, or of several by their names."""
    return _digest(template)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def settings_of(folder: Path) -> dict[str, Any]:
    """What the JSON files of a model folder hold; a vocabulary by the hash of each section.

    A file that is no JSON object is left out: it does not open.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            large = path.stat().st_size > _LARGE or path.name == "tokenizer.json"
            found[path.name] = _sections(value) if large else value
    return found


def _sections(value: Mapping[str, Any], under: str = "") -> dict[str, str]:
    sections: dict[str, str] = {}
    for name, entry in value.items():
        if isinstance(entry, dict) and name == "model":
            sections |= _sections(entry, f"{name}.")
        else:
            sections[under + name] = _digest(entry)
    return sections


def take_record(
    loaded: LoadedModel,
    contract: PromptContract,
    rows: Sequence[VerifyRow],
    run: RunDir,
    saved: Path,
    name: str,
    *,
    files: Mapping[str, str],
    dtype: str,
    rounding: Agreement | None,
    context: int | None,
) -> Record:
    """Read the trained model, and the folder it was saved to.

    Args:
        loaded: with its weights as they were saved.
        saved: the folder, under whatever name.
        name: that it will have in the run.
        files: its files and their sha256.
        dtype: the type of the saved weights.
        rounding: what rounding the weights for saving changed; None if they were not rounded.
        context: see `probes_of`.
    """
    parameters = trainable_share(loaded.model)[1]
    probes = probes_of(
        rows, parameters=parameters, known_ids=_known_ids(loaded, contract), context=context
    )
    reading = read(loaded, probes)
    again = distance(reading, read(loaded, probes, reading.top, padding=PADDING))
    return Record(
        rows=rows_digest(rows),
        run={file: sha256(run.file(file)) for file in RUN_FILES if run.file(file).is_file()},
        files={f"{name}/{file}": digest for file, digest in files.items()},
        settings=settings_of(saved),
        tokenizer={
            **behaviour_of(contract),
            "template": template_digest(contract.saved_template()),
        },
        way=way_of(loaded),
        machine=machine_of(loaded.device),
        probes=probes,
        reading=reading,
        floor={"mean": again.mean, "largest": again.largest},
        dtype=dtype,
        rounding=None if rounding is None else dataclasses.asdict(rounding),
    )


def measure_rows(loaded: LoadedModel, rows: Sequence[VerifyRow]) -> Measured:
    """What a model says of the rows, each cut to the budget."""
    return measure(loaded, cut_rows(examples_of(rows), trainable_share(loaded.model)[1]))


def _known_ids(loaded: LoadedModel, contract: PromptContract) -> list[int]:
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    vocabulary = contract.tokenizer.get_vocab().values()
    special = {*contract.tokenizer.all_special_ids, *contract.stop_ids}
    known = sorted(i for i in set(vocabulary) - special if i < rows)
    return known or list(range(rows))


def rows_digest(rows: Sequence[VerifyRow]) -> str:
    """sha256 over the rows as they are kept."""
    return _digest([row_as_dict(row) for row in rows])


def write_rows(run: RunDir, rows: Sequence[VerifyRow], record: Record) -> None:
    """verify_rows.jsonl: the rows, then the record."""
    held = json.loads(json.dumps(record.as_dict(), default=str))
    last = {"record": held, "sha256": _digest(held)}
    run.replace_lines(VERIFY_ROWS, [*(row_as_dict(row) for row in rows), last])


def read_record(run: RunDir) -> Record | None:
    """The record of a run; None if there is none.

    Raises:
        InputError: it is damaged.
    """
    try:
        found = [value for value in run.lines(VERIFY_ROWS) if "record" in value]
        if not found:
            return None
        # No seal against somebody who makes it anew; a hand that slips is caught.
        if found[-1]["sha256"] != _digest(found[-1]["record"]):
            raise ValueError("its own hash is different")
        return Record.from_dict(found[-1]["record"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"the record in {VERIFY_ROWS} cannot be read: {error}",
            where=str(run.file(VERIFY_ROWS)),
            why="it was edited, cut off, or written by another version of truetune",
            fix="copy the run again",
            code="verify-rows-unreadable",
        ) from error
