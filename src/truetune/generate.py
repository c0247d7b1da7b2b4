"""Sampling and chat, through the contract only.

input   a loaded model, its contract, conversations
does    prompts by contract.prompt_ids, stops on contract.stop_ids, and samples by the settings
        given here: nothing of the model's own generation_config takes part
output  Reply

Prompts are padded left in a batch, and a batch shrinks as its rows end; which batch a row is in
changes nothing it draws.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.compute.memory import available_bytes
from truetune.contract.contract import PromptContract
from truetune.contract.tokens import Tokens
from truetune.data.conversation import Conversation
from truetune.errors import UsageError
from truetune.model.architecture import context_length
from truetune.model.draw import Draw, Sampling
from truetune.model.inspect import describe
from truetune.model.load import LoadedModel, load_model
from truetune.model.mode import evaluating
from truetune.model.stop_texts import StopTexts
from truetune.model.tokenizer import load_tokenizer
from truetune.run_dir import opened
from truetune.system.lazy import torch
from truetune.system.threads import begin

Messages = Sequence[Mapping[str, Any]]

# Prompt tokens kept before a streamed text: enough to complete a character.
_CONTEXT = 8
# Rows of a batch whose size memory decides, at most, and where memory or cache are unknown.
_MOST_ROWS, _FEW_ROWS = 256, 16
# Smaller batches gain nothing by shrinking.
_WORTH_SHRINKING = 8


@dataclass(frozen=True)
class Reply:
    """What the model wrote.

    Attributes:
        text: without the stop token; other special tokens as they are.
        ids: the tokens, the stop token included.
        stopped: whether it ended on a stop token, not on the limit.
        prompt_tokens: length of the prompt, a given prefix included.
    """

    text: str
    ids: tuple[int, ...]
    stopped: bool
    prompt_tokens: int


def replies(
    loaded: LoadedModel,
    contract: PromptContract,
    conversations: Sequence[Messages | Conversation],
    sampling: Sampling | None = None,
    *,
    batch_size: int = 16,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[Reply]:
    """One reply per conversation, in their order.

    Args:
        loaded: left in the mode (training or evaluation) it was in.
        contract: makes the prompts and says where replies end.
        conversations: message dicts, each ending where the assistant is to speak; a Conversation
            brings its own tools and template arguments.
        sampling: greedy, 256 tokens where None.
        batch_size: conversations per forward pass.
        tools: offered in every conversation.

    Raises:
        UsageError: a prompt that leaves no room in the model's context; batch_size below 1.
    """
    prompts = [_prompt(contract, messages, tools) for messages in conversations]
    return replies_to_ids(loaded, contract, prompts, sampling, batch_size=batch_size)


def replies_to_ids(
    loaded: LoadedModel,
    contract: PromptContract,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    batch_size: int | None = 16,
    begun: Sequence[Sequence[int]] | None = None,
    places: Sequence[int] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """`replies` to prompts that are ids already: the beginnings of trained rows.

    Args:
        batch_size: None takes as many as half of the free memory holds, 256 at most.
        begun: the first tokens of each reply, if they are known (greedy replies that were read
            off one pass over a likely answer); they count as written, a stop token among them too.
        places: of the prompts in a longer list, which seed what is drawn; their own where None.
        on_progress: is called with the number of replies so far and of all.

    Raises:
        UsageError: as `replies`.
        torch.OutOfMemoryError: a single prompt does not fit; larger batches are halved.
    """
    sampling = sampling or Sampling()
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but it must be at least 1", code="sampling")
    limits = [_limit(loaded, sampling, ids, row) for row, ids in enumerate(prompts)]
    tokens = Tokens(contract.tokenizer)
    empty: list[Sequence[int]] = [()] * len(prompts)
    known = [tuple(ids)[:limit] for ids, limit in zip(begun or empty, limits, strict=True)]
    left = [limit - len(ids) for limit, ids in zip(limits, known, strict=True)]
    stops = set(contract.stop_ids)
    written = {row: ids for row, ids in enumerate(known) if not left[row] or stops & {*ids}}
    whole = [[*prompt, *ids] for prompt, ids in zip(prompts, known, strict=True)]
    most = batch_size or _rows_in_memory(loaded, prompts, limits)
    context = context_length(loaded.transformers_model.config)
    open_rows = [row for row in range(len(prompts)) if row not in written]
    with evaluating(loaded.model):
        for batch in _batches(whole, left, open_rows, most, context):
            for rows, new in _in_memory(loaded, contract, whole, batch, sampling, left, places):
                for row, ids in zip(rows, new, strict=True):
                    written[row] = (*known[row], *ids[: left[row]])
                if on_progress:
                    on_progress(len(written), len(prompts))
    return [_reply(tokens, stops, prompt, written[row]) for row, prompt in enumerate(prompts)]


def stream(
    loaded: LoadedModel,
    contract: PromptContract,
    messages: Messages,
    sampling: Sampling | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    stop_texts: Sequence[str] = (),
) -> Generator[str, None, Reply]:
    """One reply in pieces of printable text, as they come.

    A character of several tokens is held back until it is whole. Closing the generator stops the
    model. The generator returns the Reply, whose text is all pieces together.

    Args:
        stop_texts: the first of them that is written ends the reply, and is no part of its text;
            its tokens are among the Reply's ids.

    Raises:
        UsageError: the prompt leaves no room in the model's context.
    """
    sampling = sampling or Sampling()
    prompt = _prompt(contract, messages, tools)
    limit = _limit(loaded, sampling, prompt, 0)
    worker = _Worker()
    writer = _Writer(Tokens(contract.tokenizer), prompt)
    stops = StopTexts(stop_texts)
    ids: list[int] = []
    stopped = False
    pieces: list[str] = []

    def run() -> None:
        _generate(loaded, contract, [prompt], [0], sampling, limit, worker=worker)

    with evaluating(loaded.model), worker.running(run):
        for token in worker.tokens():
            ids.append(token)
            if token in contract.stop_ids:
                stopped = True
                break
            if piece := stops.add(writer.add(token)):
                pieces.append(piece)
                yield piece
            if stops.found:
                break
        if not stops.found and (piece := stops.add(writer.finish()) + stops.finish()):
            pieces.append(piece)
            yield piece
    return Reply("".join(pieces), tuple(ids), stopped or stops.found, len(prompt))


def _prompt(
    contract: PromptContract,
    messages: Messages | Conversation,
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[int]:
    if isinstance(messages, Conversation):
        return contract.prompt_ids(
            messages.messages, messages.tools or tools, messages.template_kwargs
        )
    return contract.prompt_ids(messages, tools)


def _limit(loaded: LoadedModel, sampling: Sampling, prompt: Sequence[int], row: int) -> int:
    """New tokens that fit after a prompt."""
    context = context_length(loaded.transformers_model.config)
    if context is None:
        return sampling.max_new_tokens
    if len(prompt) >= context:
        raise UsageError(
            f"the prompt has {len(prompt):,} tokens, but the model's context is {context:,}",
            where=f"conversation {row + 1}",
            why="a reply needs room after the prompt",
            fix="shorten the conversation, or use a model with a longer context",
            code="prompt-too-long",
        )
    return min(sampling.max_new_tokens, context - len(prompt))


def _batches(
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    rows: Sequence[int],
    batch_size: int,
    context: int | None,
) -> Iterator[list[int]]:
    """Rows of similar length, the longest first so that memory fails early; none of a batch
    outgrows the context while another one is still written."""
    batch: list[int] = []
    for row in sorted(rows, key=lambda row: (-len(prompts[row]), row)):
        both = [*batch, row]
        # The first of a batch has the longest prompt.
        fits = context is None or len(prompts[both[0]]) + max(limits[r] for r in both) <= context
        if batch and (len(batch) == batch_size or not fits):
            yield batch
            both = [row]
        batch = both
    if batch:
        yield batch


def _in_memory(
    loaded: LoadedModel,
    contract: PromptContract,
    prompts: Sequence[Sequence[int]],
    batch: Sequence[int],
    sampling: Sampling,
    limits: Sequence[int],
    places: Sequence[int] | None,
) -> Iterator[tuple[Sequence[int], list[list[int]]]]:
    """Rows of a batch with their new ids; halves of it where a device's memory runs out."""
    left = [batch]
    while left:
        rows = left.pop(0)
        try:
            asked = [prompts[row] for row in rows]
            limit = max(limits[row] for row in rows)
            drawn = rows if places is None else [places[row] for row in rows]
            written = _generate(loaded, contract, asked, drawn, sampling, limit)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            left[:0] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
            continue
        yield rows, written


