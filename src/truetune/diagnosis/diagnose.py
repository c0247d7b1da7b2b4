"""Find the first stage between training and a server at which a model changes.

input   a run, a model or adapter folder, or a GGUF file; folders and files made from it, a server
does    runs the same rows through every stage and compares prompts (text and ids), predictions,
        greedy replies and stops with what was trained; says what was done at the first stage that
        differs
output  Diagnosis
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.contract.stops import own_stop_ids
from truetune.data.conversation import Conversation
from truetune.data.load import load
from truetune.diagnosis.alone import gguf_alone
from truetune.diagnosis.gguf_cause import compare_file, quant_of
from truetune.diagnosis.live import live
from truetune.diagnosis.measured import (
    TOKENS,
    Replies,
    Stage,
    prompts_of,
    rates,
    reading_of,
    replies_of,
    reply_cases,
    same_replies,
    served_replies,
    unopened,
)
from truetune.diagnosis.rounding import is_rounded
from truetune.diagnosis.settings import architecture, generation, vocabulary
from truetune.diagnosis.tensors import OTHER, Lookup, Same, explain
from truetune.diagnosis.trained import recorded
from truetune.errors import TruetuneError, UsageError
from truetune.evaluation.interval import FEWEST_DIFFERENT, score_difference
from truetune.exporting.gguf_ids import compare_ids, texts_of
from truetune.exporting.gguf_proof import (
    BUDGETS,
    Apart,
    Budget,
    Reference,
    apart_of,
    budget_of,
    on_prompts,
    on_stops,
    on_texts,
    reference_of,
)
from truetune.exporting.mlx import is_mlx
from truetune.findings import Finding
from truetune.model.fingerprint import read_fingerprint
from truetune.model.load import LoadedModel, load_model
from truetune.model.merge import merge_adapter
from truetune.model.quantise import dequantised
from truetune.model.source import ADAPTER_CONFIG, locate, read_json
from truetune.model.tokenizer import load_tokenizer, locate_base, num_ids
from truetune.run_dir import opened
from truetune.servers.cases import read_server
from truetune.servers.client import Client, ServerError
from truetune.servers.llama_cpp import LlamaCpp, serving
from truetune.verification.artifact import run_of
from truetune.verification.rows import read_rows

Tell = Callable[[str], None]
STAGES = ("base", "adapter", "model", "merged", "quantised", "gguf", "url")
# What a folder of a type may be apart from what was trained; see `Budget`.
_FOLDERS = {
    "float32": Budget(1e-4, 1e-3),
    "float16": Budget(5e-3, 2e-2),
    "bfloat16": Budget(5e-2, 0.1),
}
_QUANTISED = Budget(0.3, 1.2)
# A stage that is further from what was trained than this share of what training changed has lost
# some of it.
_LOST = 0.25


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """All stages in order.

    Attributes:
        source: as the user wrote it.
        stages: measured.
        rows: that they were asked.
        effect: how far training moved the predictions; None where there is no base to compare.
    """

    source: str
    stages: tuple[Stage, ...]
    rows: int
    effect: Apart | None = None

    @property
    def first(self) -> Stage | None:
        """The first stage that differs."""
        return next((stage for stage in self.stages if stage.parts), None)

    def __repr__(self) -> str:
        stages = ", ".join(map(repr, self.stages))
        return f"Diagnosis({self.source!r}, {self.rows} rows: {stages})"

    def findings(self) -> list[Finding]:
        return [finding for stage in self.stages for finding in stage.findings]

    def as_dict(self) -> dict[str, Any]:
        first = self.first
        return {
            "source": self.source,
            "parts_at": first.name if first else None,
            "rows": self.rows,
            "training_moved": asdict(self.effect) if self.effect else None,
            "stages": [
                {
                    "stage": stage.name,
                    "what": stage.what,
                    "predictions": asdict(stage.apart) if stage.apart else None,
                    **stage.numbers,
                    "note": stage.note,
                    "findings": [finding.as_dict() for finding in stage.findings],
                }
                for stage in self.stages
            ],
        }


class _Work:
    """What the stages share: the trained model's rows, predictions and replies.

    Args:
        source: a run, or a model or adapter folder.
        supervised: ids that answers of the run's rows consist of.
    """

    def __init__(
        self,
        source: str,
        base: str | None,
        rows: Sequence[Conversation],
        tell: Tell,
        supervised: frozenset[int] = frozenset(),
    ) -> None:
        self.source, self.folder, self.base = source, opened(source), base
        self.is_adapter = locate(self.folder, weights=False).is_adapter
        self.contract = PromptContract.load(load_tokenizer(self.folder))
        tell("loading what was trained")
        loaded = self._load()
        config = loaded.transformers_model.config.get_text_config(decoder=True)
        self.config = config
        context = min(int(getattr(config, "max_position_embeddings", 1024) or 1024), 1024)
        window = getattr(config, "sliding_window", None)
        if window and "gemma" not in config.model_type:
            # llama.cpp computes no windows of the others.
            context = min(context, int(window))
        self.reference: Reference = reference_of(loaded, self.contract, rows, context)
        self.cases = reply_cases(self.reference)
        self.replies: Replies = replies_of(loaded, self.contract, self.cases)
        self.supervised = supervised
        self.recorded = recorded(run_of(source), "adapter" if self.is_adapter else "model", loaded)
        self.effect: Apart | None = None
        if self.is_adapter:
            with loaded.model.disable_adapter():
                before = reading_of(loaded, self.reference)
                self.base_replies = replies_of(loaded, self.contract, self.cases)
            if before is not None:
                self.effect = apart_of(self.reference.reading, before)
        del loaded
        gc.collect()

    def _load(self) -> LoadedModel:
        return load_model(
            self.folder, base=self.base, dtype="float32", device="cpu", purpose="inference"
        )

    @functools.cached_property
    def whole(self) -> Any:
        """The trained model in float32, merged: what exports are made from."""
        if not self.is_adapter:
            return self._load().transformers_model
        return merge_adapter(self.folder, base=self.base).loaded.transformers_model

    def on_original(self) -> Any:
        """The adapter merged onto its base's unrounded weights."""
        merged = merge_adapter(self.folder, base=self.base, onto="original")
        return merged.loaded.transformers_model

    @functools.cached_property
    def unmerged(self) -> Any:
        """The model under an adapter, to tell what a merge did."""
        return load_model(
            self.below, dtype="float32", device="cpu", purpose="inference"
        ).transformers_model

    @functools.cached_property
    def below(self) -> str:
        """The folder of an adapter's base."""
        files = locate(self.folder, weights=False)
        return str(locate_base(files, weights=True, instead=self.base).folder)

    @functools.cached_property
    def rounded_base(self) -> bool:
        """Whether the adapter was trained on rounded weights: a merge may be onto either."""
        trained = read_fingerprint(Path(self.folder)) if self.is_adapter else None
        return trained is not None and trained.quantised is not None

    @functools.cached_property
    def sources(self) -> list[str]:
        """Folders whose generation_config.json an export may hold."""
        held = [self.folder, *([self.below] if self.is_adapter else [])]
        there = [f for f in held if (Path(f) / "generation_config.json").is_file()]
        return there or held[:1]

    def cutting(self, ends: Sequence[int]) -> list[int]:
        """Ids at which replies would end although they were not trained to: text, or a special
        token that is a part of replies."""
        known = num_ids(self.contract.tokenizer)
        special = {*self.contract.tokenizer.all_special_ids, *self.contract.tokens.special_ids}
        said = {i for ids in self.replies.ids for i in ids} | self.supervised
        return [
            i
            for i in ends
            if i not in self.contract.stop_ids and i < known and (i not in special or i in said)
        ]

    def again(self, name: str) -> str:
        """How a stage is made again."""
        if name == "merged" and not self.is_adapter:
            return "copy the model's folder again"
        return _AGAIN[name]

    def numbers(self, replies: Replies | None) -> dict[str, Any]:
        if replies is None:
            return {}
        found = rates(replies, self.cases)
        return {**found, "same_replies": same_replies(self.replies, replies)}


