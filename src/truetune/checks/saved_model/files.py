"""Check the files of a finished model: all present, and the server stops where answers end."""

from __future__ import annotations

from collections.abc import Iterator

from truetune.checks.registry import check
from truetune.checks.saved_model.checkpoint import Checkpoint
from truetune.contract.contract import PromptContract
from truetune.errors import UnfaithfulTemplate
from truetune.findings import Finding, counted

_PLAIN = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]


@check()
def files_open(found: Checkpoint) -> Iterator[Finding]:
    """Every file that a server opens exists and is complete."""
    yield from found.problems
    if found.tokenizer is None:
        yield Finding(
            "tokenizer-missing",
            "error",
            "there is no tokenizer in the folder",
            str(found.folder),
            why="the model was saved without one: a server finds neither a vocabulary nor a chat "
            "template",
            fix="save the tokenizer of the training run: tokenizer.save_pretrained(FOLDER)",
        )
    elif found.is_adapter and not found.own_tokenizer:
        yield Finding(
            "adapter-without-tokenizer",
            "note",
            "the adapter has no tokenizer: it is served with the base's tokenizer and chat "
            "template",
            str(found.folder),
            fix="nothing to do if it was trained with those; otherwise save its tokenizer in the "
            "adapter's folder",
        )


@check()
def template_there(found: Checkpoint) -> Iterator[Finding]:
    """There is a chat template, and it renders a simple conversation."""
    if found.tokenizer is None or found.frame is None:
        return
    if found.frame.broken is not None:
        yield Finding(
            "template-unfaithful",
            "error",
            f"the chat template cannot be used: {found.frame.broken.what}",
            str(found.folder),
            why="a server fails on the first message",
            fix="copy chat_template.jinja from the training run",
        )
        return
    if not found.frame.has_template:
        yield Finding(
            "template-missing",
            "warning" if found.tuned else "note",
            "the tokenizer has no chat template",
            str(found.folder),
            why="it was lost when the model was saved, or the model was trained on plain text; a "
            "server then refuses messages or uses a format of its own",
            fix="copy chat_template.jinja from the training run, or serve plain completions",
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
            f"the chat template changes a simple message: {error.what}",
            str(found.folder),
            why=error.why,
            fix=error.fix or "choose another template with --chat-template",
        )


@check()
def terminator_served(found: Checkpoint) -> Iterator[Finding]:
    """The server stops on the token that the template writes after an answer."""
    frame, facts = found.frame, found.facts
    if frame is None or not frame.has_template:
        return
    served = frame.tokens.named(sorted(frame.served_stops)) or "nothing"
    if frame.terminator is None:
        yield Finding(
            "template-without-end",
            "error" if found.tuned else "warning",
            "the chat template writes no end token after an answer",
            str(found.folder),
            why=f"a server stops on {served}, which a model trained with this template never "
            "learned",
            fix="use a template that ends every answer with a stop token",
        )
    elif frame.terminator not in frame.served_stops:
        ids = [*sorted(frame.served_stops), frame.terminator]
        judged = found.rows.values()
        learned = found.tuned or (
            any(frame.terminator in rows.trained for rows in judged)
            and not any(frame.terminator in rows.untrained for rows in judged)
        )
        where = found.served_from
        yield Finding(
            "stop-not-served",
            "error" if learned else "warning",
            f"the chat template ends answers with {frame.tokens.named([frame.terminator])}, but a "
            f"server stops only on {served}",
            str(found.folder),
            why=f"the stop tokens come from {where}"
            + (" of the base: an adapter cannot change it" if found.is_adapter else ""),
            fix=f"serve with stop_token_ids={ids}"
            if found.is_adapter
            else f'set "eos_token_id": {ids} in generation_config.json',
        )
    rows = facts.head_rows if facts else 2**31
    beyond = sorted(i for i in frame.served_stops if i >= rows or i < 0)
    if beyond:
        yield Finding(
            "stop-beyond-head",
            "error",
            f"the stop tokens include {beyond}, but the model has {rows:,} embeddings",
            str(found.folder),
            why=f"{found.served_from} belongs to another model",
            fix="copy the generation_config.json that belongs to the model",
        )
    if found.unread_stops:
        yield Finding(
            "adapter-stop-unread",
            "warning",
            f"the adapter's generation_config lists the stop tokens {list(found.unread_stops)}, "
            "which the base's does not",
            str(found.folder),
            why="transformers and peft read only the base's generation_config",
            fix=f"serve with stop_token_ids={[*sorted(frame.served_stops), *found.unread_stops]}",
        )


@check()
def vocabulary_fits(found: Checkpoint) -> Iterator[Finding]:
    """Every token of the tokenizer has an embedding."""
    facts = found.facts
    if facts is None or facts.spare_rows >= 0:
        return
    known = found.tokenizer.get_vocab()
    lost = sorted((i, t) for t, i in known.items() if i >= facts.head_rows)
    named = ", ".join(f"{token!r} ({i})" for i, token in lost[:4])
    needed = found.frame is not None and any(i in found.frame.chat_ids for i, _ in lost)
    yield Finding(
        "id-beyond-head",
        "error" if needed or found.tuned else "warning",
        f"the model has {facts.head_rows:,} embeddings and none for "
        f"{counted(len(lost), 'token')} of the tokenizer: {named}",
        str(found.folder),
        len(lost),
        why="tokens were added to the tokenizer but the model was not resized, or the tokenizer "
        "belongs to another model",
        fix="save the tokenizer of the training run, or resize the embedding",
    )
