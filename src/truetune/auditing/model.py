"""Check a trainer's model: what is trained, in which dtype, and whether the data needs more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from truetune.auditing.read import IGNORED, Reading
from truetune.auditing.subject import Subject
from truetune.contract.tokens import Tokens
from truetune.findings import Finding, rows_finding, share
from truetune.model.embeddings import judge_rows, table_facts
from truetune.model.tokenizer import num_ids
from truetune.recipe.rates import SMALL, USUAL_RATES
from truetune.system.lazy import torch

# Tokens whose rows are looked at.
_LOOKED_AT = 64


def model_findings(subject: Subject, reading: Reading) -> Iterator[Finding]:
    """All checks of the model; none without one."""
    model = subject.model
    if model is None or not hasattr(model, "named_parameters"):
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        yield _nothing_trainable(model)
        return
    yield from _virtual_tokens(subject, reading)
    yield from _new_tokens(subject, reading)
    yield from _untrained_rows(subject, reading)
    yield from _lora_targets(model)
    yield from _lora_scale(model)
    yield from _dropout(model)
    yield from _types(subject, trained)
    yield from _learning_rate(subject, model)
    yield from _weight_decay(subject)
    yield from _optimizer(subject, trained)


def head_rows(model: Any) -> int | None:
    """Number of input embeddings; None if unknown (no model, or it is sharded)."""
    weight = _table(_embedding(model, "get_input_embeddings"))
    return int(weight.shape[0]) if weight is not None and weight.ndim == 2 else None


def _embedding(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _table(module: Any) -> Any:
    """The (V, D) weight of an embedding or head; None if it cannot be read."""
    weight = getattr(module, "weight", None)
    if weight is None or getattr(weight, "ndim", 0) != 2 or weight.numel() == 0:
        return None
    return weight


def _nothing_trainable(model: Any) -> Finding:
    configs = getattr(model, "peft_config", None) or {}
    frozen = any(getattr(c, "inference_mode", False) for c in configs.values())
    return Finding(
        code="nothing-trainable",
        level="error",
        what="no parameter of the model is trained",
        where="trainer.model",
        why="the adapter was created from a saved config (inference_mode is true) and its weights "
        "were not loaded: get_peft_model does not load them"
        if frozen
        else "all parameters have requires_grad False",
        fix="load it with PeftModel.from_pretrained(base, folder, is_trainable=True)"
        if frozen
        else "make parameters trainable: use a LoraConfig, or call requires_grad_(True)",
    )


# ------------------------------------------------------------------ soft prompts


def virtual_tokens(model: Any) -> int:
    """Embeddings that a soft prompt (prompt tuning, prefix tuning, p-tuning) puts before each
    row; 0 if there is none."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return 0
    active = getattr(model, "active_adapters", None)
    # On a model of transformers that holds an adapter itself, it is a method.
    names = active if isinstance(active, Sequence) and active else list(configs)
    return sum(
        int(getattr(configs[name], "num_virtual_tokens", 0) or 0)
        for name in names
        if name in configs and getattr(configs[name], "is_prompt_learning", False)
    )


def _virtual_tokens(subject: Subject, reading: Reading) -> Iterator[Finding]:
    """Virtual tokens use part of the context, and no length limit counts them."""
    number = virtual_tokens(subject.model)
    if not number:
        return
    limit = getattr(subject.args, "max_length", None)
    config = getattr(subject.model, "config", None)
    context = int(getattr(config, "max_position_embeddings", None) or 0)
    lengths = [int((row.real != 0).sum()) for row in reading.rows]
    beyond = [i for i, n in enumerate(lengths) if context and n + number > context]
    if beyond:
        yield rows_finding(
            [row.name for row in reading.rows],
            beyond,
            code="virtual-tokens-overflow",
            level="error",
            what=f"{share(len(beyond), len(lengths))}, with the {number:,} virtual tokens before "
            f"them, exceed the model's context of {context:,} tokens",
            why="a length limit counts only the tokens of the row, but a soft prompt precedes them",
            fix=f"set max_length to {context - number} at most",
        )
    yield Finding(
        code="soft-prompt",
        level="note",
        what=f"{number:,} virtual tokens of a soft prompt precede each row: the longest row of "
        f"{max(lengths, default=0):,} tokens becomes {max(lengths, default=0) + number:,}"
        + (f", and max_length={limit:,} means {limit + number:,}" if limit else ""),
        where="trainer.model",
        why="only these embeddings are trained; they are useless with another base, and the base "
        "itself is unchanged",
        fix="serve it with PeftModel.from_pretrained on this base; it cannot be merged, and "
        "servers with LoRA support do not accept it",
    )