def diagnose(
    source: str,
    *,
    stages: Sequence[str] = (),
    base: str | None = None,
    merged: str | None = None,
    quantised: str | None = None,
    gguf: str | None = None,
    url: str | None = None,
    data: str | None = None,
    on_stage: Tell | None = None,
) -> Diagnosis:
    """Run the same rows through every stage that exists.

    Args:
        source: a run, a model or adapter folder, or a GGUF file.
        stages: the stages to examine; all if empty.
        base: where an adapter's base is now.
        merged, quantised: folders made from it.
        gguf: a file made from it.
        url: the address of a server that should serve it.
        data: rows to use instead of those that the run kept: a file, a folder, or a Hub dataset.
        on_stage: is called with the name of each stage.

    Raises:
        UsageError: something with that name does not exist.
        TruetuneError: the trained model itself cannot be opened.
    """
    tell = on_stage or (lambda _: None)
    _require(source, stages, merged=merged, quantised=quantised, gguf=gguf, url=url)
    if url is not None and (not stages or "url" in stages):
        # Says now that it is no address, or that nobody listens there.
        _require_answer(Client(url, seconds=20))
    if source.lower().endswith(".gguf"):
        return Diagnosis(source, (gguf_alone(Path(source), tell),), 0)
    run = run_of(source)
    kept = read_rows(run) if run else []
    if data is not None:
        known = list(load(data).conversations)
    else:
        known = [row.conversation for row in kept]
    pairs = ((ids, mask) for row in kept for ids, mask in row.examples)
    answers = frozenset(i for ids, mask in pairs for i, on in zip(ids, mask, strict=True) if on)
    work = _Work(source, base, known, tell, answers)
    found: list[Stage] = []

    def wanted(name: str) -> bool:
        return not stages or name in stages

    if work.is_adapter and wanted("base"):
        found.append(_base(work))
    own = "adapter" if work.is_adapter else "model"
    if wanted(own):
        found.append(_trained(work, own))
    for name, folder in (("merged", merged), ("quantised", quantised)):
        if folder is not None and wanted(name):
            tell(f"running {name}")
            found.append(_folder(work, name, folder))
    if gguf is not None and wanted("gguf"):
        tell("running llama.cpp")
        found.append(_gguf(work, Path(gguf)))
    if url is not None and wanted("url"):
        tell(f"running {url}")
        found.append(live(url, work.contract, work.reference, work.cases, work.replies))
    return Diagnosis(source, tuple(found), len(work.reference.cases), work.effect)


