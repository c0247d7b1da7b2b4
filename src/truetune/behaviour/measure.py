"""Measure vital signs: generate replies to fixed prompts, as served, and compute the losses of
fixed examples.

input   a contract, examples that are trained and held out, text that must not be forgotten
does    chooses prompts and samples once; at each step asks the model the prompts, greedily, and
        reads the losses, without changing a weight or a random state
output  Vitals, and the replies as samples.jsonl has them
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from truetune.behaviour.replies import Asked, Judge, Said, shares
from truetune.behaviour.vitals import Vitals
from truetune.compare import Scored, row_losses, row_scores
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.data.conversation import Conversation, text_of
from truetune.data.rows import evenly, file_of
from truetune.generate import Reply, replies_to_ids
from truetune.model.draw import Sampling
from truetune.model.load import LoadedModel

# Prompts asked each time, and the most new tokens of a reply.
PROMPTS, REPLY_TOKENS = 8, 96
# Trained examples whose loss is read each time, of so many tokens together at most.
EXAMPLES, _EXAMPLE_TOKENS = 16, 8192
# Of several files, the largest so many have so many of their rows read, so many at least, for each
# of the trained examples.
_FILES, _FILE_ROWS, _FEWEST_ROWS = 2, 4, 3
# Rows of a file that a finding names; bytes of its answers that are compressed, at least and at
# most.
_NAMED, _FEWEST_BYTES, _MOST_BYTES = 4, 1000, 20_000
# Text that must not be forgotten: the model's own in so many pieces of so many tokens, a user's in
# pieces of so many tokens, at most so many together.
PIECES, PIECE_TOKENS = 16, 64
_KEEP_PIECE, _KEEP_TOKENS = 256, 4096
# Tokens that such a piece has at least, on average; pieces, and their share of the nats of
# guessing, above which a model knows nothing.
_FEWEST_TOKENS, _FEW_PIECES, _KNOWS = 7, 4, 0.8


class Replies(Protocol):
    """`replies_to_ids`, or whoever writes them otherwise."""

    def __call__(
        self,
        loaded: LoadedModel,
        contract: PromptContract,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> list[Reply]:
        """Return a reply to each prompt."""


@dataclass(frozen=True)
class Measured:
    """The result of one measurement.

    Attributes:
        vitals: the numbers.
        samples: lines of samples.jsonl.
        replies: the judged replies, in the order of the prompts.
        hardest: rows of each file, those with the highest loss.
    """

    vitals: Vitals
    samples: list[dict[str, Any]]
    replies: list[Said]
    hardest: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Prober:
    """Measures the vital signs of one run, always on the same prompts and examples.

    Args:
        contract: as served.
        trained: examples that are trained.
        prompts: questions, the held-out ones first.
        keep: examples of text that must not be forgotten; () measures none.
        held_out: held-out examples; () if their loss is measured elsewhere.
        reply_tokens: maximum number of new tokens per reply.
        examples: number of trained examples to measure.
        rows: the place of each trained example, as its file has it; of several files, each is
            measured.
        replies: writes the replies.
    """

    def __init__(
        self,
        contract: PromptContract,
        trained: Sequence[SFTExample],
        prompts: Sequence[Asked],
        keep: Sequence[SFTExample] = (),
        held_out: Sequence[SFTExample] = (),
        reply_tokens: int = REPLY_TOKENS,
        examples: int = EXAMPLES,
        rows: Sequence[str] = (),
        replies: Replies = replies_to_ids,
    ) -> None:
        self.replies = replies
        self.contract, self.prompts, self.keep = contract, list(prompts), list(keep)
        self.judge = Judge(contract)
        self.reply_tokens = reply_tokens
        self.trained, self.held_out = _few(trained, examples), _few(held_out, EXAMPLES)
        self.files = _by_file(trained, rows, examples)
        self.file_left = self._left(trained, rows) if self.files else {}

    def _left(self, trained: Sequence[SFTExample], rows: Sequence[str]) -> dict[str, float]:
        """Return the compression ratio of each file's answers, for files with enough text."""
        texts: dict[str, bytearray] = {name: bytearray() for name in self.files}
        for example, where in zip(trained, rows, strict=True):
            text = texts.get(file_of(where))
            if text is not None and len(text) < _MOST_BYTES:
                ids = [i for i, on in zip(example.ids, example.mask, strict=True) if on]
                words = [i for i in ids if i not in self.contract.stop_ids]
                text += self.contract.tokens.decode(words).encode("utf-8", "replace")
        return {
            name: round(len(zlib.compress(text)) / len(text), 3)
            for name, text in texts.items()
            if len(text) >= _FEWEST_BYTES
        }

    def measure(self, loaded: LoadedModel, step: int) -> Measured:
        """Generate the replies, compute the losses, and combine the numbers; the model keeps its
        mode."""
        began = time.perf_counter()
        scored = self._scored(loaded)
        ends = [_end(scored[_row(asked)], asked) for asked in self.prompts]
        limits = [min(asked.most_tokens, self.reply_tokens) for asked in self.prompts]
        limit = max(limits, default=1)
        replies = _greedy(loaded, self.contract, self.prompts, scored, limit, self.replies)
        said = [
            self.judge.judge(asked, reply, limit, end)
            for asked, reply, end in zip(self.prompts, replies, ends, strict=True)
        ]
        numbers = {**self._losses(scored), **shares(said)}
        losses, hardest = self._of_files(scored)
        seconds = round(time.perf_counter() - began, 4)
        vitals = Vitals(
            step=step,
            prompts=len(said),
            examples=len(self.trained),
            seconds=seconds,
            file_losses=losses or None,
            file_left=self.file_left or None,
            **numbers,
        )
        samples = [
            {
                "step": step,
                "where": asked.where,
                "messages": [dict(message) for message in asked.messages],
                "answer": one.text,
                "stopped": one.stopped,
                "had_room": one.had_room,
                "would_stop": one.would_stop,
                "expected": asked.expected_text,
                "held_out": asked.held_out,
                "prompt": asked.prompt_text,
            }
            for asked, one in zip(self.prompts, said, strict=True)
        ]
        return Measured(vitals, samples, said, hardest)

    def _scored(self, loaded: LoadedModel) -> dict[_Row, Scored]:
        """Score every row that is measured; a prompt whose row is also a trained example counts
        as one row."""
        of_files = [example for rows in self.files.values() for _, example in rows]
        examples = [*self.trained, *self.held_out, *self.keep, *of_files]
        rows = list(dict.fromkeys([*map(_key, examples), *map(_row, self.prompts)]))
        return dict(zip(rows, row_scores(loaded, rows), strict=True))

    def _of_files(
        self, scored: Mapping[_Row, Scored]
    ) -> tuple[dict[str, float], dict[str, tuple[str, ...]]]:
        """The median loss of each file's rows, and its rows of the highest loss."""
        losses, hardest = {}, {}
        for name, rows in self.files.items():
            of_rows = {where: _mean(scored[_key(example)].losses) for where, example in rows}
            known = {where: loss for where, loss in of_rows.items() if loss is not None}
            if len(known) >= _FEWEST_ROWS:
                losses[name] = round(median(known.values()), 4)
                hardest[name] = tuple(sorted(known, key=lambda row: -known[row])[:_NAMED])
        return losses, hardest

    def _losses(self, scored: Mapping[_Row, Scored]) -> dict[str, float]:
        """Losses of the fixed examples, by the name of their vital sign."""
        sets = {
            "trained_loss": self.trained,
            "held_out_loss": self.held_out,
            "keep_loss": self.keep,
        }
        found = {
            name: [scored[_key(example)].losses for example in examples]
            for name, examples in sets.items()
        }
        # The stop token that ends an answer is the last of its targets.
        found["stop_loss"] = [
            losses[-1:]
            for example, losses in zip(self.trained, found["trained_loss"], strict=True)
            if _ends_on(example, self.contract.stop_ids)
        ]
        means = {
            name: _mean([loss for losses in each for loss in losses])
            for name, each in found.items()
        }
        means["trained_error"] = _standard_error(found["trained_loss"])
        return {name: mean for name, mean in means.items() if mean is not None}