# ------------------------------------------------------------------ rows of tokens


def new_token_ids(tokenizer: Any) -> list[int]:
    """Ids that were added since the tokenizer was loaded; [] if unknown."""
    added = set(getattr(tokenizer, "added_tokens_decoder", {}) or {})
    made = getattr(tokenizer, "init_kwargs", None) or {}
    loaded = made.get("added_tokens_decoder")
    if isinstance(loaded, Mapping):
        return sorted(added - {int(i) for i in loaded})
    # A tokenizer that was never saved knows only the special tokens with which it was created.
    listed = getattr(tokenizer, "extra_special_tokens", None) or []
    born = {
        str(t)
        for name in ("extra_special_tokens", "additional_special_tokens")
        for t in made.get(name) or []
    }
    since = [t for t in listed if str(t) not in born] if isinstance(listed, list) else []
    return sorted(i for t in since if (i := tokenizer.convert_tokens_to_ids(str(t))) in added)


def _new_tokens(subject: Subject, reading: Reading) -> Iterator[Finding]:
    """Added tokens that occur in the rows have embeddings that can be trained."""
    new = new_token_ids(subject.tokenizer)
    used, names = _rows_with(reading, new)
    frozen = [i for i in new if i in used and _frozen_sides(subject.model, i)]
    if not frozen:
        return
    rows = [name for name, ids in names if ids & set(frozen)]
    yield rows_finding(
        rows,
        range(len(rows)),
        code="new-token-frozen",
        level="error",
        what=f"{len(frozen)} token{'s' if len(frozen) > 1 else ''} added to the tokenizer cannot "
        f"be learned: {Tokens(subject.tokenizer).named(frozen, 4)}",
        why=f"their vectors in {' and '.join(_frozen_sides(subject.model, frozen[0]))} are frozen "
        "at their initial values; the adapter does not save them either",
        fix=_train_rows_fix(subject.model),
    )


def _untrained_rows(subject: Subject, reading: Reading) -> Iterator[Finding]:
    """Special tokens that are targets have distinct embeddings: one that equals those of unused
    tokens was never trained, and if it is frozen, it never will be."""
    model, tokens = subject.model, Tokens(subject.tokenizer)
    targets: set[int] = set()
    for row in reading.rows:
        targets.update(np.unique(row.labels[row.labels != IGNORED]).tolist())
    candidates = sorted(targets & tokens.special_ids)[:_LOOKED_AT]
    candidates = [i for i in candidates if _frozen_sides(model, i)]
    weight = _table(_embedding(model, "get_output_embeddings"))
    if not candidates or weight is None or weight.is_meta or not weight.is_floating_point():
        return
    table = table_facts("lm_head", weight.detach(), weight.shape, candidates)
    judged = judge_rows(table, candidates, num_ids(subject.tokenizer))
    bad = list(judged.untrained)
    if not bad:
        return
    rows = [name for name, ids in _rows_with(reading, bad)[1] if ids]
    yield rows_finding(
        rows,
        range(len(rows)),
        code="token-row-untrained",
        level="error",
        what=f"{tokens.named(bad, 4)} must be learned, but the head cannot distinguish "
        f"{'it' if len(bad) == 1 else 'them'} from other tokens",
        why=f"its output embedding was never trained ({judged.why[bad[0]]}) and is frozen: the "
        "model will write one of the tokens that share it instead",
        fix=_train_rows_fix(model) + "; or use a template whose tokens the base model knows",
    )


