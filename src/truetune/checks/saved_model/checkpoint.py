"""Gather facts about a finished model or adapter from any tool, to judge whether it would be served
as it was trained.

input   a folder: its files, tokenizer, template, generation config; weights if there are some
does    gathers plain facts
output  Checkpoint, which files.py and weights.py judge
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truetune.contract.frame import Frame
from truetune.contract.stops import STOP_FILES, listed_stop_ids, served_stops
from truetune.errors import ModelError
from truetune.findings import Finding, Level
from truetune.model.adapter_files import AdapterFacts, read_adapter
from truetune.model.dry import DryLoad, dry_load
from truetune.model.embeddings import ChatRows, TableFacts, judge_rows, read_tables
from truetune.model.inspect import ModelFacts, describe
from truetune.model.source import ModelFiles, locate, read_json
from truetune.model.start import StartVerdict, verdict
from truetune.model.tokenizer import has_tokenizer, locate_base, num_ids, open_tokenizer

# Files that trainers leave beside a model; a published base has none of them.
_TRAINED_HERE = (
    *("adapter_config.json", "trainer_state.json", "training_args.bin", "all_results.json"),
    *("train_results.json", "optimizer.pt", "trainer_log.jsonl", "manifest.json"),
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What the checks examine.

    Attributes:
        folder: of the model.
        is_adapter: weights of an adapter, on a base that lies elsewhere.
        tuned: the model was fine-tuned: files of a trainer lie beside it.
        facts: of config and tokenizer; None if there is no tokenizer.
        tokenizer: None if there is none.
        frame: probed with the stop ids that a server would take.
        served_from: the file that those stop ids come from.
        tables: embedding and head, if there are weights.
        rows: the chat tokens judged in each.
        adapter: None if it is none.
        problems: files that could not be opened.
        dry: the result of a trial load; None if there are no weights.
        unread_stops: stop ids in an adapter's own generation_config, which no loader reads.
    """

    folder: Path
    is_adapter: bool
    tuned: bool
    facts: ModelFacts | None = None
    tokenizer: Any = None
    frame: Frame | None = None
    served_from: str = ""
    tables: Mapping[str, TableFacts] = field(default_factory=dict)
    rows: Mapping[str, ChatRows] = field(default_factory=dict)
    adapter: AdapterFacts | None = None
    problems: tuple[Finding, ...] = ()
    unread_stops: tuple[int, ...] = ()
    dry: DryLoad | None = None
    own_tokenizer: bool = True

    @property
    def verdict(self) -> StartVerdict | None:
        """Base or instruct; None if there is no tokenizer."""
        return verdict(self.frame, self.rows) if self.frame else None


def gather(
    source: str, revision: str | None = None, chat_template: str | None = None
) -> Checkpoint:
    """Gather the facts of a model folder, even if parts of it are damaged.

    Raises:
        ModelError: it is not a model folder at all.
    """
    files = locate(source, revision, weights=False)
    base = locate_base(files, weights=False) if files.is_adapter else files
    problems: list[Finding] = []
    tuned = any((files.folder / name).is_file() for name in _TRAINED_HERE)
    adapter = _tried(problems, lambda: read_adapter(files, base)) if files.is_adapter else None
    if not (has_tokenizer(files.folder) or (files.is_adapter and has_tokenizer(base.folder))):
        # Raises if there is no config either: then it is no model.
        from truetune.model.architecture import causal_config

        causal_config(base)
        return Checkpoint(
            files.folder, files.is_adapter, tuned, adapter=adapter, problems=tuple(problems)
        )
    tokenizer = open_tokenizer(files)
    facts = _tried(problems, lambda: describe(source, revision))
    # Of an adapter the base's: nobody reads its own.
    stops, origin = served_stops(_stop_files(base.folder), tokenizer)
    frame = Frame.probe(tokenizer, stop_ids=stops, chat_template=chat_template)
    # Damaged weights are reported once.
    read = not any(finding.code == "model-weights-damaged" for finding in problems)
    tables = (
        _tried(problems, lambda: read_tables(base, frame.chat_ids), tuned=tuned) if read else None
    )
    rows = {
        kind: judge_rows(table, frame.chat_ids, num_ids(tokenizer))
        for kind, table in (tables or {}).items()
    }
    return Checkpoint(
        folder=files.folder,
        is_adapter=files.is_adapter,
        tuned=tuned,
        facts=facts,
        tokenizer=tokenizer,
        frame=frame,
        served_from=origin,
        tables=tables or {},
        rows=rows,
        adapter=adapter,
        problems=tuple(problems),
        unread_stops=_unread(files, stops),
        dry=_tried([], lambda: dry_load(base)) if read and tables is not None else None,
        own_tokenizer=has_tokenizer(files.folder),
    )


def _tried(problems: list[Finding], read: Callable[[], Any], *, tuned: bool = True) -> Any:
    """What was read, or None and a finding that says why it could not be."""
    try:
        return read()
    except ModelError as error:
        level = _LEVELS.get(error.code, "error")
        # A published folder without weights is a copy of the small files, for a look at them.
        if not tuned and error.code == "model-no-weights":
            level = "note"
        problems.append(dataclasses.replace(error.finding, level=level))
        return None


# A folder of small files is enough for most checks; a damaged one never is.
_LEVELS: dict[str, Level] = {"model-no-weights": "warning", "model-pickle": "warning"}


def _stop_files(folder: Path) -> Iterator[tuple[str, Any]]:
    """The files of a folder that name ends, as they are."""
    for name in STOP_FILES:
        if (folder / name).is_file():
            yield name, read_json(folder / name)


def _unread(files: ModelFiles, served: tuple[int, ...]) -> tuple[int, ...]:
    if not files.is_adapter:
        return ()
    listed = listed_stop_ids(dict(_stop_files(files.folder)).get(STOP_FILES[0])) or ()
    return tuple(i for i in listed if i not in served)
