"""The primitives with fixed signatures: ChatTemplate, SFTExample, collation, cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny_models import tiny_tokenizer
from truetune import ChatTemplate, SFTExample, masked_cross_entropy, pad_and_collate
from truetune.contract.builtin import builtin_template
from truetune.contract.render import Renderer

pytestmark = pytest.mark.filterwarnings("error")

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Sum?"},
    {"role": "assistant", "content": ""},
]
# Whitespace at the edges, combining marks, emoji, line ends of all kinds, Jinja and role markers.
SAMPLES = ["", " ", "\n", " \n\n", "\r\n", "\t x \u00a0", "\x00", "\u2028", "e\u0301", "\U0001f600"]
SAMPLES += ["{{ x }}", "{% if %}", "{#", USER, ASSISTANT, END]
ODD = st.text(max_size=12) | st.sampled_from(SAMPLES)


def conversations(min_size: int = 1) -> st.SearchStrategy[list[dict[str, str]]]:
    turn = st.builds(
        lambda role, parts: {"role": role, "content": "".join(parts)},
        st.sampled_from(["user", "assistant"]),
        st.lists(ODD, max_size=3),
    )
    return st.lists(turn, min_size=min_size, max_size=5)


class Characters:
    """One id per code point."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def text(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class MarkersFirst(Characters):
    """Role markers are one id each; the rest is characters."""

    markers = (USER, ASSISTANT, END)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            found = next((m for m in self.markers if text.startswith(m)), None)
            ids.append(-1 - self.markers.index(found) if found else ord(text[0]))
            text = text[len(found) if found else 1 :]
        return ids

    def text(self, ids: list[int]) -> str:
        return "".join(self.markers[-1 - i] if i < 0 else chr(i) for i in ids)


class Pairs(Characters):
    """Merges across every seam: two characters an id, from the left."""

    base = 0x110000

    def encode(self, text: str) -> list[int]:
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        return [ord(p[0]) + self.base * (ord(p[1]) + 1 if len(p) == 2 else 0) for p in pairs]

    def text(self, ids: list[int]) -> str:
        parts = [(i % self.base, i // self.base - 1) for i in ids]
        return "".join(chr(a) + (chr(b) if b >= 0 else "") for a, b in parts)


def supervised(encoder: Any, example: SFTExample) -> str:
    return encoder.text([i for i, m in zip(example.ids, example.mask, strict=True) if m])


# ---------------------------------------------------------------- ChatTemplate


def test_markers() -> None:
    assert (ChatTemplate.USER, ChatTemplate.ASSISTANT, ChatTemplate.END) == (USER, ASSISTANT, END)


def test_render_byte_for_byte() -> None:
    assert ChatTemplate().render(CHAT) == (
        "<|user|>\nHi\n<|assistant|>\nHello<|end|><|user|>\nSum?\n<|assistant|>\n<|end|>"
    )


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "system", "content": "x"}],
        [*CHAT, {"role": "User", "content": "x"}],
        [{"content": "x"}],
        [{"role": "user"}],
        [{"role": "assistant", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    ],
)
def test_what_cannot_be_rendered_is_a_value_error(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"message|role|content"):
        ChatTemplate.render(messages)
    with pytest.raises(ValueError, match=r"message|role|content"):
        ChatTemplate.render_with_mask(messages, Characters())


@given(conversations())
def test_render_equals_the_shipped_jinja(messages: list[dict[str, str]]) -> None:
    jinja = Renderer(builtin_template("chatml-lite", tiny_tokenizer()), {}, {})
    assert jinja.render(messages) == ChatTemplate.render(messages)
    prompt = jinja.render(messages, add_generation_prompt=True)
    assert prompt == ChatTemplate.render(messages) + "<|assistant|>\n"


@pytest.mark.parametrize("encoder", [Characters(), MarkersFirst()])
def test_mask_is_on_answers_and_their_end_alone(encoder: Any) -> None:
    example = ChatTemplate().render_with_mask(CHAT, encoder)
    assert isinstance(example, SFTExample)
    assert example.ids == encoder.encode(ChatTemplate.render(CHAT))
    assert supervised(encoder, example) == "Hello<|end|><|end|>"
    text = ChatTemplate.render(CHAT)
    spans = [("<|user|>\nHi\n<|assistant|>\n", 0), ("Hello<|end|>", 1)]
    spans += [("<|user|>\nSum?\n<|assistant|>\n", 0), ("<|end|>", 1)]
    assert "".join(part for part, _ in spans) == text
    assert example.mask == [m for part, m in spans for _ in encoder.encode(part)]


