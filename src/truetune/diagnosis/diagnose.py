"""Find the first stage between training and a server at which a model changes.

input   a run, a model or adapter folder, or a GGUF file; folders and files made from it, a server
does    runs the same rows through every stage and compares prompts (text and ids), predictions,
        greedy replies and stops with what was trained; says what was done at the first stage that
        differs
output  Diagnosis
"""

from __future__ import annotations

import contextlib
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
from truetune.diagnosis.gguf_cause import quant_of, why_differs
from truetune.diagnosis.live import live
from truetune.diagnosis.measured import (
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
from truetune.diagnosis.tensors import OTHER, Lookup, explain
from truetune.diagnosis.trained import recorded
from truetune.errors import TruetuneError, UsageError
from truetune.evaluation.interval import FEWEST_DIFFERENT, score_difference
from truetune.exporting.gguf_ids import compare_ids, texts_of
from truetune.exporting.gguf_proof import (
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
from truetune.findings import Finding
from truetune.model.load import LoadedModel, load_model
from truetune.model.merge import merge_adapter
from truetune.model.quantise import dequantised
from truetune.model.source import ADAPTER_CONFIG, locate, read_json
from truetune.model.tokenizer import load_tokenizer
from truetune.run_dir import opened
from truetune.servers.cases import read_server
from truetune.servers.client import Client
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


@dataclass(frozen=True)
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
    """

    def __init__(
        self, source: str, base: str | None, rows: Sequence[Conversation], tell: Tell
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

    def merged(self) -> tuple[Any, Any]:
        """The merged model in float32, and its base if there is one, to find a cause."""
        if not self.is_adapter:
            return self._load().transformers_model, None
        merged = merge_adapter(self.folder, base=self.base)
        base = load_model(merged.loaded.base, dtype="float32", device="cpu", purpose="inference")
        return merged.loaded.transformers_model, base.transformers_model

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
    _require(source, stages, merged=merged, quantised=quantised, gguf=gguf)
    if url is not None:
        Client(url)  # says now that it is no address
    if source.lower().endswith(".gguf"):
        return Diagnosis(source, (gguf_alone(Path(source), tell),), 0)
    run = run_of(source)
    if data is not None:
        known = list(load(data).conversations)
    else:
        known = [row.conversation for row in read_rows(run)] if run else []
    work = _Work(source, base, known, tell)
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
    if source.lower().endswith(".gguf") and not Path(source).is_file():
        raise UsageError(
            f"there is no file {source}", fix="specify a GGUF file", code="no-such-file"
        )
    for name, path in made.items():
        if path is not None and not Path(path).exists():
            raise UsageError(
                f"there is no {path}",
                where=f"--{name}",
                fix="specify what was exported",
                code="no-such-file",
            )


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
    reading = reading_of(loaded, work.reference)
    apart = replies = None
    if reading is None:
        rows = loaded.transformers_model.get_input_embeddings().weight.shape[0]
        findings.append(
            _parted(
                name,
                folder,
                f"the model has {rows:,} embeddings, fewer than its tokenizer has ids",
                "the embedding was truncated",
                _AGAIN[name],
            )
        )
    else:
        apart = apart_of(work.reference.reading, reading)
        budget = _FOLDERS.get(loaded.base_dtype, _FOLDERS["bfloat16"])
        if name == "quantised":
            budget = _QUANTISED
        replies = replies_of(loaded, contract, work.cases)
        if over := _over(apart, budget, work.effect):
            cause = _folder_cause(work, loaded.transformers_model, loaded.base_dtype, name)
            findings.append(_parted(name, folder, over, cause, _AGAIN[name]))
        elif name == "quantised" and (cause := _rounded_cause(work, loaded.transformers_model)):
            # So few bits are allowed so much that damage hides behind it.
            what = "its weights are not the model's weights after rounding"
            findings.append(_parted(name, folder, what, cause, _AGAIN[name]))
    findings += _on_replies(work, name, folder, replies, findings)
    return Stage(name, folder, apart, replies, tuple(findings), numbers=work.numbers(replies))


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


def _folder_cause(work: _Work, model: Any, dtype: str, name: str) -> str:
    """Say what was done to the weights of a folder."""
    if name == "quantised":
        return _rounded_cause(work, model) or "the type has too few bits for this model"
    whole, base = work.merged()
    shown = _explained(whole, base, model, _TYPES.get(dtype, "F32"))
    settings = _settings(whole.config, model.config)
    if shown and work.is_adapter and read_json(Path(work.folder) / ADAPTER_CONFIG).get("use_dora"):
        shown += "; the adapter is a DoRA adapter: a merge without its magnitudes looks like this"
    return "; ".join([*([shown] if shown else []), *settings]) or "no tensor or setting explains it"


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
    return _explained(*work.merged(), plain, "", _FEWEST_BITS / OTHER)


def _explained(whole: Any, base: Any, model: Any, kind: str, factor: float = 1.0) -> str:
    """See `explain`; the weights of models."""

    def lookup(values: Any) -> Lookup:
        return lambda tensor: (values[tensor].float(), kind) if tensor in values else None

    expected = ((key, value.float()) for key, value in whole.state_dict().items())
    before = lookup(base.state_dict()) if base is not None else None
    return explain(expected, lookup(model.state_dict()), before, factor=factor)


# Settings that change what is computed.
_COMPUTED = (
    *("rope_parameters", "rms_norm_eps", "hidden_act", "hidden_activation", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "sliding_window", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    *("tie_word_embeddings", "attention_bias"),
)


def _settings(one: Any, other: Any) -> list[str]:
    a, b = one.get_text_config(decoder=True), other.get_text_config(decoder=True)
    return [
        f"config.json: {name} is {getattr(b, name, None)!r:.80} instead of "
        f"{getattr(a, name, None)!r:.80}"
        for name in _COMPUTED
        if getattr(a, name, None) != getattr(b, name, None)
    ]


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
                ("the chat template is different" if template else "the tokenizer is different")
                + f"\ntrained: {case.text[-160:]!r}\nhere:    {said[-160:]!r}",
                "restore the tokenizer files that were saved with the model",
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
                    "the tokenizer is different, or lacks tokens",
                    "restore the tokenizer files that were saved with the model",
                )
            )
    served = own_stop_ids(folder, None, contract.tokenizer)
    missing = [i for i in work.contract.stop_ids if i not in served]
    if missing:
        findings.append(
            _parted(
                name,
                f"{folder}/generation_config.json",
                f"replies do not end on {work.contract.tokens.named(missing)}",
                "generation_config.json is the base's: its stop tokens are not those of training",
                "restore the generation_config.json that was saved with the model",
            )
        )
    return findings


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
    budget = budget_of(quant, work.config)
    over = "" if apart is None else _over(apart, budget, work.effect)
    if apart is None:
        over = "llama.cpp returned no predictions for the rows' ids"
    if over:
        findings.append(_parted("gguf", str(path), over, "", _AGAIN["gguf"]))
    if any(f.level == "error" for f in findings):
        whole, base = work.merged()
        cause = "; ".join(why_differs(path, whole, work.contract, base)[:4])
        findings = [_because(f, cause) if f.level == "error" else f for f in findings]
    findings += _on_replies(work, "gguf", str(path), replies, findings)
    return Stage("gguf", str(path), apart, replies, tuple(findings), numbers=work.numbers(replies))


def _predictions(work: _Work, server: LlamaCpp) -> tuple[Apart, Replies]:
    wanted = work.reference.reading
    read = read_server(server, work.reference.probes, wanted.top)
    return apart_of(wanted, read), served_replies(server, work.contract, work.cases)


def _because(finding: Finding, cause: str) -> Finding:
    why = "\n".join(text for text in (cause, finding.why) if text)
    return replace(finding, why=why, fix=_AGAIN["gguf"])
