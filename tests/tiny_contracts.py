"""Small tokenizers and chat templates, one per habit, and the central equation as a check."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from truetune import Encoded, PromptContract
from truetune.contract.shape import Markers, shown

MARKERS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<s>", "</s>")
WORDS = (
    "the quick brown fox jumps over the lazy dog\n\nand then it answers: yes, no, maybe.\n"
    "Question? Answer!\n\nHello there.\n\nHello world.\n\n### Instruction:\n### Response:\n"
)

# ------------------------------------------------------------------ tokenizers


def _finished(backend: Any, special: Sequence[str], **names: Any) -> Any:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    backend.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = PLAIN
    return tokenizer


@cache
def _trained_byte_level() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=list(MARKERS), show_progress=False
    )
    backend.train_from_iterator([WORDS] * 3, trainer)
    return backend.to_str()


def byte_level(own_bos: bool = False) -> Any:
    """Byte-level BPE with merges, which also merge line breaks; `own_bos`: it begins every text
    with a BOS of its own."""
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(_trained_byte_level())
    if own_bos:
        bos = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
        )
    return _finished(backend, MARKERS, bos_token="<s>", eos_token="<|end|>", pad_token="<|pad|>")


def prefix_space() -> Any:
    """As SentencePiece has it: spaces are a letter, one is put before every text and after every
    special token; what it does not know becomes <unk>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", *MARKERS], show_progress=False
    )
    backend.train_from_iterator([WORDS] * 3, trainer)
    return _finished(
        backend,
        MARKERS,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<unk>",
    )


@cache
def _trained_byte_fallback() -> str:
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", *MARKERS], show_progress=False
    )
    backend.train_from_iterator(WORDS.replace(" ", "\u2581").split("\n") * 3, trainer)
    made = json.loads(backend.to_str())
    vocabulary = made["model"]["vocab"]
    # Bytes are plain entries of the vocabulary, no tokens that a text is split at.
    vocabulary |= {f"<0x{i:02X}>": len(vocabulary) + i for i in range(256)}
    return json.dumps(made)


def byte_fallback() -> Any:
    """As Llama 2 has it: a normaliser makes spaces a letter and puts one in front of every piece;
    what has no letter is spelt in bytes."""
    from tokenizers import Tokenizer

    return _finished(
        Tokenizer.from_str(_trained_byte_fallback()),
        MARKERS,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<unk>",
    )


def one_token_for_all() -> Any:
    """As GPT-2 has it: begin, end and unknown are the same token."""
    tokenizer = byte_level()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.unk_token = "<|end|>"
    return tokenizer


# ------------------------------------------------------------------ templates


def _turns(body: str, prompt: str = "<|assistant|>\n", start: str = "", end: str = "") -> str:
    generation = "{%- if add_generation_prompt -%}{{- '" + prompt + "' -}}{%- endif -%}"
    return (
        start
        + "{%- for m in messages -%}"
        + body
        + "{%- endfor -%}"
        + (end or "")
        + generation.replace("\n", "\\n")
    )


_TURN = "{{- '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>\\n' -}}"