@given(conversations())
def test_mask_with_one_id_per_character(messages: list[dict[str, str]]) -> None:
    encoder = Characters()
    example = ChatTemplate.render_with_mask(messages, encoder)
    assert example.ids == encoder.encode(ChatTemplate.render(messages))
    answers = [m["content"] + END for m in messages if m["role"] == "assistant"]
    assert supervised(encoder, example) == "".join(answers)
    assert set(example.mask) <= {0, 1}


@given(conversations())
def test_mask_with_a_tokenizer_that_merges_across_the_seams(
    messages: list[dict[str, str]],
) -> None:
    encoder = Pairs()
    example = ChatTemplate.render_with_mask(messages, encoder)
    assert example.ids == encoder.encode(ChatTemplate.render(messages))
    # Every pair that holds a character of an answer is supervised, and no other.
    answered: list[bool] = []
    for message in messages:
        answer = message["role"] == "assistant"
        head = ASSISTANT + "\n" if answer else f"{USER}\n{message['content']}\n"
        answered += [False] * len(head)
        answered += [True] * len(message["content"] + END) if answer else []
    assert example.mask == [int(any(answered[i : i + 2])) for i in range(0, len(answered), 2)]


def test_mask_with_a_transformers_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    example = ChatTemplate.render_with_mask(CHAT, tokenizer)
    assert example.ids == tokenizer.encode(ChatTemplate.render(CHAT))
    kept = [i for i, m in zip(example.ids, example.mask, strict=True) if m]
    assert tokenizer.decode(kept) == "Hello<|end|><|end|>"


def test_an_example_is_a_named_tuple() -> None:
    example = SFTExample([5, 6, 7], [1, 0, 1])
    assert isinstance(example, tuple)
    assert example._fields == ("ids", "mask")
    assert example == ([5, 6, 7], [1, 0, 1])
    ids, mask = example
    assert (ids, mask) == (example.ids, example.mask)
    assert SFTExample(mask=[0], ids=[1]) == SFTExample([1], [0])
    # The first token has no predecessor that could be trained to write it.
    assert example.num_supervised == 1


# ---------------------------------------------------------------- pad_and_collate


def test_collate_shifts_once_and_pads_right() -> None:
    rows = [SFTExample([1, 2, 3, 4], [0, 0, 1, 1]), SFTExample([5, 6], [1, 1]), ([7], [1])]
    x, y, mask = pad_and_collate(rows, max_seq_len=6, pad_id=9)
    for tensor in (x, y, mask):
        assert tensor.shape == (3, 5)
        assert tensor.dtype == torch.int64
    assert x.tolist() == [[1, 2, 3, 4, 9], [5, 6, 9, 9, 9], [7, 9, 9, 9, 9]]
    assert y.tolist() == [[2, 3, 4, 9, 9], [6, 9, 9, 9, 9], [9] * 5]
    assert mask.tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5]


def test_collate_of_an_exact_fit_does_not_warn() -> None:
    x, y, mask = pad_and_collate([([1, 2, 3], [0, 1, 1])], max_seq_len=3, pad_id=0)
    assert (x.tolist(), y.tolist(), mask.tolist()) == ([[1, 2]], [[2, 3]], [[1, 1]])


def test_collate_keeps_the_head_and_warns_with_the_count() -> None:
    rows = [([1, 2, 3, 4, 5], [0, 1, 1, 1, 1]), ([1, 2], [0, 1]), ([6, 7, 8, 9], [0, 0, 0, 1])]
    with pytest.warns(UserWarning, match=r"2 of 3 .* max_seq_len=3"):
        x, y, mask = pad_and_collate(rows, max_seq_len=3, pad_id=0)
    assert x.tolist() == [[1, 2], [1, 2], [6, 7]]
    assert y.tolist() == [[2, 3], [2, 0], [7, 8]]
    assert mask.tolist() == [[1, 1], [1, 0], [0, 0]]


def test_collate_keeps_the_last_token_of_a_short_example_among_the_inputs() -> None:
    x, y, mask = pad_and_collate([([10, 11, 12], [0, 1, 1])], max_seq_len=5, pad_id=99)
    assert x.tolist() == [[10, 11, 12, 99]]
    assert y.tolist() == [[11, 12, 99, 99]]
    assert mask.tolist() == [[1, 1, 0, 0]]


