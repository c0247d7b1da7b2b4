"""A finished model or adapter, from any tool: would it be served as it was trained?

input   a folder: its files, tokenizer, template, generation config; weights where there are some
does    gathers plain facts, then judges each family
output  findings
who     `truetune check MODEL`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truetune.check.markers import Markers
from truetune.check.start import ChatRows, Verdict, chat_ids, judge_rows, verdict
from truetune.contract import PromptContract
from truetune.errors import ModelError, UnfaithfulTemplate
from truetune.findings import Finding, Level
from truetune.model import ModelFacts, describe
from truetune.model.adapter_files import AdapterFacts, is_empty, read_adapter
from truetune.model.source import ModelFiles, locate, read_json
from truetune.model.tables import TableFacts, read_tables
from truetune.model.tokenizer import has_tokenizer, locate_base, num_ids, open_tokenizer

# Files that trainers leave beside a model; a published base has none of them.
_TRAINED_HERE = (
    *("adapter_config.json", "trainer_state.json", "training_args.bin", "all_results.json"),
    *("train_results.json", "optimizer.pt", "trainer_log.jsonl", "manifest.json"),
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What the families look at.

    Attributes:
        folder: of the model.
        is_adapter: weights of an adapter, on a base that lies elsewhere.
        tuned: somebody trained this: files of a trainer lie beside it.
        facts: of config and tokenizer; None where there is no tokenizer.
        tokenizer: None where there is none.
        markers: probed with the stop ids that a server would take.
        served_from: the file that those stop ids come from.
        tables: embedding and head, where there are weights.
        rows: the chat tokens judged in each.
        adapter: None where it is none.
        problems: files that could not be opened.
        unread_stops: stop ids that an adapter's own generation_config lists and nobody reads.
    """

    folder: Path
    is_adapter: bool
    tuned: bool
    facts: ModelFacts | None = None
    tokenizer: Any = None
    markers: Markers | None = None
    served_from: str = ""
    tables: Mapping[str, TableFacts] = field(default_factory=dict)
    rows: Mapping[str, ChatRows] = field(default_factory=dict)
    adapter: AdapterFacts | None = None
    problems: tuple[Finding, ...] = ()
    unread_stops: tuple[int, ...] = ()
    own_tokenizer: bool = True

    @property
    def verdict(self) -> Verdict | None:
        """Base or instruct; None where there is no tokenizer."""
        return verdict(self.markers, self.rows) if self.markers else None


def gather(
    source: str, revision: str | None = None, chat_template: str | None = None
) -> Checkpoint:
    """Facts of a model folder, whatever is wrong with it.

    Raises:
        ModelError: it is no model folder at all.
    """
    files = locate(source, revision, weights=False)
    base = locate_base(files, weights=False) if files.is_adapter else files
    problems: list[Finding] = []
    tuned = any((files.folder / name).is_file() for name in _TRAINED_HERE)
    adapter = _tried(problems, lambda: read_adapter(files, base)) if files.is_adapter else None
    if not (has_tokenizer(files.folder) or (files.is_adapter and has_tokenizer(base.folder))):
        # Raises where there is no config either: then it is no model.
        from truetune.model.architecture import causal_config

        causal_config(base)
        return Checkpoint(
            files.folder, files.is_adapter, tuned, adapter=adapter, problems=tuple(problems)
        )
    tokenizer = open_tokenizer(files)
    facts = _tried(problems, lambda: describe(source, revision))
    stops, origin = _served(base, tokenizer)
    markers = Markers.probe(tokenizer, stop_ids=stops, chat_template=chat_template)
    # Damaged weights are told once.
    read = not any(finding.code == "model-weights-damaged" for finding in problems)
    tables = (
        _tried(problems, lambda: read_tables(base, chat_ids(markers)), tuned=tuned)
        if read
        else None
    )
    rows = {
        kind: judge_rows(table, chat_ids(markers), num_ids(tokenizer))
        for kind, table in (tables or {}).items()
    }
    return Checkpoint(
        folder=files.folder,
        is_adapter=files.is_adapter,
        tuned=tuned,
        facts=facts,
        tokenizer=tokenizer,
        markers=markers,
        served_from=origin,
        tables=tables or {},
        rows=rows,
        adapter=adapter,
        problems=tuple(problems),
        unread_stops=_unread(files, stops),
        own_tokenizer=has_tokenizer(files.folder),
    )


def _tried(problems: list[Finding], read: Callable[[], Any], *, tuned: bool = True) -> Any:
    """What was read, or None and a finding that says why it could not be."""
    try:
        return read()
    except ModelError as error:
        problems.append(
            Finding(
                error.code,
                _LEVELS.get(error.code, "error") if tuned or error.code not in _LEVELS else "note",
                error.what,
                error.where,
                why=error.why,
                fix=error.fix,
            )
        )
        return None


# A folder of small files is enough for most checks; a damaged one never is.
_LEVELS: dict[str, Level] = {"model-no-weights": "warning", "model-pickle": "warning"}