def _require(source: str, stages: Sequence[str], **made: str | None) -> None:
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        raise UsageError(
            f"unknown stage {unknown[0]!r}",
            where="--stages",
            fix=f"choose from {','.join(STAGES)}",
            code="stage-unknown",
        )
    alone = source.lower().endswith(".gguf")
    if alone and not Path(source).is_file():
        raise UsageError(
            f"there is no file {source}", fix="specify a GGUF file", code="no-such-file"
        )
    own: tuple[str, ...] = ("gguf",) if alone else ()
    if not alone and stages:
        adapter = locate(opened(source), weights=False).is_adapter
        own = ("base", "adapter") if adapter else ("model",)
    for name in stages:
        if name not in _MADE and name not in own:
            raise UsageError(
                f"there is no stage {name} of {source}",
                where="--stages",
                why="it is a GGUF file" if alone else f"its own stages are {' and '.join(own)}",
                fix=f"leave {name} out of --stages",
                code="stage-without-file",
            )
    if alone and any(path is not None for path in made.values()):
        raise UsageError(
            f"{source} is a GGUF file: nothing can be compared with it",
            why="folders, files and servers are compared with the model that they were made from",
            fix=f"truetune diagnose MODEL --gguf {source}",
            code="stage-kind",
        )
    for name, path in made.items():
        if path is None and name in stages and not (alone and name == "gguf"):
            raise UsageError(
                f"the stage {name} was asked for, but there is nothing to examine",
                where="--stages",
                fix=f"add --{name} {_MADE[name]}, or leave {name} out of --stages",
                code="stage-without-file",
            )
        if path is None or name == "url":
            continue
        if not Path(path).exists():
            raise UsageError(
                f"there is no {path}",
                where=f"--{name}",
                fix="specify what was exported",
                code="no-such-file",
            )
        if Path(path).is_dir() == (name == "gguf"):
            raise UsageError(
                f"{path} is a {'folder' if name == 'gguf' else 'file'}",
                where=f"--{name}",
                why=_kind_of(Path(path)),
                fix=f"specify a {'GGUF file' if name == 'gguf' else 'model folder'}",
                code="stage-kind",
            )
        if name in ("merged", "quantised") and is_mlx(Path(path)):
            raise UsageError(
                f"{path} is a folder for MLX, which transformers cannot load",
                where=f"--{name}",
                why="config.json describes quantised weights in MLX's way",
                fix="truetune compared it when it wrote it, see proof.json; serve it "
                f"(mlx_lm.server --model {path}) and compare the server: truetune diagnose "
                f"{source} --url http://127.0.0.1:8080",
                code="stage-kind",
            )


