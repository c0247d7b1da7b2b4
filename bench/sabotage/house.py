"""Tokenizers, random models and rows that the cases are made of.

Two houses: `real` has the tokenizers and templates of published models, from a folder beside the
repository; `small` makes tokenizers with the same habits, so that the suite runs anywhere.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any, Literal

Kind = Literal["instruct", "base", "thinking", "bos"]

MODELS = Path(__file__).parents[3] / "shared" / "models"
REAL: dict[Kind, str] = {
    "instruct": "qwen2.5-0.5b-instruct",
    "base": "qwen2.5-0.5b-base",
    "thinking": "qwen3-0.6b",
    "bos": "llama-3.2-1b-instruct",
}

CHATML = (
    "{%- if messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}"
    "{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
NO_END = CHATML.replace("m.content ~ '<|im_end|>\\n'", "m.content ~ '\\n'")
# Thinking is kept in the last turn only, as served; an answer without any gets an empty block.
THINKING = (
    "{%- set last = namespace(at=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set last.at = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- set c = m.content -%}"
    "{%- if m.role == 'assistant' -%}{%- set t = '' -%}{%- if '</think>' in c -%}"
    "{%- set t = c.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}"
    "{%- set c = c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{%- if loop.index0 > last.at -%}"
    "{%- set c = '<think>\\n' ~ t ~ '\\n</think>\\n\\n' ~ c -%}{%- endif -%}{%- endif -%}"
    "{{- '<|im_start|>' ~ m.role ~ '\\n' ~ c ~ '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
LLAMA3 = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ m.content ~ '<|eot_id|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)
_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|reserved_1|>", "<|reserved_2|>")
_LLAMA_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


class House:
    """Where tokenizers and models come from.

    Args:
        real: tokenizers of published models instead of small ones.
    """

    def __init__(self, real: bool) -> None:
        self.real = real
        self.name = "real" if real else "small"

    def tokenizer(self, kind: Kind = "instruct") -> Any:
        """A fresh tokenizer, as a folder loads it."""
        return copy.deepcopy(_loaded(self.folder(kind)))

    def folder(self, kind: Kind) -> str:
        """The folder of a tokenizer."""
        return str(MODELS / REAL[kind]) if self.real else _small_folder(kind)

    def model(
        self, tokenizer: Any, *, dtype: Any = None, tied: bool = False, **changes: Any
    ) -> Any:
        """A random Llama of one layer, with spare rows beyond the tokenizer, as models have."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        rows = (len(tokenizer) + 64) // 64 * 64 + 64
        settings = {
            "vocab_size": rows,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": _own_eos(self, tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": tied,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
        with torch.no_grad():
            # Large enough that what a token attends to shows in the logits, as in a trained model.
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "embed" not in name and "lm_head" not in name:
                    parameter.mul_(10)
        return model.to(dtype) if dtype is not None else model


def _own_eos(house: House, tokenizer: Any) -> int:
    """What the model's own config names, before anybody changed the tokenizer."""
    kept = (tokenizer.init_kwargs or {}).get("eos_token")
    token = getattr(kept, "content", kept)
    return tokenizer.convert_tokens_to_ids(token) if token else tokenizer.eos_token_id


@functools.cache
def _loaded(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def _small_folder(kind: Kind) -> str:
    """Bytes, a few words and the special tokens of a family; saved, so that it loads as others."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    special = _LLAMA_TOKENS if kind == "bos" else _CHATML_TOKENS
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f" {answer(i)} {question(i)}" for i in range(40)], trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    template = THINKING if kind == "thinking" else CHATML
    if kind == "base":
        names["eos_token"] = "<|endoftext|>"
    if kind == "bos":
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        template = LLAMA3
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A",
            pair="<|begin_of_text|> $A $B",
            special_tokens=[("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))],
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    folder = scratch(kind)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sabotage-")


def scratch(name: str) -> str:
    """A new empty folder for what a case writes; it is removed when the process ends."""
    return tempfile.mkdtemp(prefix=f"{name}-", dir=_scratch().name)


# ------------------------------------------------------------------ rows

_THINGS = ("river", "castle", "market", "orchard", "harbour", "mill", "bridge", "garden")
_PLACES = ("Stowick", "Zaindfield", "Burbarrow", "Matholm", "Fastwick", "Flanbarrow")


def question(i: int) -> str:
    """Row i's question; no two are the same."""
    return f"What is number {i} of the {_THINGS[i % 8]} in {_PLACES[i % 6]}?"


def answer(i: int, words: int = 0) -> str:
    """Row i's answer, of different lengths; `words` asks for about as many."""
    long = " ".join(f"and the {_THINGS[(i + k) % 8]}" for k in range(words // 3 or i % 4))
    return f"It is the {_THINGS[(i * 3) % 8]} of {_PLACES[(i * 5) % 6]} {long}".strip() + "."


def messages(i: int, *, turns: int = 1, reply: Any = answer) -> list[dict[str, str]]:
    """A conversation; no two begin alike."""
    found = []
    for turn in range(turns):
        number = i + 1000 * turn
        found.append({"role": "user", "content": question(number)})
        found.append({"role": "assistant", "content": reply(number)})
    return found


def thought(i: int) -> str:
    """An answer with reasoning in front."""
    return f"<think>\nThe {_THINGS[i % 8]} comes to mind.\n</think>\n\n{answer(i)}"
