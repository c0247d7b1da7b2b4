"""Adapt a model for lm-evaluation-harness: with served prompts, or with raw prompts.

input   a loaded model, its contract, requests of the harness
does    a served prompt is what the contract renders from the task's messages, and what is scored
        is right after it; a raw prompt is the task's text alone, cut into context and
        continuation as the harness does it
output  log-likelihoods and replies
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from truetune.behaviour.replies import Thinking
from truetune.compare import row_scores
from truetune.contract.contract import PromptContract
from truetune.generate import Sampling, replies_to_ids
from truetune.model.load import LoadedModel

# New tokens of a reply where a task does not say: the harness's own default.
_MOST_TOKENS = 256
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")


class ContractModel(LM):
    """One model under one way of asking.

    Args:
        context: tokens; None for no limit.
        served: by the contract; else by the raw prompt.
        on_progress: is called with how far the requests of one kind are.

    Attributes:
        cut: prompts that were longer than the context and lost their beginning.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        contract: PromptContract,
        context: int | None,
        *,
        served: bool,
        seed: int = 0,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        super().__init__()
        self.loaded, self.contract, self.context = loaded, contract, context
        self.served, self.seed, self.on_progress = served, seed, on_progress
        self.cut = 0
        self._thinking = Thinking.of_contract(contract)
        # Ids of the prompts that were rendered: the text alone does not say where an answer begins.
        self._rendered: dict[str, list[int]] = {}
        self._bos = _added_in_front(contract)
        tokenizer = contract.tokenizer
        first = tokenizer.bos_token_id
        self._first = tokenizer.eos_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """Of a cache of requests, which is not used."""
        return self.contract.fingerprint()

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The served prompt of some messages; a last assistant message is the beginning of the
        reply where no generation prompt is asked for.

        Raises:
            UnfaithfulTemplate: the template refuses the messages.
        """
        begun = "" if add_generation_prompt else str(chat_history[-1]["content"])
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        text = self.contract.prompt_text(messages)
        ids = self.contract.prompt_ids(messages)
        if begun:
            ids = [*ids, *self.contract.tokens.encode_completion(ids, begun)]
        self._rendered[text + begun] = ids
        return text + begun

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        pairs = [self._pair(*request.args[:2]) for request in requests]
        return self._scored(pairs)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for at, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self._plain(request.args[0]), self._first, (self.context or 2048) - 1, 1
            )
            found = [make_disjoint_window(window) for window in windows]
            pairs += found
            owners += [at] * len(found)
        sums = [0.0] * len(requests)
        for at, (score, _) in zip(owners, self._scored(pairs), strict=True):
            sums[at] += score
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        # Each row of a batch is asked by the same settings.
        alike: dict[str, list[int]] = defaultdict(list)
        for at, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(at)
        written: dict[int, str] = {}
        for places in alike.values():
            wanted = dict(requests[places[0]].args[1])
            sampling = _sampling(wanted, self.seed)
            prompts = [self._prompt(requests[at].args[0], sampling) for at in places]
            made = replies_to_ids(
                self.loaded,
                self.contract,
                prompts,
                sampling,
                batch_size=None,
                on_progress=self.on_progress,
            )
            for at, reply in zip(places, made, strict=True):
                # A server returns the answer without the thinking before it.
                text = self._thinking.split(reply.text)[2] if self.served else reply.text
                written[at] = _until(text, wanted.get("until"))
        return [written[at] for at in range(len(requests))]

    # ------------------------------------------------------------------------------ prompts to ids

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what is scored after it."""
        tokens = self.contract.tokens
        if context in self._rendered:
            ids = self._rendered[context]
            return ids, tokens.encode_completion(ids, continuation)
        # A space belongs to the word after it.
        kept = context.rstrip()
        if not kept:
            ids = tokens.encode([context + continuation])[0]
            return ([self._first], ids) if ids[:1] != [self._first] else (ids[:1], ids[1:])
        whole = self._plain(context + continuation)
        ids = self._plain(kept)
        return ids, whole[len(ids) :]

    def _plain(self, text: str) -> list[int]:
        """Ids of raw text, as the tokenizer makes them automatically."""
        ids = self.contract.tokens.encode([text])[0]
        return ids if ids[: len(self._bos)] == self._bos else [*self._bos, *ids]

    def _prompt(self, text: str, sampling: Sampling) -> list[int]:
        ids = self._rendered.get(text) or self._plain(text) or [self._first]
        if self.context is None:
            return ids
        return self._shortened(ids, max(self.context - sampling.max_new_tokens, self.context // 2))

    def _shortened(self, ids: list[int], most: int) -> list[int]:
        if len(ids) <= most:
            return ids
        self.cut += 1
        return ids[-most:]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding writes."""
        rows = []
        for context, continuation in pairs:
            ids = [*context, *continuation]
            if self.context is not None:
                ids = self._shortened(ids, self.context)
            number = min(len(continuation), len(ids) - 1)
            rows.append((ids, [0] * (len(ids) - number) + [1] * number))
        found = row_scores(self.loaded, rows, self.on_progress)
        return [(-scored.loss, scored.greedy) for scored in found]


def _added_in_front(contract: PromptContract) -> list[int]:
    """Ids that the tokenizer puts before every text automatically."""
    ids = list(contract.tokenizer("a", verbose=False)["input_ids"])
    bare = contract.tokens.encode(["a"])[0]
    place = next((at for at in range(len(ids)) if ids[at : at + len(bare)] == bare), 0)
    return ids[:place]


def _sampling(wanted: Mapping[str, Any], seed: int) -> Sampling:
    """A task's settings of generation."""
    most = next((int(wanted[name]) for name in _LIMITS if wanted.get(name)), _MOST_TOKENS)
    heat = wanted.get("temperature")
    drawn = wanted.get("do_sample", bool(heat))
    temperature = (1.0 if heat is None else float(heat)) if drawn else 0.0
    return Sampling(
        most, temperature, float(wanted.get("top_p", 1.0)), int(wanted.get("top_k", 0)), seed=seed
    )


def _until(text: str, ends: Any) -> str:
    """A reply up to the first of the texts that end it."""
    for end in [ends] if isinstance(ends, str) else ends or []:
        if end:
            text = text.split(end)[0]
    return text