def _require_answer(client: Client) -> None:
    try:
        client.get("/v1/models")
    except ServerError as error:
        # Any answer is one; what it is worth, the stage finds out.
        if error.code == "server-unreachable":
            raise UsageError(
                f"no server answers at {client.url}",
                where="--url",
                why=error.what.partition(": ")[2],
                fix="start it (truetune serve RUN), or correct the address",
                code="server-unreachable",
            ) from error


# What each stage is made of, as the options name it.
_MADE = {"merged": "DIR", "quantised": "DIR", "gguf": "FILE", "url": "URL"}


def _kind_of(path: Path) -> str:
    if path.is_file():
        return "a GGUF file is compared with --gguf" if path.suffix.lower() == ".gguf" else ""
    files = sorted(path.glob("*.gguf"))
    if files:
        return f"it contains {files[0].name}"
    return "a model folder is compared with --merged or --quantised"


def _base(work: _Work) -> Stage:
    findings = []
    if work.effect is not None and work.effect.relative < 1e-6:
        findings.append(
            Finding(
                "adapter-without-effect",
                "warning",
                "the adapter does not change any prediction of its base",
                where=work.folder,
                why="it was never trained, or its weights are zero",
                fix="read the report of the run: truetune report RUN",
            )
        )
    return Stage(
        "base",
        "without the adapter",
        work.effect,
        work.base_replies,
        tuple(findings),
        numbers=work.numbers(work.base_replies),
    )


def _trained(work: _Work, name: str) -> Stage:
    """Compare what was trained with what the run recorded."""
    return Stage(
        name,
        work.folder,
        None,
        work.replies,
        tuple(work.recorded),
        note="the other stages are compared with it",
        numbers=work.numbers(work.replies),
    )


def _folder(work: _Work, name: str, folder: str) -> Stage:
    """Compare a model folder that was made from what was trained."""
    try:
        tokenizer = load_tokenizer(folder)
        contract = PromptContract.load(tokenizer)
        loaded = load_model(
            folder, dtype="float32", device="cpu", purpose="inference", tokenizer=tokenizer
        )
    except TruetuneError as error:
        return unopened(name, folder, error)
    findings = _on_contract(work, name, folder, contract)
    model = loaded.transformers_model
    settings = architecture(work.config, model.config)
    settings += _shorter(work, model.config)
    shown = _weights_cause(work, model, loaded.base_dtype, name)
    cause = "; ".join([*([shown] if shown else []), *settings])
    reading = replies = apart = None
    over = ""
    try:
        reading = reading_of(loaded, work.reference)
        # Ids beyond the embedding cannot be run at all.
        replies = replies_of(loaded, contract, work.cases) if reading is not None else None
    except TruetuneError as error:
        over = f"the rows cannot be run through it: {error.what}"
    if reading is not None:
        apart = apart_of(work.reference.reading, reading)
        budget = _FOLDERS.get(loaded.base_dtype, _FOLDERS["bfloat16"])
        if name == "quantised":
            budget = _QUANTISED
        elif not cause:
            budget = _as_held(budget)
        over = over or _over(apart, budget, work.effect)
    elif not over:
        rows = model.get_input_embeddings().weight.shape[0]
        over = f"the model has {rows:,} embeddings, fewer than its tokenizer has ids"
        cause = "; ".join(["the embedding was truncated", *settings])
    if over or cause:
        what = over or (
            "its weights or settings are not the trained model's, although its predictions on "
            "these rows are near"
        )
        cause = cause or _unexplained(name, work.whole.config, model.config)
        findings.append(_parted(name, folder, what, cause, work.again(name)))
    findings += _on_replies(work, name, folder, replies, findings)
    return Stage(name, folder, apart, replies, tuple(findings), numbers=work.numbers(replies))


