"""A model folder that was made from what was trained: one stage of a diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.contract.stops import own_stop_ids
from truetune.diagnosis.measured import (
    TOKENS,
    Replies,
    Stage,
    prompts_of,
    reading_of,
    replies_of,
    unopened,
)
from truetune.diagnosis.rounding import (
    EIGHT_BIT_SHARE,
    FOUR_BIT_SHARE,
    is_in_blocks,
    is_rounded,
    sums,
)
from truetune.diagnosis.settings import architecture, generation, vocabulary
from truetune.diagnosis.tensors import OTHER, Same, explain
from truetune.diagnosis.work import AGAIN, Work, parted
from truetune.errors import TruetuneError
from truetune.evaluation.interval import FEWEST_DIFFERENT, score_difference
from truetune.exporting.gguf_ids import texts_of
from truetune.exporting.gguf_proof import (
    BUDGETS,
    Apart,
    Budget,
    apart_of,
)
from truetune.findings import Finding
from truetune.model.load import load_model
from truetune.model.quantise import (
    plain_weights,
    scale_blocks,
    stored_bits,
    stored_quantisation,
)
from truetune.model.source import ADAPTER_CONFIG, locate, read_json
from truetune.model.tokenizer import load_tokenizer, num_ids
from truetune.model.weights import read_headers, weight_files
from truetune.system.lazy import torch
from truetune.system.quiet import quiet

# What a folder of a type may be apart from what was trained; see `Budget`.
_FOLDERS = {
    "float32": Budget(1e-4, 1e-3),
    "float16": Budget(5e-3, 2e-2),
    "bfloat16": Budget(5e-2, 0.1),
}


# The same of quantised folders, by the bits that their config states; docs/serving.md has what
# healthy ones cost.
_QUANTISED = {8: Budget(4e-2, 0.12)}
_FEWER_BITS = Budget(0.3, 1.2)
# What rounding may move a matrix, in units of its norm, by method and bits: eight bits cost 0.01 of
# it, NF4's small blocks 0.1, larger groups 0.15, a whole row in four bits 0.2 to 0.4, two bits 0.4.
_MOVED = {("bitsandbytes", 4): 0.25}
_MOVED_BY_BITS = {8: 0.06, 4: 0.5}
_MOVED_MOST = 0.6
# What it may move a row where levels are not the nearest (GPTQ, AWQ): a row that is not the model's
# moves by 1 or more.
_ROW_MOVED = {8: 0.3, 4: 0.8}
_ROW_MOVED_MOST = 0.9
# How far from 1 the scale of a whole matrix may be: rounding is to both sides.
_SCALED = {8: 0.02, 4: 0.08}
_SCALED_MOST = 0.4


def quantised_budget(config: Any) -> Budget:
    """How far a quantised folder may be from what it was made from."""
    return _QUANTISED.get(stored_bits(config) or 0, _FEWER_BITS)


def _may_be(config: Any) -> tuple[float, float, float]:
    """How far a healthy matrix may move, its scale, and any of its rows."""
    method, bits = stored_quantisation(config) or "", stored_bits(config) or 0
    most = _MOVED.get((method, bits), _MOVED_BY_BITS.get(bits, _MOVED_MOST))
    return most, _SCALED.get(bits, _SCALED_MOST), _ROW_MOVED.get(bits, _ROW_MOVED_MOST)


# A stage that is further from what was trained than this share of what training changed has lost
# some of it.
_LOST = 0.25


def folder_stage(work: Work, name: str, folder: str) -> Stage:
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
    reading = replies = apart = None
    over = ""
    try:
        reading = reading_of(loaded, work.reference)
        # Ids beyond the embedding cannot be run at all.
        replies = replies_of(loaded, contract, work.cases) if reading is not None else None
    except TruetuneError as error:
        over = f"the rows cannot be run through it: {error.what}"
    # Quantised weights are restored in place: after they were run.
    shown = (
        _rounded_cause(work, model, folder, loaded.base_dtype)
        if name == "quantised"
        else _weights_cause(work, model, loaded.base_dtype)
    )
    cause = "; ".join([*([shown] if shown else []), *settings])
    if reading is not None:
        apart = apart_of(work.reference.reading, reading)
        budget = _FOLDERS.get(loaded.base_dtype, _FOLDERS["bfloat16"])
        if name == "quantised":
            budget = quantised_budget(model.config)
        elif not cause:
            budget = as_held(budget)
        over = over or too_far(apart, budget, work.effect)
    elif not over:
        rows = model.get_input_embeddings().weight.shape[0]
        over = f"the model has {rows:,} embeddings, fewer than its tokenizer has ids"
        cause = "; ".join(["the embedding was truncated", *settings])
    if over or cause:
        what = over or (
            "its weights or settings are not the trained model's, although its predictions on "
            "these rows are close"
        )
        cause = cause or _unexplained(name, work.whole.config, model.config, alike=shown == "")
        findings.append(parted(name, folder, what, cause, work.again(name)))
    findings += on_replies(work, name, folder, replies, findings)
    return Stage(
        name,
        folder,
        apart,
        replies,
        tuple(findings),
        note=UNCOMPARED if shown is None else "",
        numbers=work.numbers(replies),
    )


UNCOMPARED = "its tensors cannot be compared one by one with those of the trained model"


def as_held(budget: Budget) -> Budget:
    """The budget of an export whose tensors are the model's: they may have been rounded to bfloat16
    before they were written in a type of more digits."""
    half = BUDGETS["bf16"]
    return Budget(max(budget.usual, half.usual), max(budget.most, half.most))


def _shorter(work: Work, config: Any) -> list[str]:
    """A context into which the rows do not fit."""
    own, its = (
        int(getattr(c.get_text_config(decoder=True), "max_position_embeddings", 0) or 0)
        for c in (work.config, config)
    )
    needed = max((len(case.ids) for case in work.reference.cases), default=0) + TOKENS
    if not its or its >= own or its >= needed:
        return []
    return [f"config.json: max_position_embeddings is {its:,} instead of {own:,}"]


def _unexplained(name: str, own: Any, its: Any, *, alike: bool) -> str:
    """The cause where neither tensors nor settings show one; `alike`: tensors were compared."""
    one, other = (config.get_text_config(decoder=True) for config in (own, its))
    for setting in ("model_type", "tie_word_embeddings"):
        before, now = getattr(one, setting, None), getattr(other, setting, None)
        if before != now:
            return f"config.json: {setting} is {now!r} instead of {before!r}"
    if name == "quantised":
        few = "the type has too few bits for this model"
        return few if alike else f"{few}, or the weights are damaged: {UNCOMPARED}"
    return "no tensor or setting explains it"


def too_far(apart: Apart, budget: Budget, effect: Apart | None) -> str:
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


def _weights_cause(work: Work, model: Any, dtype: str) -> str:
    """Say what was done to the weights of a folder besides rounding; "" if nothing was."""

    def same(_: str, value: Any, kind: str, wanted: Any) -> bool:
        return is_rounded(value, wanted, kind, merged=work.is_adapter)

    kind = _TYPES.get(dtype, "F32")
    values = model.state_dict()
    shown = _explained(work, values, lambda _: kind, same)
    if shown and work.is_adapter and read_json(Path(work.folder) / ADAPTER_CONFIG).get("use_dora"):
        shown += "; the adapter is a DoRA adapter: a merge without its magnitudes looks like this"
    return shown


_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _rounded_cause(work: Work, model: Any, folder: str, dtype: str) -> str | None:
    """Say what was done to quantised weights besides rounding; "" if nothing was, None if they
    cannot be restored or compared one by one."""
    method = stored_quantisation(model.config)
    most, scaled, row = _may_be(model.config)
    share = FOUR_BIT_SHARE if stored_bits(model.config) == 4 else EIGHT_BIT_SHARE
    blocks = scale_blocks(model)
    plain = _plain(model, folder, dtype)

    def same(name: str, value: Any, kind: str, wanted: Any) -> bool:
        if kind:
            return is_rounded(value, wanted, kind, merged=False) or (
                _is_merged(work, name, wanted) and is_rounded(value, wanted, kind, merged=True)
            )
        found = sums(value, wanted)
        if not wanted.any():
            return not value.any()
        if not (found.error <= most and abs(found.scale - 1) <= scaled):
            return False
        if name in blocks:
            return is_in_blocks(value, wanted, blocks[name], share)
        return float(found.rows.max()) <= row

    with quiet():
        values = plain_weights(model)
    if values is None or (method != "bitsandbytes" and _rescaled(work.whole, values)):
        return None
    return _explained(work, values, lambda name: plain.get(name, ""), same, most)


def _plain(model: Any, folder: str, dtype: str) -> dict[str, str]:
    """The types of the tensors of a quantised folder that are not quantised, by name."""
    stored = read_headers(weight_files(locate(folder, weights=True)))
    found = {name: _TYPES[facts.dtype] for name, facts in stored.items() if facts.dtype in _TYPES}
    if stored_quantisation(model.config) in ("bitsandbytes", "torchao"):
        # Tensors may have another name in the files; these two mark each that they quantise.
        for name, value in model.state_dict(keep_vars=True).items():
            whole = value.dtype in (torch.float32, torch.bfloat16, torch.float16)
            if name not in stored and whole and not hasattr(value, "qdata"):
                found[name] = _TYPES.get(dtype, "F32")
    return found


def _is_merged(work: Work, name: str, wanted: Any) -> bool:
    """Whether an adapter was added to a tensor, which costs more than one rounding."""
    before = work.unmerged.state_dict().get(name) if work.is_adapter else None
    return before is not None and not torch.equal(before.float(), wanted)


# Norms that follow what was done to the columns of a matrix correlate with it so much or more; by
# chance, 32 columns correlate less.
_FOLLOWS = -0.7


def _rescaled(whole: Any, values: Any) -> bool:
    """Whether scales of channels were moved from a norm into the columns of a matrix, as AWQ and
    SmoothQuant do: matrices are then not comparable one by one."""
    pairs = [
        (value.float(), values[name].float())
        for name, value in whole.state_dict().items()
        if value.is_floating_point() and name in values and value.shape == values[name].shape
    ]
    columns = [_columns(value, found) for value, found in pairs if value.ndim == 2]
    for value, found in pairs:
        if value.ndim != 1 or torch.equal(value, found):
            continue
        # Some architectures add 1 to the weight of a norm.
        for added in (0.0, 1.0):
            ratio = (found + added) / (value + added)
            if any(_follows(ratio, scale) for scale in columns if scale.shape == ratio.shape):
                return True
    return False


def _columns(value: Any, found: Any) -> Any:
    """By which factor each column of a matrix was multiplied."""
    return (value * found).sum(dim=0) / value.square().sum(dim=0)


def _follows(ratio: Any, scale: Any) -> bool:
    known = (ratio > 0) & (scale > 0) & torch.isfinite(ratio) & torch.isfinite(scale)
    if int(known.sum()) < len(ratio) / 2:
        return False
    both = torch.stack([ratio[known], scale[known]]).double().log()
    return float(torch.corrcoef(both)[0, 1]) < _FOLLOWS


def _explained(
    work: Work, values: Any, kind: Callable[[str], str], same: Same, other: float = OTHER
) -> str:
    """See `explain`; the weights of models. `values`: those found, by name."""

    def found(tensor: str) -> Any:
        return (values[tensor].float(), kind(tensor)) if tensor in values else None

    def before(tensor: str) -> Any:
        own = work.unmerged.state_dict()
        return (own[tensor].float(), "") if tensor in own else None

    def against(whole: Any) -> str:
        return explain(
            ((key, value.float()) for key, value in whole.state_dict().items()),
            found,
            before if work.is_adapter else None,
            other=other,
            same=same,
            rows=num_ids(work.contract.tokenizer),
        )

    shown = against(work.whole)
    # Onto rounded or original weights is a choice that an export offers; what it costs shows in the
    # predictions.
    return "" if shown and work.rounded_base and not against(work.on_original()) else shown


def _on_contract(work: Work, name: str, folder: str, contract: PromptContract) -> list[Finding]:
    """Compare prompts, ids of texts and stop tokens of a folder."""
    findings = []
    wrong = prompts_of(contract, work.reference.cases)
    if wrong:
        case, said = wrong[0]
        template = contract.chat_template != work.contract.chat_template
        findings.append(
            parted(
                name,
                case.where,
                f"{len(wrong)} of {len(work.reference.cases)} prompts differ from the trained ones",
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
                parted(
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
                parted(
                    name,
                    f"{folder}/tokenizer.json",
                    words[0],
                    "the file was edited, or belongs to another model",
                    _TOKENIZER_AGAIN,
                )
            )
    return findings + _on_generation(work, name, folder, contract)


_TOKENIZER_AGAIN = "restore the tokenizer files that were saved with the model"


def _on_generation(work: Work, name: str, folder: str, contract: PromptContract) -> list[Finding]:
    """Compare the stop tokens and sampling settings of a folder."""
    findings = []
    file = f"{folder}/generation_config.json"
    served = own_stop_ids(folder, None, contract.tokenizer)
    missing = [i for i in work.contract.stop_ids if i not in served]
    if missing:
        findings.append(
            parted(
                name,
                file,
                f"replies do not end on {work.contract.tokens.named(missing)}",
                f"its stop tokens are {shown_ids(served)}, but training used "
                f"{shown_ids(work.contract.stop_ids)}"
                + ("; the base has the same stop tokens" if _same_stops(work, served) else ""),
                _GENERATION_AGAIN,
            )
        )
    if more := work.cutting(served):
        findings.append(
            parted(
                name,
                file,
                f"replies end on {work.contract.tokens.named(more)}, which is not a stop token of "
                "training",
                f"its stop tokens are {shown_ids(served)}, but training used "
                f"{shown_ids(work.contract.stop_ids)}",
                _GENERATION_AGAIN,
            )
        )
    if drawn := generation(folder, work.sources):
        findings.append(
            Finding(
                "generation-settings-differ",
                "warning",
                f"{name}: servers that read generation_config.json give different replies: "
                + "; ".join(drawn[:6]),
                where=file,
                count=len(drawn),
                why="the file was edited after the export, or belongs to another model",
                fix="restore the generation_config.json that was saved with the model, unless you "
                "chose these settings",
            )
        )
    return findings


_GENERATION_AGAIN = "restore the generation_config.json that was saved with the model"


def shown_ids(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids)) or "none"


def _same_stops(work: Work, served: Sequence[int]) -> bool:
    if not work.is_adapter:
        return False
    return set(served) == set(own_stop_ids(work.below, None, work.contract.tokenizer))


def on_replies(
    work: Work, name: str, where: str, replies: Replies | None, found: Sequence[Finding]
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
        parted(
            name,
            where,
            f"{lost} of {both + lost} replies that ended by themselves no longer end",
            "the stop tokens or sampling settings of this stage are different",
            AGAIN.get(name, "compare its settings with those of the run"),
        )
    ]