def _served(base: ModelFiles, tokenizer: Any) -> tuple[tuple[int, ...], str]:
    """Stop ids of a server, and the file they come from: that of the base, for an adapter."""
    for name in ("generation_config.json", "config.json"):
        path = base.folder / name
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return (tuple(found) if isinstance(found, list) else (int(found),)), name
    eos = tokenizer.eos_token_id
    return (() if eos is None else (eos,)), "the tokenizer"


def _unread(files: ModelFiles, served: tuple[int, ...]) -> tuple[int, ...]:
    path = files.folder / "generation_config.json"
    if not files.is_adapter or not path.is_file():
        return ()
    found = read_json(path).get("eos_token_id")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    return tuple(i for i in listed if i not in served)


# ------------------------------------------------------------------ families


def files_open(found: Checkpoint) -> Iterator[Finding]:
    """Every file that a server opens is there and whole."""
    yield from found.problems
    if found.tokenizer is None:
        yield Finding(
            "tokenizer-missing",
            "error",
            "there is no tokenizer in the folder",
            str(found.folder),
            why="it was saved without one: a server finds neither vocabulary nor chat template",
            fix="tokenizer.save_pretrained(FOLDER), with the one it was trained with",
        )
    elif found.is_adapter and not found.own_tokenizer:
        yield Finding(
            "adapter-without-tokenizer",
            "note",
            "the adapter has no tokenizer of its own: the base's tokenizer and template are served",
            str(found.folder),
            fix="nothing to do if it was trained with those; else save its tokenizer beside it",
        )


def template_there(found: Checkpoint) -> Iterator[Finding]:
    """A chat template, and one that renders a plain conversation."""
    if found.tokenizer is None or found.markers is None:
        return
    if not found.markers.has_template:
        yield Finding(
            "template-missing",
            "warning" if found.tuned else "note",
            "the tokenizer has no chat template",
            str(found.folder),
            why="it was lost when the model was saved, or the model was trained on plain text; a "
            "server then refuses messages or makes up a form of its own",
            fix="copy chat_template.jinja from where it was trained, or serve plain completions",
        )
        return
    try:
        PromptContract.load(found.tokenizer).fit([_PLAIN]).encode(_PLAIN)
    except UnfaithfulTemplate as error:
        # Of a missing stop `terminator_served` tells with the ids; a model that always thinks has
        # no plain turns.
        if error.code in ("no-stop", "thinking-only"):
            return
        yield Finding(
            "template-unfaithful",
            "note" if error.code in ("prompt-differs", "target-invented") else "warning",
            f"a plain turn does not come out of the chat template as it went in: {error.what}",
            str(found.folder),
            why=error.why,
            fix=error.fix or "give another template with --chat-template",
        )


_PLAIN = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]


def terminator_served(found: Checkpoint) -> Iterator[Finding]:
    """The server stops on what the template writes after an answer."""
    markers, facts = found.markers, found.facts
    if markers is None or not markers.has_template:
        return
    decode = markers.tokens.decode
    served = ", ".join(f"{decode([i])!r} ({i})" for i in sorted(markers.served_stops)) or "nothing"
    if markers.terminator is None:
        yield Finding(
            "template-without-end",
            "error" if found.tuned else "warning",
            "the chat template writes no end token after an answer",
            str(found.folder),
            why=f"a server stops on {served}; a model trained in this template never learned it",
            fix="use a template that ends every answer with a token of the stop set",
        )
    elif markers.terminator not in markers.served_stops:
        ids = [*sorted(markers.served_stops), markers.terminator]
        judged = found.rows.values()
        learned = found.tuned or (
            any(markers.terminator in rows.trained for rows in judged)
            and not any(markers.terminator in rows.untrained for rows in judged)
        )
        where = found.served_from
        yield Finding(
            "stop-not-served",
            "error" if learned else "warning",
            f"the chat template ends answers with {decode([markers.terminator])!r} "
            f"({markers.terminator}), and a server stops on {served} only",
            str(found.folder),
            why=f"the stop set comes from {where}"
            + (" of the base: an adapter cannot change it" if found.is_adapter else ""),
            fix=f"serve with stop_token_ids={ids}"
            if found.is_adapter
            else f'"eos_token_id": {ids} in generation_config.json',
        )
    rows = facts.head_rows if facts else 2**31
    beyond = sorted(i for i in markers.served_stops if i >= rows or i < 0)
    if beyond:
        yield Finding(
            "stop-beyond-head",
            "error",
            f"the stop set holds {beyond}, and the model has {rows:,} rows",
            str(found.folder),
            why=f"{found.served_from} belongs to another model",
            fix="copy the generation_config.json that belongs to the model",
        )
    if found.unread_stops:
        yield Finding(
            "adapter-stop-unread",
            "warning",
            f"the adapter's generation_config lists stop ids {list(found.unread_stops)} that the "
            "base's does not",
            str(found.folder),
            why="peft and transformers read the generation_config of the base only",
            fix=f"serve with stop_token_ids={[*sorted(markers.served_stops), *found.unread_stops]}",
        )