def _as_held(budget: Budget) -> Budget:
    """The budget of an export whose tensors are the model's: they may have been rounded to bfloat16
    before they were written in a type of more digits."""
    half = BUDGETS["bf16"]
    return Budget(max(budget.usual, half.usual), max(budget.most, half.most))


def _shorter(work: _Work, config: Any) -> list[str]:
    """A context into which the rows do not fit."""
    own, its = (
        int(getattr(c.get_text_config(decoder=True), "max_position_embeddings", 0) or 0)
        for c in (work.config, config)
    )
    needed = max((len(case.ids) for case in work.reference.cases), default=0) + TOKENS
    if not its or its >= own or its >= needed:
        return []
    return [f"config.json: max_position_embeddings is {its:,} instead of {own:,}"]


def _unexplained(name: str, own: Any, its: Any) -> str:
    one, other = (config.get_text_config(decoder=True) for config in (own, its))
    for setting in ("model_type", "tie_word_embeddings"):
        before, now = getattr(one, setting, None), getattr(other, setting, None)
        if before != now:
            return f"config.json: {setting} is {now!r} instead of {before!r}"
    if name == "quantised":
        return "the type has too few bits for this model"
    return "no tensor or setting explains it"


_AGAIN = {
    "merged": "merge it again: truetune export RUN --merge -o DIR",
    "quantised": "quantise the merged model again from its original weights, or use more bits",
    "gguf": "write it again: truetune export RUN --to gguf -o DIR",
}


def _parted(name: str, where: str, what: str, why: str, fix: str) -> Finding:
    return Finding("stage-parts", "error", f"{name}: {what}", where=where, why=why, fix=fix)


def _over(apart: Apart, budget: Budget, effect: Apart | None) -> str:
    """Why predictions differ too much, or "" if they do not."""
    allowed = budget.most
    if effect is not None:
        allowed = min(allowed, max(budget.usual, _LOST * effect.relative))
    if apart.relative <= allowed:
        return ""
    return (
        f"predictions differ by {apart.relative:.2g} of the logits' spread, but {allowed:.2g} is "
        f"allowed ({apart.mean:.2g} nats per token; {100 * apart.greedy:.0f} % of the likeliest "
        "tokens are equal)"
    )


def _weights_cause(work: _Work, model: Any, dtype: str, name: str) -> str:
    """Say what was done to the weights of a folder besides rounding; "" if nothing was."""
    if name == "quantised":
        return _rounded_cause(work, model)

    def same(_: str, value: Any, kind: str, wanted: Any) -> bool:
        return is_rounded(value, wanted, kind, merged=work.is_adapter)

    kind = _TYPES.get(dtype, "F32")
    shown = _explained(work, work.whole, model, kind, same)
    if shown and work.rounded_base and not _explained(work, work.on_original(), model, kind, same):
        # A choice that an export offers; what it costs shows in the predictions.
        return ""
    if shown and work.is_adapter and read_json(Path(work.folder) / ADAPTER_CONFIG).get("use_dora"):
        shown += "; the adapter is a DoRA adapter: a merge without its magnitudes looks like this"
    return shown


_TYPES = {"float16": "F16", "bfloat16": "BF16"}
# In units of a matrix' norm: two bits cost 0.4 of it, four 0.1, eight 0.01.
_FEWEST_BITS = 0.6


def _rounded_cause(work: _Work, model: Any) -> str:
    """Say what was done to weights besides rounding; "" if nothing was, or if transformers cannot
    restore plain weights."""
    try:
        plain = dequantised(model, "")
    except TruetuneError:
        return ""
    return _explained(work, work.whole, plain, "", factor=_FEWEST_BITS / OTHER)