PLAIN = _turns(_TURN)
BOS = _turns(_TURN, start="{{- bos_token -}}")
TRIMMING = _turns(_TURN.replace("m.content", "m.content | trim"))
NO_SYSTEM = _turns(
    "{%- if m.role == 'system' -%}{{- raise_exception('no system turn here') -}}{%- endif -%}"
    + _TURN
)
# The end of the text stands behind the last turn only, so history is not what was answered.
END_OF_TEXT = _turns(
    "{{- '<|' ~ m.role ~ '|>\\n' ~ m.content -}}"
    "{%- if m.role == 'user' -%}{{- '\\n' -}}{%- elif loop.last -%}{{- '</s>' -}}{%- endif -%}"
)
# Thinking is taken out of all turns before the last question.
THINKING = _turns(
    "{%- set c = m.content -%}"
    "{%- if m.role == 'assistant' and '</think>' in c and loop.index0 < last.at -%}"
    "{%- set c = c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{- '<|' ~ m.role ~ '|>\\n' ~ c ~ '<|end|>\\n' -}}",
    start="{%- set last = namespace(at=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set last.at = loop.index0 -%}{%- endif -%}{%- endfor -%}",
)
# An empty think block before answers without reasoning, unless thinking is switched off: then it
# is part of the prompt.
HYBRID = (
    "{%- for m in messages -%}{{- '<|' ~ m.role ~ '|>\\n' -}}"
    "{%- if m.role == 'assistant' -%}"
    "{{- '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- m.content ~ '<|end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}"
    "{%- if thinking is defined and thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}"
    "{%- endif -%}{%- endif -%}"
)
OPENS_THINKING = _turns(_TURN, prompt="<|assistant|>\n<think>\n")
NO_TERMINATOR = _turns("{{- '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '\\n' -}}")
# An end marker that is no token of these tokenizers.
UNKNOWN_TERMINATOR = _turns(
    "{{- '\\n### ' ~ m.role ~ '\\n' ~ m.content ~ '(end)' -}}", prompt="\n### assistant\n"
)
# Answers are closed by nothing at all.
OPEN_ENDED = _turns("{{- '\\n### ' ~ m.role ~ '\\n' ~ m.content -}}", prompt="\n### assistant\n")
DELETING = _turns(
    "{%- set c = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content -%}"
    "{{- '<|' ~ m.role ~ '|>\\n' ~ c ~ '<|end|>\\n' -}}"
)
DATED = _turns(
    _TURN,
    start="{{- 'Today: ' ~ (date_string if date_string is defined else strftime_now('%d %b %Y'))"
    " ~ '\\n' -}}",
)
TOOLS = (
    "{%- if tools -%}{{- '<|system|>\\n' -}}{%- for t in tools -%}{{- t | tojson ~ '\\n' -}}"
    "{%- endfor -%}{{- '<|end|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|' ~ m.role ~ '|>\\n' ~ m.content -}}"
    "{%- for call in m.tool_calls or [] -%}"
    "{{- '\\n' ~ {'name': call.function.name, 'arguments': call.function.arguments} | tojson -}}"
    "{%- endfor -%}{{- '<|end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)

# ------------------------------------------------------------------ rows


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def supervised_texts(contract: PromptContract, encoded: Encoded) -> list[str]:
    """The supervised runs of all examples, decoded, in order."""
    texts = []
    for ids, mask in encoded:
        run: list[int] = []
        for token, on in [*zip(ids, mask, strict=True), (0, 0)]:
            if on:
                run.append(token)
            elif run:
                texts.append(contract.tokens.decode(run))
                run = []
    return texts


# ------------------------------------------------------------------ the central equation


def require_equation(
    contract: PromptContract,
    messages: Sequence[Mapping[str, Any]],
    encoded: Encoded,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Token for token: served prompt + completion == the ids trained on through each turn; only
    completions are supervised; a branch shares what it says with its parent."""
    assert len(encoded) == len(encoded.parents) == len(encoded.shared) == len(encoded.turns)
    shown = [{k: v for k, v in m.items() if k != "train"} for m in messages]
    for example, turns in zip(encoded, encoded.turns, strict=True):
        assert turns, "an example trains no turn"
        expected = [0] * len(example.ids)
        end = 0
        for turn in turns:
            served = contract.prompt_ids(shown[:turn], tools)
            # Where reasoning goes another way than its field, messages are sent in that form.
            if encoded.route in ("", "reasoning_content"):
                assert served == served_by_transformers(contract, shown[:turn], tools)
            assert example.ids[: len(served)] == served
            assert len(served) >= end, "a later prompt is shorter than the turn before it"
            stops = (
                i
                for i in range(len(served), len(example.ids))
                if example.ids[i] in contract.stop_ids
            )
            end = next(stops) + 1
            expected[len(served) : end] = [1] * (end - len(served))
        assert end == len(example.ids), "something stands after the last stop"
        assert example.mask == expected
    for index, parent in enumerate(encoded.parents):
        assert (parent is None) == (index == 0)
        if parent is not None:
            ours, theirs = encoded[index].ids, encoded[parent].ids
            shared = encoded.shared[index]
            assert 0 < shared < min(len(ours), len(theirs))
            assert ours[:shared] == theirs[:shared]
            assert ours[shared] != theirs[shared]
    trained = [turn for turns in encoded.turns for turn in turns]
    assert len(trained) == len(set(trained)), "a turn is supervised twice"


def served_by_transformers(
    contract: PromptContract,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[int]:
    """What a server built on transformers sends, arguments of calls in the template's form."""
    ids = contract.tokenizer.apply_chat_template(
        shown(
            [dict(m) for m in messages], contract.behaviour().shape, "reasoning_content", Markers()
        ),
        tools=list(tools) if tools else None,
        chat_template=contract.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **contract.template_kwargs,
    )
    return list(ids)
