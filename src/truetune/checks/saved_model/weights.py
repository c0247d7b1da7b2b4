"""Check the weights of a finished model or adapter: complete, finite, trained where needed."""

from __future__ import annotations

from collections.abc import Iterator

from truetune.checks.registry import check
from truetune.checks.saved_model.checkpoint import Checkpoint
from truetune.findings import Finding, counted
from truetune.model.adapter_files import is_empty
from truetune.model.weights import listed


@check()
def weights_whole(found: Checkpoint) -> Iterator[Finding]:
    """The files contain each weight of the model in its shape, and nothing else."""
    dry = found.dry
    if dry is None:
        return
    if dry.reshaped:
        name, stored, wanted = dry.reshaped[0]
        yield Finding(
            "model-shape-mismatch",
            "error",
            f"config.json gives {counted(len(dry.reshaped), 'tensor')} another shape: {name} is "
            f"{list(stored)}, but the model has {list(wanted)}",
            str(found.folder),
            len(dry.reshaped),
            why="config.json belongs to another model, or an embedding was resized but the config "
            "was not changed",
            fix="restore the config.json that was saved with the weights",
        )
    if dry.missing:
        yield Finding(
            "model-weights-missing",
            "error",
            f"the files lack {counted(len(dry.missing), 'weight')} of the model: "
            f"{listed(dry.missing)}",
            str(found.folder),
            len(dry.missing),
            why="their names have a prefix (a wrapped model was saved), so loading does not find "
            "them and initialises them with random numbers"
            if len(dry.unexpected) >= len(dry.missing)
            else "the model was saved incompletely, or its head was tied when it was saved; "
            "loading fills them with random numbers and only warns",
            fix="save the unwrapped model again (model.merge_and_unload() for an adapter)"
            if len(dry.unexpected) >= len(dry.missing)
            else "save the model again; a head that shares the embedding needs "
            "tie_word_embeddings: true",
        )
    elif dry.unexpected:
        yield Finding(
            "weights-unused",
            "warning",
            f"the files contain {counted(len(dry.unexpected), 'tensor')} that the model does not "
            f"have: {listed(dry.unexpected)}",
            str(found.folder),
            len(dry.unexpected),
            why="an adapter was not merged, or config.json has fewer layers: loading ignores "
            "these tensors",
            fix="merge the adapter before saving, or restore the right config.json",
        )
    if dry.head_differs:
        yield Finding(
            "head-not-tied",
            "error",
            "config.json ties the head to the embedding, but the files hold two different matrices",
            str(found.folder),
            why="the two were trained or resized separately; a loader that follows the config "
            "uses the embedding for both, and the answers are noise",
            fix='set "tie_word_embeddings": false in config.json; for the next run, train them as '
            "one "
            "(ensure_weight_tying=True)",
        )


@check()
def chat_rows_trained(found: Checkpoint) -> Iterator[Finding]:
    """The embeddings of the tokens that the template writes were trained."""
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
        f"the embeddings of {named} were never trained",
        str(found.folder),
        len(ids),
        why=f"{why}; "
        + (
            "the model cannot distinguish the token that ends an answer from unused tokens"
            if ends
            else "the model cannot distinguish it from unused tokens"
        ),
        fix="train the embedding and the head of these tokens as well, or use a template whose "
        "tokens were trained",
    )


@check()
def numbers_finite(found: Checkpoint) -> Iterator[Finding]:
    """No tensor contains NaN or infinity."""
    broken = [table.name for table in found.tables.values() if not table.finite]
    broken += [name for name in (found.dry.not_finite if found.dry else ()) if name not in broken]
    if found.adapter is not None and not found.adapter.finite:
        broken.append("the adapter's weights")
    if broken:
        yield Finding(
            "weights-not-finite",
            "error",
            f"{listed(broken)} contain NaN or infinity",
            str(found.folder),
            len(broken),
            why="the training diverged, or float16 overflowed",
            fix="use an earlier checkpoint, and train in bfloat16 or float32",
        )
    if found.dry and found.dry.zero:
        yield Finding(
            "weights-zero",
            "error",
            f"{len(found.dry.zero):,} matrices begin with rows of zeros: {listed(found.dry.zero)}",
            str(found.folder),
            len(found.dry.zero),
            why="they were saved before they were loaded, or by ZeRO-3 without gathering the "
            "weights",
            fix="save again from the trained model",
        )


@check()
def adapter_learned(found: Checkpoint) -> Iterator[Finding]:
    """An adapter changes the base that it names, in every layer that it lists."""
    facts = found.adapter
    if facts is None:
        return
    if is_empty(facts):
        yield Finding(
            "adapter-empty",
            "error",
            "the adapter changes nothing: "
            + (
                f"{len(facts.empty):,} of its tensors are empty"
                if facts.empty
                else "the second matrix of each of its LoRA pairs is zero"
                if facts.pairs
                else "its file contains no tensors"
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
            f"{facts.pairs - facts.moved:,} of {facts.pairs:,} adapted layers change nothing",
            str(found.folder),
            facts.pairs - facts.moved,
            why="their second LoRA matrix is still zero: no gradient reached them",
            fix="check which layers were frozen during training",
        )
    if facts.unmatched:
        yield Finding(
            "adapter-wrong-base",
            "error",
            f"{len(facts.unmatched):,} adapted layers are not in the base, or have a different "
            "shape there",
            facts.unmatched[0],
            len(facts.unmatched),
            why="the adapter was trained on a different base than the one that it names, or "
            "layers were renamed; loaders skip such layers",
            fix="set base_model_name_or_path to the right base",
        )
    if facts.asked:
        yield Finding(
            "lora-targets-unmatched",
            "warning",
            f"target_modules names layers that the base does not have: {', '.join(facts.asked)}",
            str(found.folder),
            len(facts.asked),
            why="peft silently ignores unknown names: fewer layers were trained than requested",
            fix="train again with layer names that `truetune inspect` lists",
        )
    elif facts.missing and not facts.empty:
        yield Finding(
            "adapter-incomplete",
            "warning",
            f"the file lacks {counted(len(facts.missing), 'layer')} that target_modules names",
            facts.missing[0],
            len(facts.missing),
            why="the file was saved incompletely, or layers were excluded",
            fix="save again from the trained model",
        )


@check()
def soft_prompt_opens(found: Checkpoint) -> Iterator[Finding]:
    """A soft prompt fits the base that it names."""
    facts = found.adapter
    if facts is None or not facts.virtual:
        return
    if facts.virtual_broken:
        yield Finding(
            "soft-prompt-unfit",
            "error",
            f"the soft prompt cannot be loaded on its base: {facts.virtual_broken}",
            str(found.folder),
            why="it was trained on another base, or saved incompletely; a soft prompt works only "
            "with its own base",
            fix="set base_model_name_or_path to the base that it was trained on",
        )
        return
    yield Finding(
        "soft-prompt",
        "note",
        f"the adapter is a soft prompt of {facts.virtual:,} virtual tokens ({facts.kind})",
        str(found.folder),
        why="they precede every conversation, use part of the context, and are meaningless to "
        "another base",
        fix="serve it with PeftModel.from_pretrained on this base; it cannot be merged, and "
        "servers with LoRA support do not accept it",
    )