def _rows_with(
    reading: Reading, wanted: Sequence[int]
) -> tuple[set[int], list[tuple[str, set[int]]]]:
    """(which of the ids occur, [(row, those in it)])."""
    if not wanted:
        return set(), []
    found: list[tuple[str, set[int]]] = []
    for row in reading.rows:
        inside = row.ids[row.real != 0]
        hits = set(inside[np.isin(inside, wanted)].tolist())
        if hits:
            found.append((row.name, hits))
    return set().union(*(hits for _, hits in found)) if found else set(), found


def _frozen_sides(model: Any, token: int) -> list[str]:
    """Of 'the embedding' and 'the head', those whose row of this token cannot move."""
    entry = _embedding(model, "get_input_embeddings")
    exit_ = _embedding(model, "get_output_embeddings")
    moves_in, moves_out = _moves(entry, token), _moves(exit_, token)
    if entry is not None and exit_ is not None and _tied(entry, exit_):
        moves_in = moves_out = moves_in or moves_out
    sides = []
    if entry is not None and not moves_in:
        sides.append("the embedding")
    if exit_ is not None and not moves_out:
        sides.append("the head")
    return sides


def _tied(entry: Any, exit_: Any) -> bool:
    a, b = _table(_base(entry)), _table(_base(exit_))
    return a is not None and b is not None and a.data_ptr() == b.data_ptr() != 0


def _base(module: Any) -> Any:
    for name in ("original_module", "base_layer"):
        inner = getattr(module, name, None)
        if inner is not None:
            return _base(inner)
    return module


def _moves(module: Any, token: int) -> bool:
    """Whether training can change what this module does with a token."""
    if module is None:
        return False
    only: set[int] = set()
    for inner in module.modules():
        indices = getattr(inner, "token_indices", None)
        if isinstance(indices, Mapping):
            only.update(int(i) for listed in indices.values() for i in listed)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not ("trainable_tokens" in name and token not in only):
            return True
    return token in only and any(
        p.requires_grad for n, p in module.named_parameters() if "trainable_tokens" in n
    )


def _train_rows_fix(model: Any) -> str:
    """peft settings that train the rows on the installed versions, tied or not."""
    if virtual_tokens(model):
        return (
            "a soft prompt does not train embeddings: use LoraConfig with modules_to_save, or "
            "add no tokens"
        )
    entry = _embedding(model, "get_input_embeddings")
    exit_ = _embedding(model, "get_output_embeddings")
    if entry is not None and exit_ is not None and _tied(entry, exit_):
        return 'use LoraConfig(..., modules_to_save=["embed_tokens"], ensure_weight_tying=True)'
    return 'use LoraConfig(..., modules_to_save=["embed_tokens", "lm_head"])'


# ------------------------------------------------------------------ adapters


