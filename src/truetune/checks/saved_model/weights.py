"""Weights of a finished model or adapter: all there, finite, trained where they must be."""

from __future__ import annotations

from collections.abc import Iterator

from truetune.checks.registry import check
from truetune.checks.saved_model.checkpoint import Checkpoint
from truetune.findings import Finding
from truetune.model.adapter_files import is_empty
from truetune.model.weights import listed


@check()
def weights_whole(found: Checkpoint) -> Iterator[Finding]:
    """Each weight of the model is in the files, in its shape, and nothing else is."""
    dry = found.dry
    if dry is None:
        return
    if dry.reshaped:
        name, stored, wanted = dry.reshaped[0]
        yield Finding(
            "model-shape-mismatch",
            "error",
            f"{len(dry.reshaped):,} tensors have another shape than config.json says: {name} is "
            f"{list(stored)}, the model has {list(wanted)}",
            str(found.folder),
            len(dry.reshaped),
            why="config.json belongs to another model, or a table was resized and the config not",
            fix="put the config.json back that was saved with the weights",
        )
    if dry.missing:
        yield Finding(
            "model-weights-missing",
            "error",
            f"{len(dry.missing):,} weights are in no file: {listed(dry.missing)}",
            str(found.folder),
            len(dry.missing),
            why="their names carry a prefix (a wrapped model was saved), so that loading finds "
            "none of them and takes random numbers"
            if len(dry.unexpected) >= len(dry.missing)
            else "the model was saved in part, or its head was tied when it was saved; loading "
            "fills them with random numbers and only warns",
            fix="save the unwrapped model again (model.merge_and_unload() for an adapter)"
            if len(dry.unexpected) >= len(dry.missing)
            else "save it again; a head that shares the embedding needs tie_word_embeddings: true",
        )
    elif dry.unexpected:
        yield Finding(
            "weights-unused",
            "warning",
            f"the model has no place for {len(dry.unexpected):,} tensors of its files: "
            f"{listed(dry.unexpected)}",
            str(found.folder),
            len(dry.unexpected),
            why="an adapter that was not merged, or a config.json of fewer layers: loading leaves "
            "them out",
            fix="merge the adapter before saving, or put the right config.json back",
        )
    if dry.head_differs:
        yield Finding(
            "head-not-tied",
            "error",
            "config.json ties the head to the embedding, and the files hold two different tables",
            str(found.folder),
            why="the two were trained or resized apart; what follows the config uses the embedding "
            "for both and answers in noise",
            fix='"tie_word_embeddings": false in config.json; for the next run, train them as one '
            "(ensure_weight_tying=True)",
        )


@check()
def chat_rows_trained(found: Checkpoint) -> Iterator[Finding]:
    """The rows of the tokens that the template writes were trained."""
    frame = found.frame
    if frame is None:
        return
    ids = sorted({i for rows in found.rows.values() if not rows.random for i in rows.untrained})
    if not ids or (found.adapter is not None and found.adapter.tables):
        return
    why = next(rows.why[ids[0]] for rows in found.rows.values() if ids[0] in rows.why)
    named = frame.tokens.named(ids, 4)
    ends = frame.terminator in ids
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


@check()
def numbers_finite(found: Checkpoint) -> Iterator[Finding]:
    """No NaN, no infinity in what was read."""
    broken = [table.name for table in found.tables.values() if not table.finite]
    broken += [name for name in (found.dry.not_finite if found.dry else ()) if name not in broken]
    if found.adapter is not None and not found.adapter.finite:
        broken.append("the adapter's weights")
    if broken:
        yield Finding(
            "weights-not-finite",
            "error",
            f"{listed(broken)} hold NaN or infinity",
            str(found.folder),
            len(broken),
            why="the training diverged, or float16 overflowed",
            fix="take an earlier checkpoint; train in bfloat16 or float32",
        )
    if found.dry and found.dry.zero:
        yield Finding(
            "weights-zero",
            "error",
            f"{len(found.dry.zero):,} matrices begin with nothing but zeros: "
            f"{listed(found.dry.zero)}",
            str(found.folder),
            len(found.dry.zero),
            why="they were saved before they were read, or by ZeRO-3 without gathering the weights",
            fix="save again from the trained model",
        )


@check()
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


@check()
def soft_prompt_opens(found: Checkpoint) -> Iterator[Finding]:
    """A soft prompt and the base that it was learned before."""
    facts = found.adapter
    if facts is None or not facts.virtual:
        return
    if facts.virtual_broken:
        yield Finding(
            "soft-prompt-unfit",
            "error",
            f"the soft prompt does not open on its base: {facts.virtual_broken}",
            str(found.folder),
            why="it was learned before another base, or saved in part; its numbers are gibberish "
            "to any other model",
            fix="put the base into base_model_name_or_path that it was trained on",
        )
        return
    yield Finding(
        "soft-prompt",
        "note",
        f"the adapter is a soft prompt of {facts.virtual:,} virtual tokens ({facts.kind})",
        str(found.folder),
        why="they stand before every conversation, take their place in the context, and mean "
        "nothing to another base",
        fix="serve it by PeftModel.from_pretrained on this base; it cannot be merged, and servers "
        "that take LoRA adapters do not take it",
    )