# ids and mask of a row that is scored.
_Row = tuple[tuple[int, ...], tuple[int, ...]]


def _key(example: SFTExample) -> _Row:
    return tuple(example.ids), tuple(example.mask)


def _row(asked: Asked) -> _Row:
    """A prompt with its row's own answer."""
    answer = asked.answer
    return (*asked.ids, *answer), (*[0] * len(asked.ids), *[1] * len(answer))


def greedy_replies(
    loaded: LoadedModel, contract: PromptContract, prompts: Sequence[Asked], limit: int
) -> list[Reply]:
    """Greedy replies of at most so many tokens: where one begins as the row's own answer, that part
    is read off one pass over the answers."""
    rows = [_row(asked) for asked in prompts]
    scored = dict(zip(rows, row_scores(loaded, rows), strict=True))
    return _greedy(loaded, contract, prompts, scored, limit)


def _greedy(
    loaded: LoadedModel,
    contract: PromptContract,
    prompts: Sequence[Asked],
    scored: Mapping[_Row, Scored],
    limit: int,
    replies: Replies = replies_to_ids,
) -> list[Reply]:
    begun = [_begun(scored[_row(asked)], asked) for asked in prompts]
    ids = [asked.ids for asked in prompts]
    return replies(loaded, contract, ids, Sampling(max_new_tokens=limit), begun=begun)


def _begun(scored: Scored, asked: Asked) -> tuple[int, ...]:
    """Return the tokens of the row's own answer with which a greedy reply begins."""
    same = next((at for at, on in enumerate(scored.likeliest) if not on), len(scored.likeliest))
    return asked.answer[:same]