def _explained(
    work: _Work, whole: Any, model: Any, kind: str, same: Same | None = None, factor: float = 1.0
) -> str:
    """See `explain`; the weights of models."""

    def lookup(values: Any) -> Lookup:
        return lambda tensor: (values[tensor].float(), kind) if tensor in values else None

    def before(tensor: str) -> Any:
        return lookup(work.unmerged.state_dict())(tensor)

    return explain(
        ((key, value.float()) for key, value in whole.state_dict().items()),
        lookup(model.state_dict()),
        before if work.is_adapter else None,
        factor=factor,
        same=same,
        rows=num_ids(work.contract.tokenizer),
    )


def _on_contract(work: _Work, name: str, folder: str, contract: PromptContract) -> list[Finding]:
    """Compare prompts, ids of texts and stop tokens of a folder."""
    findings = []
    wrong = prompts_of(contract, work.reference.cases)
    if wrong:
        case, said = wrong[0]
        template = contract.chat_template != work.contract.chat_template
        findings.append(
            _parted(
                name,
                case.where,
                f"{len(wrong)} of {len(work.reference.cases)} prompts differ from those that were "
                "trained",
                (
                    "the chat template is different"
                    if template
                    else "; ".join(vocabulary(work.contract, contract))
                    or "the tokenizer is different"
                )
                + f"\ntrained: {case.text[-160:]!r}\nhere:    {said[-160:]!r}",
                _TOKENIZER_AGAIN,
            )
        )
    else:
        texts = texts_of(work.contract)
        own, its = work.contract.tokens.encode(texts), contract.tokens.encode(texts)
        if own != its:
            number = sum(a != b for a, b in zip(own, its, strict=True))
            findings.append(
                _parted(
                    name,
                    folder,
                    f"{number} of {len(texts)} texts get different ids",
                    "; ".join(vocabulary(work.contract, contract))
                    or "the tokenizer is different, or lacks tokens",
                    _TOKENIZER_AGAIN,
                )
            )
        elif words := vocabulary(work.contract, contract):
            findings.append(
                _parted(
                    name,
                    f"{folder}/tokenizer.json",
                    words[0],
                    "the file was edited, or belongs to another model",
                    _TOKENIZER_AGAIN,
                )
            )
    return findings + _on_generation(work, name, folder, contract)


_TOKENIZER_AGAIN = "restore the tokenizer files that were saved with the model"


def _on_generation(work: _Work, name: str, folder: str, contract: PromptContract) -> list[Finding]:
    """Compare the stop tokens and sampling settings of a folder."""
    findings = []
    file = f"{folder}/generation_config.json"
    served = own_stop_ids(folder, None, contract.tokenizer)
    missing = [i for i in work.contract.stop_ids if i not in served]
    if missing:
        findings.append(
            _parted(
                name,
                file,
                f"replies do not end on {work.contract.tokens.named(missing)}",
                f"its stop tokens are {_ids(served)}, but those of training are "
                f"{_ids(work.contract.stop_ids)}"
                + ("; the base has the same" if _same_stops(work, served) else ""),
                _GENERATION_AGAIN,
            )
        )
    if more := work.cutting(served):
        findings.append(
            _parted(
                name,
                file,
                f"replies end on {work.contract.tokens.named(more)}, which is not a stop token of "
                "training",
                f"its stop tokens are {_ids(served)}, but those of training are "
                f"{_ids(work.contract.stop_ids)}",
                _GENERATION_AGAIN,
            )
        )
    if drawn := generation(folder, work.sources):
        findings.append(
            Finding(
                "generation-settings-differ",
                "warning",
                f"{name}: servers that read generation_config.json make other replies: "
                + "; ".join(drawn[:6]),
                where=file,
                count=len(drawn),
                why="the file was edited after the export, or is another model's",
                fix="restore the generation_config.json that was saved with the model, unless you "
                "chose these settings",
            )
        )
    return findings


_GENERATION_AGAIN = "restore the generation_config.json that was saved with the model"


def _ids(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids)) or "none"


def _same_stops(work: _Work, served: Sequence[int]) -> bool:
    if not work.is_adapter:
        return False
    return set(served) == set(own_stop_ids(work.below, None, work.contract.tokenizer))


