"""Sampling and chat: the contract's prompts and stops, the settings given, nothing else."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_families import APART, FAMILIES, MORE
from tiny_models import write_model
from truetune.contract.contract import PromptContract
from truetune.data.conversation import Conversation
from truetune.errors import UsageError
from truetune.generate import Reply, Sampling, replies, replies_to_ids, stream
from truetune.model.draw import Draw
from truetune.model.load import LoadedModel, load_model
from truetune.model.lora import LoraSettings, add_lora

# What must not take part: every one of these would change a greedy reply.
LOUD = {
    "eos_token_id": 257,
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 3,
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(200)),
    "min_new_tokens": 5,
    "max_length": 7,
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("generate") / request.param
    return load_model(write_model(folder, request.param), purpose="inference", device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("generate") / "llama"
    return load_model(write_model(folder, generation=LOUD), purpose="inference", device="cpu")


def contract_of(loaded: LoadedModel, *stops: int) -> PromptContract:
    contract = PromptContract.load(loaded.tokenizer)
    return replace(contract, stop_ids=stops) if stops else contract


def chats(*texts: str) -> list[list[dict[str, Any]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def greedy(loaded: LoadedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """The plainest way: one forward pass over everything for every token."""
    import torch

    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def drained(pieces: Generator[str, None, Reply]) -> tuple[list[str], Reply]:
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


TEXTS = ("hi", "a much longer question, of more than forty tokens", "", "what?", "x" * 20)


def test_greedy_replies_are_those_of_the_plain_loop(loaded: LoadedModel) -> None:
    contract = contract_of(loaded, 300)
    found = replies(loaded, contract, chats(*TEXTS), Sampling(max_new_tokens=12), batch_size=2)
    assert len(found) == len(TEXTS)
    for chat, reply in zip(chats(*TEXTS), found, strict=True):
        prompt = contract.prompt_ids(chat)
        assert list(reply.ids) == greedy(loaded, prompt, 12)
        assert reply.prompt_tokens == len(prompt)
        assert not reply.stopped
        assert reply.text == loaded.tokenizer.decode(reply.ids)


def test_nothing_of_the_models_own_settings_takes_part(llama: LoadedModel) -> None:
    contract = contract_of(llama, 300)
    own = llama.model.generation_config
    (reply,) = replies(llama, contract, chats("hello"), Sampling(max_new_tokens=10))
    assert list(reply.ids) == greedy(llama, contract.prompt_ids(chats("hello")[0]), 10)
    assert llama.model.generation_config is own
    assert own.repetition_penalty == 9.0


def test_replies_end_on_every_stop_of_the_contract(llama: LoadedModel) -> None:
    contract = contract_of(llama, 300)
    sampling = Sampling(max_new_tokens=12)
    plain = replies(llama, contract, chats(*TEXTS), sampling)
    # The tokens at which two of them would come to an end, made stops.
    stops = (plain[0].ids[3], plain[1].ids[5])
    ended = replies(llama, contract_of(llama, *stops), chats(*TEXTS), sampling)
    for before, after in zip(plain, ended, strict=True):
        end = next((i for i, token in enumerate(before.ids) if token in stops), None)
        assert after.stopped == (end is not None)
        assert after.ids == (before.ids if end is None else before.ids[: end + 1])
        kept = before.ids[:end]
        assert after.text == llama.tokenizer.decode(list(kept), skip_special_tokens=False)
    assert ended[0].stopped
    assert ended[1].stopped


def test_special_tokens_that_do_not_stop_stay_in_the_text(llama: LoadedModel) -> None:
    import torch

    class Speaks(torch.nn.Module):
        """Writes <|user|> a <|end|>, whatever is asked."""

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*hidden.shape[:-1], 264)
            logits[..., next(self.script)] = 1
            return logits

    model = load_model(llama.source, purpose="inference")
    head = Speaks()
    head.script = iter([258, 64, 257, 64, 64])  # type: ignore[assignment]
    model.model.lm_head = head
    (reply,) = replies(model, contract_of(llama), chats("q"))
    letter = llama.tokenizer.decode([64])
    assert reply == Reply(f"<|user|>{letter}", (258, 64, 257), True, 3)


def test_the_batch_decides_nothing(llama: LoadedModel) -> None:
    contract = contract_of(llama, 300)
    sampling = Sampling(max_new_tokens=10, temperature=1.0, top_p=0.9, top_k=50, seed=4)
    once = replies(llama, contract, chats(*TEXTS), sampling, batch_size=16)
    assert once == replies(llama, contract, chats(*TEXTS), sampling, batch_size=1)
    assert once == replies(llama, contract, chats(*TEXTS), sampling, batch_size=3)
    assert once != replies(llama, contract, chats(*TEXTS), replace(sampling, seed=5))
    same = replies(llama, contract, chats("hi", "hi"), sampling)
    assert same[0].ids != same[1].ids


def test_the_head_is_not_copied_for_each_row(llama: LoadedModel) -> None:
    """torch multiplies a slice of a batch by a copy of the weight per row, in one `bmm`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func.overloadpacket is torch.ops.aten.bmm:
                shapes.add(tuple(args[1].shape))
            return func(*args, **(kwargs or {}))

    import torch

    weight = llama.transformers_model.get_output_embeddings().weight
    shapes: set[tuple[int, ...]] = set()
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with Calls():
        torch.randn(3, 5, weight.shape[1])[:, -1:] @ weight.T.detach()
        assert shapes == {(3, *weight.T.shape)}
        shapes.clear()
        replies_to_ids(llama, contract_of(llama), prompts, Sampling(max_new_tokens=2))
    assert (3, *weight.T.shape) not in shapes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_that_shrinks_decides_nothing(loaded: LoadedModel, temperature: float) -> None:
    asked = chats(*(f"{'long ' * (at % 5)}question {at}" for at in range(24)))
    sampling = Sampling(max_new_tokens=24, temperature=temperature, repetition_penalty=1.1)
    plain = replies(loaded, contract_of(loaded, 300), asked, sampling, batch_size=1)
    # Stops that end about half of the rows: the others go on without them.
    stops: set[int] = set()
    for token in range(264):
        ended = sum(bool({*stops, token} & set(reply.ids)) for reply in plain)
        stops |= {token} if ended <= 18 else set()
    contract = contract_of(loaded, *stops)
    alone = replies(loaded, contract, asked, sampling, batch_size=1)
    assert 12 <= sum(reply.stopped for reply in alone) < 24
    for size in (24, 10):
        assert replies(loaded, contract, asked, sampling, batch_size=size) == alone
    prompts = [contract.prompt_ids(chat) for chat in asked]
    told: list[tuple[int, int]] = []
    found = replies_to_ids(
        loaded, contract, prompts, sampling, batch_size=None,
        on_progress=lambda *facts: told.append(facts),
    )  # fmt: skip
    assert found == alone
    assert told == [(24, 24)]


