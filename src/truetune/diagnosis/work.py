"""What the stages of a diagnosis share: the trained model, its rows, predictions and replies."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.data.conversation import Conversation
from truetune.diagnosis.measured import (
    Replies,
    rates,
    reading_of,
    replies_of,
    reply_cases,
    same_replies,
)
from truetune.diagnosis.trained import recorded
from truetune.exporting.gguf_proof import (
    Apart,
    Reference,
    apart_of,
    reference_of,
)
from truetune.findings import Finding
from truetune.model.fingerprint import read_fingerprint
from truetune.model.load import LoadedModel, load_model
from truetune.model.merge import merge_adapter
from truetune.model.source import locate
from truetune.model.tokenizer import load_tokenizer, locate_base, num_ids
from truetune.run_dir import opened
from truetune.verification.artifact import run_of

Tell = Callable[[str], None]


class Work:
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
        """Ids on which replies would end although they should not: text, or a special token that is
        part of replies."""
        known = num_ids(self.contract.tokenizer)
        special = {*self.contract.tokenizer.all_special_ids, *self.contract.tokens.special_ids}
        said = {i for ids in self.replies.ids for i in ids} | self.supervised
        return [
            i
            for i in ends
            if i not in self.contract.stop_ids and i < known and (i not in special or i in said)
        ]

    def again(self, name: str) -> str:
        """Return how to create a stage again."""
        if name == "merged" and not self.is_adapter:
            return "copy the model's folder again"
        return AGAIN[name]

    def numbers(self, replies: Replies | None) -> dict[str, Any]:
        if replies is None:
            return {}
        found = rates(replies, self.cases)
        return {**found, "same_replies": same_replies(self.replies, replies)}


AGAIN = {
    "merged": "merge it again: truetune export RUN --merge -o DIR",
    "quantised": "quantise the merged model again from its original weights, or use more bits",
    "gguf": "write it again: truetune export RUN --to gguf -o DIR",
}


def parted(name: str, where: str, what: str, why: str, fix: str) -> Finding:
    return Finding("stage-parts", "error", f"{name}: {what}", where=where, why=why, fix=fix)