def _end(scored: Scored, asked: Asked) -> bool | None:
    """Whether the model would stop after the row's own answer; None of an answer without a stop
    token."""
    return scored.likeliest[-1] if asked.stop is not None and scored.likeliest else None


def _mean(losses: Sequence[float]) -> float | None:
    """Return the mean, or None if there are no values or the mean is not finite: the training
    loop itself reports that."""
    total = sum(losses)
    return total / len(losses) if losses and math.isfinite(total) else None


def _standard_error(rows: Sequence[Sequence[float]]) -> float | None:
    """Of the mean loss of all tokens, where whole rows were drawn."""
    mean = _mean([loss for row in rows for loss in row])
    if mean is None or len(rows) < 2:
        return None
    squares = sum((sum(row) - mean * len(row)) ** 2 for row in rows)
    return math.sqrt(len(rows) / (len(rows) - 1) * squares) / sum(map(len, rows))


def _few(examples: Sequence[SFTExample], most: int) -> list[SFTExample]:
    """Return some examples, spread over all: as many as their length allows, at least one."""
    chosen: list[SFTExample] = []
    tokens = 0
    for example in evenly(examples, most):
        tokens += len(example.ids)
        if chosen and tokens > _EXAMPLE_TOKENS:
            break
        if any(example.mask):
            chosen.append(example)
    return chosen


def _by_file(
    examples: Sequence[SFTExample], rows: Sequence[str], number: int
) -> dict[str, list[tuple[str, SFTExample]]]:
    """Some rows of each file, the largest files first, with their places; {} of a single file."""
    places: dict[str, list[int]] = {}
    for at, (example, where) in enumerate(zip(examples, rows, strict=False)):
        if any(example.mask):
            places.setdefault(file_of(where), []).append(at)
    files = sorted(places, key=lambda name: -len(places[name]))[: _FILES * number]
    if len(files) < 2:
        return {}
    each = max(min(_FILE_ROWS * number // len(files), number // 2), _FEWEST_ROWS)
    found = {}
    for name in files:
        held = places[name]
        chosen = evenly(held, each)
        tokens = sum(len(examples[at].ids) for at in chosen)
        if len(chosen) >= _FEWEST_ROWS and tokens <= _EXAMPLE_TOKENS:
            found[name] = [(rows[at], examples[at]) for at in chosen]
    return found if len(found) > 1 else {}


def _ends_on(example: SFTExample, stops: Sequence[int]) -> bool:
    """Whether the last of several targets is a stop token."""
    targets = [at for at, on in enumerate(example.mask) if on]
    return len(targets) > 1 and example.ids[targets[-1]] in stops


def whole(ids: Sequence[int]) -> SFTExample:
    """Plain text as an example: every token but the first is a target."""
    return SFTExample(list(ids), [0] + [1] * (len(ids) - 1))


def own_samples(
    loaded: LoadedModel,
    contract: PromptContract,
    seed: int,
    tokens: int = PIECE_TOKENS,
    number: int = PIECES,
    replies: Replies = replies_to_ids,
) -> list[list[int]]:
    """Sample text from the model at temperature 1, from the token that begins a text. The increase
    of its loss is the Kullback-Leibler divergence from the original model, in nats per token.

    Args:
        tokens: of each piece.
        number: of pieces.
        replies: writes them.

    Returns:
        [] if the model writes next to nothing, has no token to begin with, or knows nothing that
        it could forget: its text is nearly as likely as any.
    """
    tokenizer = contract.tokenizer
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    rows = loaded.transformers_model.get_input_embeddings().weight.shape[0]
    if first is None or not 0 <= first < rows:
        return []
    drawn = replies(
        loaded,
        contract,
        [[first]] * number,
        Sampling(max_new_tokens=tokens, temperature=1.0, seed=seed),
    )
    pieces = [[first, *reply.ids] for reply in drawn if len(reply.ids) > 1]
    targets = sum(len(ids) - 1 for ids in pieces)
    if targets < number * _FEWEST_TOKENS:
        return []
    # A few pieces suffice to recognise a model that knows nothing.
    few = [whole(ids) for ids in pieces[:_FEW_PIECES]]
    loss = sum(row_losses(loaded, [(e.ids, e.mask) for e in few])) / sum(sum(e.mask) for e in few)
    return pieces if loss < _KNOWS * math.log(rows) else []


def text_pieces(contract: PromptContract, texts: Sequence[Conversation]) -> list[list[int]]:
    """Pieces of the texts of rows, spread over them; [] if they hold none."""
    pieces: list[list[int]] = []
    for ids in contract.tokens.encode([text for row in texts if (text := text_of(row))]):
        for at in range(0, len(ids), _KEEP_PIECE):
            piece = ids[at : at + _KEEP_PIECE]
            if len(piece) > 1:
                pieces.append(piece)
    return list(evenly(pieces, _KEEP_TOKENS // _KEEP_PIECE))