@pytest.mark.parametrize("kind", ["lfm2", "qwen2", "gpt_oss"])
def test_caches_of_other_kinds_shrink_or_stay_whole(kind: str, tmp_path: Path) -> None:
    settings = (FAMILIES.get(kind) or MORE.get(kind) or APART[kind][0]) | {}
    loaded = load_model(write_model(tmp_path / kind, kind, **settings), purpose="inference")
    asked = chats(*(f"{'long ' * (at % 3)}question {at}" for at in range(20)))
    sampling = Sampling(max_new_tokens=16)
    plain = replies(loaded, contract_of(loaded, 300), asked, sampling, batch_size=20)
    contract = contract_of(loaded, *{reply.ids[4] for reply in plain[:5]})
    found = replies(loaded, contract, asked, sampling, batch_size=20)
    assert sum(reply.stopped for reply in found) > 0
    for before, after in zip(plain, found, strict=True):
        assert after.ids == before.ids[: len(after.ids)]
        assert after.stopped or len(after.ids) == 16


def test_a_batch_that_does_not_fit_is_halved(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    contract, sampling = contract_of(llama, 300), Sampling(max_new_tokens=4)
    asked = chats(*map(str, range(7)))
    expected = replies(llama, contract, asked, sampling)
    forward, sizes = llama.model.forward, []

    def small(input_ids: torch.Tensor, **more: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("too large")
        sizes.append(len(input_ids))
        return forward(input_ids=input_ids, **more)

    monkeypatch.setattr(llama.model, "forward", small)
    assert replies(llama, contract, asked, sampling) == expected
    assert set(sizes) == {1, 2}


def test_training_is_left_as_it_was(llama: LoadedModel) -> None:
    import random

    import torch

    loaded = add_lora(load_model(llama.source, purpose="lora"), LoraSettings(r=2, dropout=0.5), 0)
    contract = contract_of(loaded, 300)
    loaded.model.train()
    states = torch.random.get_rng_state(), random.getstate()
    sampling = Sampling(max_new_tokens=5, temperature=1.0)
    first = replies(loaded, contract, chats("a", "b"), sampling)
    assert first == replies(loaded, contract, chats("a", "b"), sampling)
    list(stream(loaded, contract, chats("a")[0], sampling))
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert loaded.model.training
    assert loaded.transformers_model.model.layers[0].training
    assert all(p.grad is None for p in loaded.model.parameters())
    loaded.model.eval()
    replies(loaded, contract, chats("a"), sampling)
    assert not loaded.model.training


def test_lora_layers_act_in_replies(llama: LoadedModel) -> None:
    import torch

    loaded = add_lora(load_model(llama.source, purpose="lora"), LoraSettings(r=2), 0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    contract = contract_of(loaded, 300)
    sampling = Sampling(max_new_tokens=8)
    (reply,) = replies(loaded, contract, chats("hi"), sampling)
    loaded.model.eval()
    assert list(reply.ids) == greedy(loaded, contract.prompt_ids(chats("hi")[0]), 8)
    assert reply != replies(llama, contract, chats("hi"), sampling)[0]


def test_tools_reach_the_template(llama: LoadedModel) -> None:
    seen = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(contract, name)

        def prompt_ids(self, messages: Any, tools: Any = None) -> list[int]:
            seen.append(tools)
            return contract.prompt_ids(messages)

    contract = contract_of(llama)
    tools = [{"type": "function", "function": {"name": "now"}}]
    spy: Any = Spy()
    replies(llama, spy, chats("a"), Sampling(max_new_tokens=1), tools=tools)
    list(stream(llama, spy, chats("a")[0], Sampling(max_new_tokens=1), tools=tools))
    assert seen == [tools, tools]


def test_replies_that_are_known_to_begin_go_on_the_same_way(loaded: LoadedModel) -> None:
    contract = contract_of(loaded, 300)
    prompts = [contract.prompt_ids(chat) for chat in chats(*TEXTS, "x" * 240)]
    limit = Sampling(max_new_tokens=12)
    whole = replies_to_ids(loaded, contract, prompts, limit)
    begun = [list(reply.ids[:at]) for at, reply in zip((0, 12, 3, 7, 1, 5), whole, strict=True)]
    assert replies_to_ids(loaded, contract, prompts, limit, begun=begun, batch_size=3) == whole
    # What is longer than asked is cut off, and a stop ends the reply.
    short = Sampling(max_new_tokens=4)
    cut = replies_to_ids(loaded, contract, prompts, short, begun=[r.ids for r in whole])
    assert [r.ids for r in cut] == [r.ids[:4] for r in whole]
    ended = replies_to_ids(loaded, contract, prompts[:1], limit, begun=[[65, 66, 300, 67]])
    assert (ended[0].ids, ended[0].stopped) == ((65, 66, 300), True)
    assert ended[0].text == contract.tokens.decode([65, 66])


def test_the_context_limits_replies_one_by_one(loaded: LoadedModel) -> None:
    contract = contract_of(loaded, 300)
    full, nearly = "x" * 254, "x" * 240
    found = replies(loaded, contract, chats("a", nearly, "b"), Sampling(max_new_tokens=20))
    assert [len(reply.ids) for reply in found] == [20, 256 - 242, 20]
    assert found[0] == replies(loaded, contract, chats("a"), Sampling(max_new_tokens=20))[0]
    with pytest.raises(UsageError, match=r"256 tokens.*context is 256") as caught:
        replies(loaded, contract, chats("a", full))
    assert (caught.value.where, caught.value.exit_code) == ("conversation 2", 2)
    with pytest.raises(UsageError, match="the model's context is"):
        next(stream(loaded, contract, chats(full)[0]))


def test_no_conversations_no_replies(llama: LoadedModel) -> None:
    assert replies(llama, contract_of(llama), []) == []
    with pytest.raises(UsageError, match="batch_size is 0"):
        replies(llama, contract_of(llama), chats("a"), batch_size=0)


def test_settings_out_of_range_are_all_told() -> None:
    with pytest.raises(UsageError, match=r"max_new_tokens is 0.*temperature is -1.*top_p is 0"):
        Sampling(max_new_tokens=0, temperature=-1, top_p=0)
    with pytest.raises(UsageError, match=r"top_k is -1.*repetition_penalty is 0"):
        Sampling(top_k=-1, repetition_penalty=0)


def drawn(probabilities: list[float], num_rows: int = 4000, **settings: Any) -> list[float]:
    """Frequencies of tokens over many rows with the same logits."""
    import torch

    draw = Draw(Sampling(**{"temperature": 1.0} | settings), range(num_rows), [1] * num_rows)
    logits_BV = torch.tensor(probabilities).log().repeat(num_rows, 1)
    ids_BT = torch.zeros(num_rows, 1, dtype=torch.int64)
    tokens = draw(ids_BT, logits_BV).argmax(-1)
    return [float((tokens == token).float().mean()) for token in range(len(probabilities))]


def test_tokens_are_drawn_with_their_probability() -> None:
    probabilities = [0.1, 0.5, 0.15, 0.25]
    assert drawn(probabilities) == pytest.approx(probabilities, abs=0.03)
    assert drawn(probabilities, top_k=2) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert drawn(probabilities, top_k=1) == [0, 1, 0, 0]
    # 0.5 + 0.25 reaches 0.7; 0.15 is outside.
    assert drawn(probabilities, top_p=0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert drawn(probabilities, top_p=0.01) == [0, 1, 0, 0]
    hot = [p**0.5 for p in probabilities]
    expected = [p / sum(hot) for p in hot]
    assert drawn(probabilities, temperature=2.0) == pytest.approx(expected, abs=0.03)
    assert drawn(probabilities, temperature=1e-30) == [0, 1, 0, 0]
    assert drawn([0.0, 0.5, 0.5, 0.0])[0] == 0


def test_repetition_penalty_is_for_prompt_and_reply_but_not_for_padding() -> None:
    import torch

    draw = Draw(Sampling(repetition_penalty=2.0), [0, 1], [3, 1])
    # The second row is padded twice with id 0, and has written a 4.
    ids_BT = torch.tensor([[1, 2, 2, 4], [0, 0, 3, 4]])
    logits_BV = torch.tensor([[1.0, 1.0, -1.0, 1.0, 4.0], [1.0, 1.0, -1.0, 1.0, 4.0]])
    found = draw(ids_BT, logits_BV)
    assert found.tolist() == [[1.0, 0.5, -2.0, 1.0, 2.0], [1.0, 1.0, -1.0, 0.5, 2.0]]
    assert logits_BV[0, 1] == 1.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_reply_in_pieces(llama: LoadedModel, temperature: float) -> None:
    contract = contract_of(llama, 300)
    sampling = Sampling(max_new_tokens=40, temperature=temperature, seed=2)
    pieces, reply = drained(stream(llama, contract, chats("hi")[0], sampling))
    (whole,) = replies(llama, contract, chats("hi"), sampling)
    assert reply == whole
    assert "".join(pieces) == whole.text
    assert all(pieces)


def test_a_stream_ends_on_a_stop(llama: LoadedModel) -> None:
    contract = contract_of(llama, 300)
    (plain,) = replies(llama, contract, chats("hi"), Sampling(max_new_tokens=12))
    stop = plain.ids[4]
    cut = plain.ids[: plain.ids.index(stop) + 1]
    pieces, reply = drained(stream(llama, contract_of(llama, stop), chats("hi")[0]))
    assert (reply.ids, reply.stopped) == (cut, True)
    assert "".join(pieces) == reply.text == llama.tokenizer.decode(list(cut[:-1]))


def test_characters_of_several_tokens_come_out_whole(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "né 你好 \U0001f600\U0001f1ef\U0001f1f5 e\u0301 <|user|> end"
    script = llama.tokenizer.encode(text)
    assert len(script) > len(text)

    def speak(*_: Any, worker: Any, **__: Any) -> None:
        import torch

        worker.put(torch.tensor([[1, 2]]))
        for token in [*script, 257]:
            worker.put(torch.tensor([token]))
        worker.end()

    monkeypatch.setattr("truetune.generate._generate", speak)
    pieces, reply = drained(stream(llama, contract_of(llama), chats("hi")[0]))
    assert "".join(pieces) == reply.text == text
    assert "\ufffd" not in text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "\U0001f600" in pieces
    # A character that is never finished comes out as what it is, at the end.
    script = llama.tokenizer.encode("ab\U0001f600")[:-1]
    pieces, reply = drained(stream(llama, contract_of(llama), chats("hi")[0]))
    assert pieces == ["a", "b", "\ufffd"]
    assert reply.text == "ab\ufffd"


def test_a_closed_stream_stops_the_model(llama: LoadedModel) -> None:
    import threading

    contract = contract_of(llama, 300)
    llama.model.train()
    num_threads = threading.active_count()
    pieces = stream(llama, contract, chats("hi")[0], Sampling(max_new_tokens=200))
    next(pieces)
    assert not llama.model.training
    pieces.close()
    assert llama.model.training
    assert llama.model.generation_config.repetition_penalty == 9.0
    assert threading.active_count() == num_threads
    llama.model.eval()


def test_an_error_in_the_model_reaches_the_reader(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken kernel")

    monkeypatch.setattr(llama.model, "forward", fail)
    with pytest.raises(RuntimeError, match="broken kernel"):
        list(stream(llama, contract_of(llama), chats("hi")[0]))


def test_a_tokenizer_without_pad_token_and_a_model_without_stop(tmp_path: Path) -> None:
    loaded = load_model(write_model(tmp_path / "m"), purpose="inference")
    loaded.tokenizer.pad_token = None
    contract = replace(contract_of(loaded), stop_ids=())
    found = replies(loaded, contract, chats(*TEXTS), Sampling(max_new_tokens=5))
    assert [len(reply.ids) for reply in found] == [5] * len(TEXTS)
    assert found[0] == replies(loaded, contract, chats("hi"), Sampling(max_new_tokens=5))[0]


def test_a_conversation_brings_its_own_tools_and_arguments(llama: LoadedModel) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ mood | default('') }}"
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    )
    contract = PromptContract.load(llama.tokenizer, template)
    tool = {"type": "function", "function": {"name": "look_up"}}
    chat = ({"role": "user", "content": "hi"},)
    asked = [
        Conversation(chat, "a:1"),
        Conversation(chat, "a:2", tools=(tool,)),
        Conversation(chat, "a:3", template_kwargs={"mood": "glad"}),
    ]
    found = replies(llama, contract, asked, Sampling(max_new_tokens=1))
    assert [reply.prompt_tokens for reply in found] == [
        len(contract.tokens.encode([text])[0]) for text in ("hi", "hilook_up", "higlad")
    ]
