"""Model folders that were made to do harm, or are merely damaged: refused within seconds and in
bounded memory; sound ones pass."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_models import edit_json, write_model
from truetune.errors import ModelError
from truetune.model.inspect import ModelFacts, look_at, require_weights
from truetune.model.load import load_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
DEEP = '{"model_type": "llama", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
LONG = '{"model_type": "llama", "x": [' + "[]," * 6_000_000 + "1]}"
Edit = Callable[[Path], Any]


def config(**changes: Any) -> Edit:
    return lambda folder: edit_json(folder / "config.json", **changes)


def generation(**changes: Any) -> Edit:
    return lambda folder: edit_json(folder / "generation_config.json", **changes)


def endless(name: str) -> Edit:
    """A name that leads to what has no end."""

    def edit(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return edit


def text(name: str, content: str) -> Edit:
    return lambda folder: (folder / name).write_text(content)


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "tokenizer.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return edit


def normalizers(*inside: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(inside)}


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        made = normalizers(made)
    return made


def growing(times: int) -> dict[str, Any]:
    """Each step makes a hundred of one."""
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    return normalizers(*[one] * times)


def splitting(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def set_id(number: int) -> Edit:
    def change(value: dict[str, Any]) -> None:
        vocabulary = value["model"]["vocab"]
        vocabulary[next(iter(vocabulary))] = number

    return tokenizer(change)


def shards(weight_map: Any) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit


def twice(name: str, key: str, first: Any, second: Any) -> Edit:
    """A key with two values, which no JSON library writes."""

    def edit(folder: Path) -> None:
        path = folder / name
        value = json.loads(path.read_text())
        value.pop(key, None)
        rest = json.dumps(value)[1:]
        path.write_text(f'{{"{key}": {json.dumps(first)}, "{key}": {json.dumps(second)}, {rest}')

    return edit


def many_added(value: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    value["added_tokens"] += [
        {"id": 1000 + i, "content": f"<{i}>", **flags} for i in range(200_000)
    ]


def beside(template: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(template)

    return edit


# What no size of a model can be; of some architectures text would be multiplied into a long one.
NO_SIZES = ("x", [], {}, -1, 0, 1.5, 10**9, 10**30)
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
HOSTILE: dict[str, Edit] = {
    **{f"{name} is {value!r}": config(**{name: value}) for name in SIZES for value in NO_SIZES},
    "two eos in the config": twice("config.json", "eos_token_id", 257, 0),
    "two eos in the generation config": twice("generation_config.json", "eos_token_id", 257, 0),
    "two eos in the tokenizer's config": twice(
        "tokenizer_config.json", "eos_token", "<|end|>", "<|pad|>"
    ),
    "two templates": twice("tokenizer_config.json", "chat_template", "{{ 1 }}", "{{ 2 }}"),
    **{f"deep {name}": text(name, DEEP) for name in ("config.json", "tokenizer_config.json")},
    **{f"deep {name}": text(name, DEEP) for name in ("generation_config.json", "tokenizer.json")},
    **{f"long {name}": text(name, LONG) for name in ("config.json", "tokenizer_config.json")},
    **{
        f"endless {name}": endless(name)
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    },
    **{
        f"empty {name}": text(name, "")
        for name in ("config.json", "tokenizer.json", "model.safetensors")
    },
    **{
        f"{name} is a list": text(name, "[1]")
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    },
    "a header longer than the file": text("model.safetensors", "\x7f" * 8 + "{}"),
    "a header that is no JSON": text("model.safetensors", "\x08" + "\0" * 7 + "nonsense"),
    "eos is text": config(eos_token_id="x"),
    "eos is a list of text": config(eos_token_id=["x"]),
    "eos is true": config(eos_token_id=True),
    "eos is 2^32": config(eos_token_id=2**32),
    "generation eos is text": generation(eos_token_id="x"),
    "generation eos is an object": generation(eos_token_id={"a": 1}),
    "generation eos is -7": generation(eos_token_id=-7),
    "layers 1e6": config(num_hidden_layers=10**6),
    "layers 1e12": config(num_hidden_layers=10**12),
    "layers are text": config(num_hidden_layers="many"),
    "labels 1e9": config(num_labels=10**9),
    "labels of a part": config(text_config={"num_labels": 10**9}),
    "long template": text("chat_template.jinja", "{#" + " " * 2**21 + "#}"),
    "long template beside it": beside("{#" + " " * 2**21 + "#}"),
    "added tokens 2e5": tokenizer(many_added),
    "layers of a part": config(text_config={"num_hidden_layers": 10**9}),
    "heads 0": config(num_attention_heads=0),
    "vocabulary -5": config(vocab_size=-5),
    "vocabulary 1e10": config(vocab_size=10**10),
    "activation": config(hidden_act="evil"),
    "rope": config(rope_scaling={"rope_type": "evil"}),
    "dtype": config(dtype="evil"),
    "quantised by name alone": config(
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    "quantised by gptq alone": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "quantised in no known way": config(quantization_config={"quant_method": "evil"}),
    "model_type is a list": config(model_type=["llama"]),
    "remote code": config(model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
    "normalizer grows": tokenizer(lambda value: value.update(normalizer=growing(20))),
    "id 2^32": set_id(2**32),
    "pointer as config": text("config.json", POINTER),
    "pointer as weights": text("model.safetensors", POINTER),
    "pointer as tokenizer": text("tokenizer.json", POINTER),
    "shards outside": shards({"a": "../../../etc/passwd"}),
    "shards are numbers": shards({"a": 5, "b": ["x"]}),
}
# Odd, and of no harm.
SOUND: dict[str, Edit] = {
    "as it is": lambda folder: None,
    "one eos, twice": twice("config.json", "eos_token_id", 257, 257),
    "no stop": config(eos_token_id=None),
    "several stops": generation(eos_token_id=[257, 0]),
    "a pad of -1": config(pad_token_id=-1),
    # Attention is this machine's choice: a name from a folder is not looked up, let alone fetched.
    "attention from a repository": config(attn_implementation="evil/kernel"),
    "attention that is not installed": config(_attn_implementation="flash_attention_2"),
    "a normalizer in a normalizer": tokenizer(lambda value: value.update(normalizer=nested(5))),
    "a pattern": tokenizer(
        lambda value: value.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    splitting(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"),
                    value["pre_tokenizer"],
                ],
            }
        )
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("whole"))


def opened(folder: Path) -> ModelFacts:
    facts, _ = look_at(folder)
    require_weights(folder)
    return facts


def loaded(folder: Path) -> None:
    """With its weights: only they contradict some sizes."""
    opened(folder)
    load_model(folder, purpose="inference", device="cpu")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused(tmp_path, whole, name):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    HOSTILE[name](folder)
    start = time.process_time()
    with pytest.raises(ModelError) as caught:
        loaded(folder)
    assert time.process_time() - start < 10
    assert caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_folder_passes(tmp_path, whole, name):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    SOUND[name](folder)
    assert opened(folder).num_layers == 2