def vocabulary_fits(found: Checkpoint) -> Iterator[Finding]:
    """No token of the tokenizer lies beyond the head."""
    facts = found.facts
    if facts is None or facts.spare_rows >= 0:
        return
    known = found.tokenizer.get_vocab()
    lost = sorted((i, t) for t, i in known.items() if i >= facts.head_rows)
    named = ", ".join(f"{token!r} ({i})" for i, token in lost[:4])
    needed = found.markers is not None and any(i in chat_ids(found.markers) for i, _ in lost)
    yield Finding(
        "id-beyond-head",
        "error" if needed or found.tuned else "warning",
        f"{len(lost):,} tokens of the tokenizer have no row in the model ({facts.head_rows:,} "
        f"rows): {named}",
        str(found.folder),
        len(lost),
        why="tokens were added to the tokenizer and the model was not resized, or the tokenizer is "
        "another model's",
        fix="save the tokenizer that the model was trained with, or resize the embedding",
    )


def chat_rows_trained(found: Checkpoint) -> Iterator[Finding]:
    """The rows of the tokens that the template writes were trained."""
    markers = found.markers
    if markers is None:
        return
    ids = sorted({i for rows in found.rows.values() for i in rows.untrained})
    if not ids or (found.adapter is not None and found.adapter.tables):
        return
    why = next(rows.why[ids[0]] for rows in found.rows.values() if ids[0] in rows.why)
    named = ", ".join(f"{markers.tokens.decode([i])!r} ({i})" for i in ids[:4])
    ends = markers.terminator in ids
    yield Finding(
        "rows-untrained",
        "error" if found.tuned and ends else "warning" if found.tuned else "note",
        f"the rows of {named} were never trained",
        str(found.folder),
        len(ids),
        why=f"{why}; "
        + (
            "the model cannot tell the token that ends an answer from unused ones"
            if ends
            else "the model cannot tell it from unused tokens"
        ),
        fix="train the rows of embedding and head as well, or use a template of trained tokens",
    )


def numbers_finite(found: Checkpoint) -> Iterator[Finding]:
    """No NaN, no infinity in what was read."""
    broken = [table.name for table in found.tables.values() if not table.finite]
    if found.adapter is not None and not found.adapter.finite:
        broken.append("the adapter's weights")
    if broken:
        yield Finding(
            "weights-not-finite",
            "error",
            f"{', '.join(broken)} hold NaN or infinity",
            str(found.folder),
            len(broken),
            why="the training diverged, or float16 overflowed",
            fix="take an earlier checkpoint; train in bfloat16 or float32",
        )


def adapter_learned(found: Checkpoint) -> Iterator[Finding]:
    """An adapter that changes the base it names, everywhere it says."""
    facts = found.adapter
    if facts is None:
        return
    if is_empty(facts):
        yield Finding(
            "adapter-empty",
            "error",
            "the adapter changes nothing: "
            + (
                f"{len(facts.empty):,} of its tensors have no numbers"
                if facts.empty
                else "every second matrix of its LoRA pairs is zero"
                if facts.pairs
                else "its file holds no tensor"
            ),
            str(found.folder),
            why="it was saved before training, from another model object, or by ZeRO-3 without "
            "gathering the weights",
            fix="save again from the trained model",
        )
    elif facts.pairs and facts.moved < facts.pairs:
        yield Finding(
            "adapter-partly-empty",
            "warning",
            f"{facts.pairs - facts.moved:,} of {facts.pairs:,} adapted layers changed nothing",
            str(found.folder),
            facts.pairs - facts.moved,
            why="their second matrix is still zero: no gradient reached them",
            fix="look at which layers were frozen while training",
        )
    if facts.unmatched:
        yield Finding(
            "adapter-wrong-base",
            "error",
            f"{len(facts.unmatched):,} adapted layers are not in the base, or have another shape",
            facts.unmatched[0],
            len(facts.unmatched),
            why="the base that the adapter names is another model than it was trained on, or the "
            "names were changed; loaders leave such layers out",
            fix="put the right base into base_model_name_or_path",
        )
    if facts.asked:
        yield Finding(
            "lora-targets-unmatched",
            "warning",
            f"target_modules names layers that the base does not have: {', '.join(facts.asked)}",
            str(found.folder),
            len(facts.asked),
            why="peft leaves unknown names out in silence: fewer layers were trained than asked",
            fix="train again with the names that `truetune inspect` lists",
        )
    elif facts.missing and not facts.empty:
        yield Finding(
            "adapter-incomplete",
            "warning",
            f"{len(facts.missing):,} layers that target_modules names are not in the file",
            facts.missing[0],
            len(facts.missing),
            why="the file was saved in part, or layers were excluded",
            fix="save again from the trained model",
        )


CHECKS: tuple[Callable[[Checkpoint], Iterator[Finding]], ...] = (
    files_open,
    template_there,
    terminator_served,
    vocabulary_fits,
    chat_rows_trained,
    numbers_finite,
    adapter_learned,
)