def _lora_targets(model: Any) -> Iterator[Finding]:
    """Every name in target_modules matches a layer."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    paths = [path for path, _ in base.named_modules()]
    for config in configs.values():
        names = getattr(config, "target_modules", None)
        names = set(names) if isinstance(names, set | list | tuple) else set()
        names |= set(getattr(config, "modules_to_save", None) or ())
        counts = {n: sum(p == n or p.endswith(f".{n}") for p in paths) for n in sorted(names)}
        missing = [name for name, count in counts.items() if not count]
        if missing:
            linear = sorted(
                {p.rpartition(".")[2] for p, m in base.named_modules() if _is_linear(m)}
                - {"base_layer", "default", "lm_head"}
            )
            yield Finding(
                code="lora-targets-unmatched",
                level="warning",
                what=f"no layer is named {' or '.join(missing)}; layers matched: "
                + (", ".join(f"{n} {c:,}" for n, c in counts.items() if c) or "none"),
                where="LoraConfig",
                count=len(missing),
                why=f"{type(base).__name__} names its linear layers {', '.join(linear)}; peft "
                "ignores names that it does not find",
                fix='use target_modules="all-linear", or the names above',
            )


def _lora_scale(model: Any) -> Iterator[Finding]:
    """What an adapter computes is multiplied by something other than 0."""
    silent: set[str] = set()
    speaking: set[str] = set()
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if not isinstance(scaling, Mapping) or not hasattr(module, "lora_A"):
            continue
        active = getattr(module, "active_adapters", None)
        for name in active if isinstance(active, Sequence) and active else scaling:
            if isinstance(scaling.get(name), int | float):
                (speaking if scaling[name] else silent).add(str(name))
    if not silent:
        return
    yield Finding(
        code="lora-scale-zero",
        level="error",
        what=f"the adapter {', '.join(map(repr, sorted(silent)))} is multiplied by 0"
        + (" in some layers" if silent & speaking else ": it changes nothing and learns nothing"),
        where="LoraConfig.lora_alpha",
        why="lora_alpha is 0, and LoRA scales its product by lora_alpha / r: the gradients are "
        "also 0",
        fix="set lora_alpha between r and 2 r (32 for r=16)",
    )


# Larger values are probably a misplaced decimal point; recipes use 0 to 0.2, and 0 to 0.3.
_MOST_DROPOUT, _MOST_DECAY = 0.5, 1.0


def _dropout(model: Any) -> Iterator[Finding]:
    """Dropout keeps more than half of the activations."""
    found: dict[float, str] = {}
    for path, module in model.named_modules():
        rate = getattr(module, "p", None) if isinstance(module, torch.nn.Dropout) else None
        rate = rate if rate is not None else getattr(module, "attention_dropout", None)
        if isinstance(rate, float) and rate > _MOST_DROPOUT:
            found.setdefault(rate, path)
    if found:
        rate = max(found)
        yield Finding(
            code="dropout-unusual",
            level="warning",
            what=f"a dropout of {rate:g} sets {rate:.0%} of its inputs to 0",
            where=found[rate],
            why="the share to drop was confused with the share to keep, or the decimal point is "
            "wrong: the gradients are mostly noise",
            fix="set dropout between 0 and 0.1 (lora_dropout=0.05)",
        )


def _is_linear(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return "Linear" in type(module).__name__ or (
        weight is not None and getattr(weight, "ndim", 0) == 2 and hasattr(module, "lora_A")
    )


# ------------------------------------------------------------------ types and rates


def _types(subject: Subject, trained: Sequence[Any]) -> Iterator[Finding]:
    halves = [p for p in trained if p.dtype == torch.float16]
    if halves:
        yield Finding(
            code="trained-float16",
            level="error",
            what=f"{len(halves):,} of {len(trained):,} trained parameters are float16",
            where="trainer.model",
            count=len(halves),
            why="gradients below 6e-8 underflow and updates overflow; loss scaling cannot unscale "
            "float16 gradients",
            fix="load the model with dtype=torch.float32 (or bfloat16 for frozen weights) and let "
            "fp16=True choose the compute dtype",
        )
    rate = _rate(subject)
    coarse = [p for p in trained if p.dtype == torch.bfloat16 and p.ndim > 1]
    if rate is None or rate <= 0 or not coarse or not _is_adam(subject):
        return
    lost = _rounded_away(coarse, rate)
    if lost > 0.5:
        yield Finding(
            code="update-rounded-away",
            level="warning" if lost > 0.9 else "note",
            what=f"a step of {rate:g} is lost to rounding on {lost:.0%} of the bfloat16 weights",
            where="trainer.model",
            why="Adam changes a weight by about the learning rate, which is below half a unit in "
            "the last place for most of them",
            fix="keep the weights in float32 with bf16=True as the compute dtype, or raise the "
            "learning rate",
        )


def _rounded_away(parameters: Sequence[Any], rate: float) -> float:
    """Share of bfloat16 weights (8 significant bits) that a change of `rate` leaves as they are,
    over at most 200,000 of them, evenly."""
    with torch.no_grad():
        shares = []
        for parameter in parameters[:: max(1, len(parameters) // 20)][:20]:
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // 10_000)].float().abs()
            half = torch.exp2(torch.floor(torch.log2(sample.clamp(min=1e-30))) - 8)
            shares.append(float((half > rate).float().mean()))
    return float(np.mean(shares)) if shares else 0.0


def _is_adam(subject: Subject) -> bool:
    optimizer = getattr(subject.trainer, "optimizer", None)
    if optimizer is not None:
        return type(optimizer).__module__.startswith("torch.optim")
    return "adamw_torch" in str(getattr(subject.args, "optim", "")).lower()


def _rate(subject: Subject) -> float | None:
    optimizer = getattr(subject.trainer, "optimizer", None)
    groups = getattr(optimizer, "param_groups", None)
    if groups:
        return max(float(group.get("initial_lr", group["lr"])) for group in groups)
    rate = getattr(subject.args, "learning_rate", None)
    return None if rate is None else float(rate)


def _learning_rate(subject: Subject, model: Any) -> Iterator[Finding]:
    """The learning rate is not ten times above what any recipe of its kind uses."""
    rate = _rate(subject)
    if rate is None:
        return
    lora = bool(getattr(model, "peft_config", None))
    size = sum(p.numel() for p in model.parameters())
    most = 3e-2 if size < SMALL else 5e-3 if lora else 1e-3
    # Soft prompts are trained with rates of 0.003 to 0.3 (Lester et al. 2021).
    soft = bool(virtual_tokens(model))
    most, least = (3.0, _least_soft_rate(model)) if soft else (most, 1e-8)
    kind = "a soft prompt" if soft else "LoRA" if lora else "full fine-tuning"
    usual = "0.003 to 0.3" if soft else USUAL_RATES
    if rate <= 0:
        yield Finding(
            code="learning-rate-unusual",
            level="error",
            what=f"the learning rate is {rate:g}: nothing is learned",
            where="args.learning_rate",
            why="it was never set, or a custom schedule begins at 0",
            fix=f"set learning_rate={usual}",
        )
    elif rate >= most or rate < least:
        side = "above" if rate >= most else "below"
        yield Finding(
            code="learning-rate-unusual",
            level="warning",
            what=f"the learning rate {rate:g} is far {side} the usual range for {kind}",
            where="args.learning_rate",
            why="the loss diverges, or the model forgets its language"
            if side == "above"
            else "only the virtual tokens are trained, and at this rate they hardly move"
            if soft
            else "the weights hardly change",
            fix=f"set learning_rate={usual}",
        )


def _least_soft_rate(model: Any) -> float:
    """Ten times below the usual range where the virtual tokens are trained themselves; networks
    that compute them (p-tuning, prefix_projection) take smaller rates."""
    trained = [n for n, p in model.named_parameters() if p.requires_grad and p.numel()]
    alone = all(name.endswith("embedding.weight") for name in trained)
    return 3e-4 if trained and alone else 1e-8


def _weight_decay(subject: Subject) -> Iterator[Finding]:
    """The weight decay is in the usual range; sign-based optimizers use larger ones."""
    optimizer = getattr(subject.trainer, "optimizer", None)
    groups = getattr(optimizer, "param_groups", None)
    decay = (
        max(float(group.get("weight_decay") or 0) for group in groups)
        if groups
        else float(getattr(subject.args, "weight_decay", 0) or 0)
    )
    named = f"{type(optimizer).__name__} {getattr(subject.args, 'optim', '')}".lower()
    if decay <= _MOST_DECAY * (10 if "lion" in named else 1):
        return
    yield Finding(
        code="weight-decay-unusual",
        level="warning",
        what=f"a weight decay of {decay:g} pulls every trained weight towards 0",
        where="args.weight_decay",
        why="each step shrinks each weight by learning rate times decay, whatever the data",
        fix="set weight_decay between 0 and 0.1",
    )


def _optimizer(subject: Subject, trained: Sequence[Any]) -> Iterator[Finding]:
    """A given optimizer holds all trained parameters."""
    optimizer = getattr(subject.trainer, "optimizer", None)
    groups = getattr(optimizer, "param_groups", None)
    if not groups:
        return
    held = {id(p) for group in groups for p in group["params"]}
    left_out = sum(id(p) not in held for p in trained)
    if left_out:
        everything = left_out == len(trained)
        yield Finding(
            code="optimizer-misses",
            level="error" if everything else "warning",
            what=f"the optimizer holds {'none' if everything else 'not all'} of the trained "
            f"parameters: {left_out:,} of {len(trained):,} are missing",
            where="trainer.optimizer",
            count=left_out,
            why="it was created before the model was wrapped, resized or replaced",
            fix="create the optimizer after the model is complete, or let the trainer create it",
        )
