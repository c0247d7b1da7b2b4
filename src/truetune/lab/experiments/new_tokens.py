"""Train markers that the base never saw with LoRA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from truetune.lab import base_path
from truetune.lab.asked import instructions, usual
from truetune.lab.bench import Arm
from truetune.lab.chats import encoded
from truetune.lab.experiment import Expectation, Experiment
from truetune.model.load import LoadedModel
from truetune.model.lora import LoraSettings, add_lora
from truetune.model.new_tokens import add_tokens, row_layers

_MARKERS = ["<|user|>", "<|assistant|>", "<|end|>"]
# Ids of the markers and of the tokens beside them that no text holds.
_RESERVED = (2, 15)
_LORA: dict[str, Any] = {"learning_rate": 1e-3, "lora": True, "lora_dropout": 0.0}
_OF_TEXT = (
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{- 'Question: ' + m['content'] + '\\n'"
    " -}}{%- else -%}{{- 'Answer: ' + m['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Answer: ' -}}{%- endif -%}"
)


def rows_alike(folder: Path) -> None:
    """The base with one embedding for all reserved tokens, as in published models that never
    trained theirs."""
    from safetensors.torch import load_file, save_file

    for path in base_path().iterdir():
        shutil.copyfile(path, folder / path.name)
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    first, last = _RESERVED
    table[first : last + 1] = table[first : last + 1].mean(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def untied(folder: Path) -> None:
    """As `rows_alike`, with an output head of its own that begins as a copy of the embeddings."""
    from safetensors.torch import load_file, save_file

    rows_alike(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def input_side_only(loaded: LoadedModel, seed: int) -> LoadedModel:
    """LoRA that trains the markers' input embeddings and leaves their rows of the head frozen, as
    peft does if `trainable_token_indices` names the embedding alone."""
    tokens, _ = add_tokens(loaded.tokenizer, _MARKERS)
    made = add_lora(loaded, LoraSettings(dropout=_LORA["lora_dropout"]), seed, new_tokens=tokens)
    [head] = [layer for path, layer in row_layers(made.model) if ".lm_head." in path]
    head.trainable_tokens_delta.requires_grad_(False)
    return made


def arms(seed: int) -> Sequence[Arm]:
    return (
        # The preflight refuses this run, and says why.
        Arm("embeddings frozen", rows=instructions(), recipe={**_LORA, "no_check": True}),
        Arm(
            "embeddings frozen and alike",
            rows=instructions(),
            recipe={**_LORA, "no_check": True},
            build=rows_alike,
        ),
        Arm("embeddings trained", rows=instructions(), recipe={**_LORA, "add_token": _MARKERS}),
        Arm(
            "untied head trained",
            rows=instructions(),
            recipe={**_LORA, "add_token": _MARKERS},
            build=untied,
        ),
        Arm(
            "untied head forgotten",
            examples=lambda c: encoded(c, instructions()),
            recipe=_LORA,
            build=untied,
            adapter=input_side_only,
        ),
        Arm("no new tokens", rows=instructions(), recipe={**_LORA, "chat_template": _OF_TEXT}),
    )


EXPERIMENT = Experiment(
    number=12,
    name="new-tokens",
    title="New tokens under LoRA",
    claim="Under LoRA, a model never writes a marker whose input and output embeddings were never "
        "trained. Either these are trained too, or the template must not use new tokens.",
    source="the course's exercise on special tokens; TRL pull request 2414; threads on models that "
    "never emit <|im_end|> after LoRA on a base",
    exercises=("Special tokens under LoRA",),
    setup="LoRA of rank 16 on all linear layers is trained at 1e-3. In *embeddings frozen*, the "
        "markers' embeddings are not trained; the checks before training refuse this run, so it "
        "needs `--no-check`. In *embeddings frozen and alike*, all reserved tokens of the base "
        "have the same embedding. *Embeddings trained* uses `--add-token`. The two arms with an "
        "untied head start from that base with a separate output head, in which the reserved "
        "tokens are identical too. `--add-token` trains the markers' rows in both matrices; in "
        "*untied head forgotten*, only their input embeddings are trained, as by a peft "
        "configuration that does not name the head. *No new tokens* uses the texts *Question:* "
        "and *Answer:*, and the base's own end token",
    expected="with frozen embeddings, whether distinct or identical, fewer than 10 % of the "
        "answers end; with trained embeddings, more than 90 % end; and so do more than 90 % with "
        "a plain-text template that closes answers with the model's own end token. With an untied "
        "head, more than 90 % end if the markers' rows are trained in both matrices, and fewer "
        "than 10 % if they are trained in the input embeddings alone",
    refuted="half of the answers end with frozen embeddings or with a head whose rows are frozen, "
        "or a tenth do not end where the rows are trained",
    seeds=(1, 2, 3),
    arms=arms,
    measure=usual,
    expectations=(
        Expectation("frozen: answers do not end", "ended", "embeddings frozen", below=0.1),
        Expectation(
            "frozen and identical: answers do not end", "ended", "embeddings frozen and "
                "alike", below=0.1
        ),
        Expectation("trained: answers end", "ended", "embeddings trained", above=0.9),
        Expectation(
            "untied head trained: answers end", "ended", "untied head trained", above=0.9
        ),
        Expectation(
            "untied head forgotten: answers do not end",
            "ended", "untied head forgotten", below=0.1,
        ),
        Expectation("without new tokens: answers end", "ended", "no new tokens", above=0.9),
    ),
    shown=("ended", "role leak", "right", "training loss", "repeats"),
    remark="In this base, the markers' embeddings are random and distinct. Even if they are "
        "frozen, they can be distinguished, and LoRA learns to do so. In published models, the "
        "embeddings of reserved tokens are nearly identical. The arm with identical embeddings and "
        "the two with an untied head, with their expectations, were added and committed after a "
        "first run without them. With a forgotten head, the model learns where a marker belongs, "
        "but not which one: after each sentence, it writes `<|user|>` or `<|system|>` (see the "
        "replies). Trained input embeddings do not help, because they do not reach the head. Here "
        "the training loss does show the fault: it stays at 0.46, against 0.01 if the head's rows "
        "are trained. The sentence under *Refuted by* leaves a gap, from 10 to 50 % of ended "
        "answers; nothing was found there.",
)  # fmt: skip