def _rows_in_memory(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], limits: Sequence[int]
) -> int:
    """Rows whose keys, values and logits half of the free memory holds."""
    config = loaded.transformers_model.config.get_text_config(decoder=True)
    free = available_bytes(loaded.device)
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "hidden_size", 0)
    if not (free and heads and width and prompts):
        return _FEW_ROWS
    # Every head, not those of keys and values alone: attention may write them out for all heads.
    of_a_head = getattr(config, "head_dim", None) or width // heads
    per_token = 2 * heads * of_a_head * (config.num_hidden_layers + 2) * 4
    longest = max(len(ids) + limit for ids, limit in zip(prompts, limits, strict=True))
    per_row = longest * (per_token + 8 * width) + 6 * 4 * config.vocab_size
    return max(min(free // 2 // per_row, _MOST_ROWS), 1)


def _generate(
    loaded: LoadedModel,
    contract: PromptContract,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    sampling: Sampling,
    limit: int,
    worker: _Worker | None = None,
) -> list[list[int]]:
    """New ids of each prompt, whatever follows a stop token included."""
    from transformers import GenerationConfig

    from truetune.model.growing_cache import can_shrink, growing_cache

    model = loaded.transformers_model
    device = model.get_input_embeddings().weight.device
    width = max(len(ids) for ids in prompts)
    pad = _pad_id(loaded, contract)
    ids_BT = torch.full((len(prompts), width), pad, dtype=torch.int64)
    attended_BT = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, ids in enumerate(prompts):
        ids_BT[row, width - len(ids) :] = torch.tensor(ids, dtype=torch.int64)
        attended_BT[row, width - len(ids) :] = 1
    ids_BT, attended_BT = ids_BT.to(device), attended_BT.to(device)
    draw = Draw(sampling, rows, [len(p) for p in prompts])
    hooks: dict[str, Any] = {"streamer": worker} if worker else {}
    autocast = (
        torch.autocast(device.type, dtype=loaded.compute_dtype)
        if loaded.compute_dtype is not None
        else contextlib.nullcontext()
    )
    stops = list(contract.stop_ids)
    shrinks = worker is None and len(prompts) > _WORTH_SHRINKING and bool(stops)
    # Places in `prompts` of the rows that are still written.
    places = list(range(len(prompts)))
    written: dict[int, list[int]] = {}
    cache = growing_cache(model)
    while places:
        config = GenerationConfig(
            max_new_tokens=limit - (ids_BT.shape[1] - width),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=stops or None,
            return_dict_in_generate=True,
        )
        ended = _HalfEnded(stops) if shrinks else None
        criteria = [worker.is_cancelled] if worker else [ended] if ended else []
        with torch.no_grad(), autocast, _own_config(model, config), _head_on_whole_rows(model):
            out = model.generate(
                ids_BT,
                attention_mask=attended_BT,
                generation_config=config,
                logits_processor=[draw],
                stopping_criteria=criteria,
                **({"past_key_values": cache} if cache is not None else {}),
                **hooks,
            )
        whole_BT = out.sequences
        new: list[list[int]] = whole_BT[:, width:].tolist()
        written |= dict(zip(places, new, strict=True))
        if ended is None or len(new[0]) >= limit:
            break
        live = [at for at, ids in enumerate(new) if not set(stops).intersection(ids)]
        places = [places[at] for at in live]
        cache = out.past_key_values
        if not live:
            break
        if can_shrink(cache):
            kept = torch.tensor(live, device=device)
            cache.batch_select_indices(kept)
            draw.keep(live)
            ids_BT, attended_BT = whole_BT[kept], attended_BT[kept]
        else:
            # Some caches hold more than keys and values: all rows go on to the end.
            shrinks, places, ids_BT = False, list(range(len(prompts))), whole_BT
        more = ids_BT.shape[1] - attended_BT.shape[1]
        attended_BT = torch.cat([attended_BT, attended_BT.new_ones(len(ids_BT), more)], dim=1)
        shrinks = shrinks and len(places) > _WORTH_SHRINKING
    return [written[place] for place in range(len(prompts))]


class _HalfEnded:
    """Ends a stage of generation when half of its rows have ended.

    Args:
        stops: ids that end a row.
    """

    def __init__(self, stops: Sequence[int]) -> None:
        self.stops = stops
        self.ended_B: torch.Tensor | None = None

    def __call__(self, ids_BT: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        stops = torch.tensor(self.stops, device=ids_BT.device)
        now_B = torch.isin(ids_BT[:, -1], stops)
        self.ended_B = now_B if self.ended_B is None else self.ended_B | now_B
        half = 2 * int(self.ended_B.sum()) >= len(ids_BT)
        return torch.full((len(ids_BT),), half, device=ids_BT.device)


def _pad_id(loaded: LoadedModel, contract: PromptContract) -> int:
    """Any id that the model has a row for: padding is masked, and cut off after a stop token."""
    rows = loaded.transformers_model.get_input_embeddings().weight.shape[0]
    candidates = (contract.tokenizer.pad_token_id, *contract.stop_ids, 0)
    return next(i for i in candidates if i is not None and i < rows)


def _reply(
    tokens: Tokens, stop_ids: Collection[int], prompt: Sequence[int], ids: Sequence[int]
) -> Reply:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    if end is None:
        return Reply(tokens.decode_after(prompt, ids), tuple(ids), False, len(prompt))
    text = tokens.decode_after(prompt, ids[:end])
    return Reply(text, tuple(ids[: end + 1]), True, len(prompt))


@contextlib.contextmanager
def _own_config(model: Any, config: Any) -> Iterator[None]:
    """Hide the model's generation_config: generate() takes from it whatever is not set, so that
    a repetition penalty or a list of suppressed tokens would slip in."""
    hidden, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = hidden


@contextlib.contextmanager
def _head_on_whole_rows(model: Any) -> Iterator[None]:
    """Give the output head its input in one piece.

    The hidden states after the prompts, the last of each row, are a slice. torch multiplies a slice
    by one copy of the weight per row: for eight prompts of a model with 0.5B parameters these
    copies are 2 GiB, and take 38 of 43 seconds on a CPU.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


class _Writer:
    """Tokens to text that can be printed: nothing comes out in the middle of a character."""

    def __init__(self, tokens: Tokens, prompt: Sequence[int]) -> None:
        self.tokens = tokens
        self.ids = list(prompt[-_CONTEXT:])
        self.start, self.end = 0, len(self.ids)

    def add(self, token: int) -> str:
        """Text that is whole now; "" while a character is not."""
        self.ids.append(token)
        before, now = self._texts()
        # U+FFFD stands for bytes that are no character yet.
        if now.endswith("\ufffd") or not now.startswith(before) or len(now) == len(before):
            return ""
        self.start, self.end = self.end, len(self.ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What was held back, whole or not."""
        return self.tokens.decode_after(self.ids[self.start : self.end], self.ids[self.end :])

    def _texts(self) -> tuple[str, str]:
        decode = self.tokens.decode
        return decode(self.ids[self.start : self.end]), decode(self.ids[self.start :])


class _Worker:
    """generate() in a thread, token by token: transformers' streamer interface (put, end)."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        self.cancelled, self.done = threading.Event(), threading.Event()
        self.prompt_seen = False

    @contextlib.contextmanager
    def running(self, work: Any) -> Iterator[None]:
        begin(self._run, work)
        try:
            yield
        finally:
            self.cancelled.set()
            self.done.wait()

    def _run(self, work: Any) -> None:
        try:
            work()
            self.queue.put(None)
        except BaseException as error:  # raised again where the pieces are read
            self.queue.put(error)
        finally:
            self.done.set()

    def tokens(self) -> Iterator[int]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield from item

    def put(self, ids: torch.Tensor) -> None:
        # The first call brings the prompt.
        if self.prompt_seen:
            self.queue.put(ids.reshape(-1).tolist())
        self.prompt_seen = True

    def end(self) -> None:
        pass

    def is_cancelled(self, ids_BT: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((len(ids_BT),), self.cancelled.is_set(), device=ids_BT.device)


@dataclass(frozen=True)
class Speaker:
    """A model, the contract it is asked through, and what to call it."""

    name: str
    model: LoadedModel
    contract: PromptContract


def open_speaker(
    source: str,
    chat_template: str | None,
    revision: str | None,
    device: str,
    contract: PromptContract | None = None,
) -> Speaker:
    """Open a run or a model.

    Args:
        contract: to ask it through; its own where None.

    Raises:
        TruetuneError: it cannot be opened.
    """
    folder = opened(source)
    describe(folder, revision)  # says what is wrong with a model before anything of it is loaded
    if contract is None:
        tokenizer = load_tokenizer(folder, revision)
        contract = PromptContract.load(tokenizer, chat_template)
    model = load_model(folder, revision=revision, device=device, purpose="inference")
    return Speaker(source, model, contract)