def test_collate_never_supervises_padding_whatever_the_pad_id_is() -> None:
    _, _, mask = pad_and_collate([([3, 3], [1, 1]), ([3], [1])], max_seq_len=5, pad_id=3)
    assert mask.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("rows", "max_seq_len", "message"),
    [
        ([], 4, "at least one example"),
        ([([1, 2], [1, 1])], 1, "max_seq_len"),
        ([([1, 2], [1, 1])], 0, "max_seq_len"),
        ([([1, 2], [0, 1]), ([1, 2, 3], [1, 1])], 4, "example 1: 3 ids but 2 mask"),
    ],
)
def test_collate_refuses(rows: list[Any], max_seq_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pad_and_collate(rows, max_seq_len=max_seq_len, pad_id=0)


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 1)), max_size=7), min_size=1),
    st.integers(7, 12),
)
def test_collate_aligns_every_target(rows: list[list[tuple[int, int]]], width: int) -> None:
    examples = [SFTExample([i for i, _ in row], [m for _, m in row]) for row in rows]
    x, y, mask = pad_and_collate(examples, max_seq_len=width, pad_id=100)
    assert x.shape == (len(rows), width - 1)
    for b, row in enumerate(rows):
        padded = [*row, *[(100, 0)] * (width - len(row))]
        expected = [(padded[t][0], *padded[t + 1]) for t in range(width - 1)]
        assert list(zip(x[b].tolist(), y[b].tolist(), mask[b].tolist(), strict=True)) == expected


# ---------------------------------------------------------------- masked_cross_entropy


def naive(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> float:
    total = weight = 0.0
    for b in range(logits.shape[0]):
        for t in range(logits.shape[1]):
            if w := float(mask[b, t]):
                row = logits[b, t].double()
                nats = float(row.exp().sum().log() - row[int(targets[b, t])])
                total, weight = total + w * nats, weight + w
    return total / weight


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.float16])
def test_cross_entropy_is_the_mean_over_the_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    mask = (torch.rand(3, 5) < 0.5).to(dtype)
    loss = masked_cross_entropy(logits, targets, mask)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert float(loss) == pytest.approx(naive(logits, targets, mask), abs=1e-6)


def test_cross_entropy_weighs_by_a_float_mask() -> None:
    torch.manual_seed(1)
    logits, targets = torch.randn(2, 4, 5), torch.randint(5, (2, 4))
    mask = torch.tensor([[0.0, 0.25, 2.0, 1.0], [0.5, 0.0, 0.0, 3.0]])
    loss = masked_cross_entropy(logits, targets, mask)
    assert float(loss) == pytest.approx(naive(logits, targets, mask), abs=1e-6)
    flat = masked_cross_entropy(logits, targets, (mask > 0).long())
    assert abs(float(loss) - float(flat)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_counts_a_half_precision_mask_exactly(dtype: torch.dtype) -> None:
    # 4,099 is no number of float16 or bfloat16.
    logits = torch.zeros(1, 4099, 4)
    targets = torch.zeros(1, 4099, dtype=torch.int64)
    loss = masked_cross_entropy(logits, targets, torch.ones(1, 4099, dtype=dtype))
    assert float(loss) == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_an_empty_mask_gives_zero_and_a_usable_gradient(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 4, requires_grad=True)
    targets = torch.full((2, 3), -100)
    loss = masked_cross_entropy(logits, targets, torch.zeros(2, 3, dtype=dtype))
    assert loss.item() == 0.0
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_stands_at_unsupervised_positions_is_harmless(bad: float) -> None:
    torch.manual_seed(2)
    clean = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    targets = torch.randint(4, (2, 3))
    dirty_targets = torch.where(mask == 1, targets, torch.tensor([10**9, -100, -1]))
    expected = clean.clone().requires_grad_()
    masked_cross_entropy(expected, targets, mask).backward()
    dirty = torch.where((mask == 1)[..., None], clean, torch.tensor(bad)).requires_grad_()
    loss = masked_cross_entropy(dirty, dirty_targets, mask)
    loss.backward()
    assert loss.item() == pytest.approx(naive(clean, targets, mask), abs=1e-6)
    assert dirty.grad is not None
    assert expected.grad is not None
    assert torch.equal(dirty.grad, expected.grad)


def test_cross_entropy_computes_bfloat16_logits_in_float32() -> None:
    torch.manual_seed(3)
    logits = torch.randn(2, 3, 50).bfloat16()
    targets, mask = torch.randint(50, (2, 3)), torch.ones(2, 3)
    loss = masked_cross_entropy(logits, targets, mask)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(naive(logits, targets, mask), abs=1e-6)


def test_a_broken_logit_at_a_supervised_position_shows() -> None:
    logits = torch.zeros(1, 2, 3)
    logits[0, 1, 0] = math.nan
    loss = masked_cross_entropy(logits, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    assert math.isnan(float(loss))