def _on_replies(
    work: _Work, name: str, where: str, replies: Replies | None, found: Sequence[Finding]
) -> list[Finding]:
    """Report an error if replies stop less often than they should and nothing else explains it."""
    if replies is None or any(f.level == "error" for f in found):
        return []
    pairs = list(zip(work.replies.stopped, replies.stopped, strict=True))
    counts = [sum(p == q for q in pairs) for p in
              ((True, True), (True, False), (False, True), (False, False))]  # fmt: skip
    both, lost, won, neither = counts
    if (
        lost + won < FEWEST_DIFFERENT
        or not score_difference(both, lost, won, neither).excludes_zero()
    ):
        return []
    return [
        _parted(
            name,
            where,
            f"{lost} of {both + lost} replies that ended by themselves no longer end",
            "the stop tokens or sampling settings of this stage are different",
            _AGAIN.get(name, "compare its settings with those of the run"),
        )
    ]


def _gguf(work: _Work, path: Path) -> Stage:
    """Compare a GGUF file, as llama.cpp serves it."""
    findings: list[Finding] = []
    quant = "q4_0"
    apart = replies = None
    try:
        with serving(path) as server:
            quant = quant_of(str(server.props().get("model_ftype", "")))
            findings += on_texts(compare_ids(server, work.contract, texts_of(work.contract)))
            _, found = on_prompts(server, work.contract, work.reference.cases)
            findings += found
            asked = work.reference.probes[0].ids
            ends = [i for i in work.contract.stop_ids if server.ends_on(asked, i)]
            findings += on_stops(work.contract, ends)
            with contextlib.suppress(TruetuneError):
                apart, replies = _predictions(work, server)
    except TruetuneError as error:
        return unopened("gguf", str(path), error)
    compared = compare_file(
        path, work.whole, work.contract, (lambda: work.unmerged) if work.is_adapter else None
    )
    budget = budget_of(quant, work.config)
    if not compared.wrong and not compared.unread:
        budget = _as_held(budget)
    over = "" if apart is None else _over(apart, budget, work.effect)
    if apart is None:
        over = "llama.cpp returned no predictions for the rows' ids"
    cause = "; ".join([*compared.wrong, *compared.other][:4])
    if over:
        findings.append(_parted("gguf", str(path), over, "", _AGAIN["gguf"]))
    if any(f.level == "error" for f in findings):
        findings = [_because(f, cause) if f.level == "error" else f for f in findings]
        if over and not cause and not compared.unread and quant.startswith("q"):
            # What the type costs can be more than the model bears, although nothing is damaged.
            findings[-1] = replace(findings[-1], why=_FEW_BITS, fix=_MORE_BITS)
    elif compared.wrong:
        what = (
            "its tensors, settings or tokens are not the model's, although its predictions on "
            "these rows are near"
        )
        findings.append(
            _parted("gguf", str(path), what, "; ".join(compared.wrong[:4]), _AGAIN["gguf"])
        )
    if more := work.cutting(compared.ends):
        findings.append(
            _parted(
                "gguf",
                str(path),
                f"replies end on {work.contract.tokens.named(more)}, which is not a stop token of "
                "training",
                f"the file names {_ids(compared.ends)} as ends; those of training are "
                f"{_ids(work.contract.stop_ids)}",
                _AGAIN["gguf"],
            )
        )
    findings += _on_replies(work, "gguf", str(path), replies, findings)
    return Stage(
        "gguf",
        str(path),
        apart,
        replies,
        tuple(findings),
        note=compared.unread,
        numbers=work.numbers(replies),
    )


_FEW_BITS = "every tensor is the model's after rounding: the type has too few bits for this model"
_MORE_BITS = "use more bits: truetune export RUN --to gguf --quant q8_0 -o DIR"


def _predictions(work: _Work, server: LlamaCpp) -> tuple[Apart, Replies]:
    wanted = work.reference.reading
    read = read_server(server, work.reference.probes, wanted.top)
    return apart_of(wanted, read), served_replies(server, work.contract, work.cases)


def _because(finding: Finding, cause: str) -> Finding:
    why = "\n".join(text for text in (cause, finding.why) if text)
    return replace(finding, why=why, fix=_AGAIN["gguf"])
