"""Ways to change a finished run behind its back: each must be caught by `truetune verify`.

Every tampering takes the run's folder, a copy that may be spoilt, beside the base in `base/`. Those
of `ADAPTER` are for a run with --lora, those of `MODEL` for one that trained all weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tampering = Callable[[Path], None]
Tensors = dict[str, Any]


def artifact(run: Path) -> Path:
    return next(run / name for name in ("adapter", "model") if (run / name).is_dir())


def json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edit(name: str, change: Callable[[Any], Any], *, inside: bool = True) -> Tampering:
    """Change a JSON file; `change` works in place."""

    def tamper(run: Path) -> None:
        path = (artifact(run) if inside else run) / name
        value = json_of(path)
        change(value)
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")

    return tamper


def setting(name: str, key: str, value: Any) -> Tampering:
    """Set a key of a JSON file of the artifact; None takes it away."""

    def change(found: Any) -> None:
        found.pop(key, None)
        if value is not None:
            found[key] = value

    return edit(name, change)


def text(name: str, change: Callable[[str], str], *, inside: bool = True) -> Tampering:
    def tamper(run: Path) -> None:
        path = (artifact(run) if inside else run) / name
        before = path.read_text(encoding="utf-8")
        after = change(before)
        assert before != after, f"{name} was not changed"
        path.write_text(after, encoding="utf-8")

    return tamper


def weights(change: Callable[[Tensors], Any], *, of_base: bool = False) -> Tampering:
    """Change tensors; `change` works in place."""

    def tamper(run: Path) -> None:
        from safetensors.torch import load_file, save_file

        (path,) = (run.parent / "base" if of_base else artifact(run)).glob("*.safetensors")
        tensors = load_file(path)
        before = dict(tensors)
        change(tensors)
        # What is equal already, as the norms of weights that nobody trained are, cannot be swapped.
        assert before.keys() != tensors.keys() or any(
            not tensors[name].equal(tensor) for name, tensor in before.items()
        ), "no tensor was changed"
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})

    return tamper


def one(tensors: Tensors, part: str, at: int = 0) -> str:
    """The name of a tensor that holds this part."""
    return sorted(name for name in tensors if part in name)[at]


def swap(part: str, other: str | None = None) -> Callable[[Tensors], None]:
    """Exchange two tensors: the first and last with this part, or one each."""

    def change(tensors: Tensors) -> None:
        a = one(tensors, part)
        b = one(tensors, other) if other else one(tensors, part, -1)
        assert a != b
        tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()

    return change


def scale(part: str, factor: float, at: int = 0) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        name = one(tensors, part, at)
        tensors[name] = tensors[name] * factor

    return change


def noise(part: str, share: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        import torch

        name = one(tensors, part)
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(tensors[name].shape, generator=generator)
        value = tensors[name]
        tensors[name] = (value + random * value.float().std() * share).to(value.dtype)

    return change


def eight_bits(tensors: Tensors) -> None:
    name = one(tensors, "down_proj")
    step = tensors[name].float().abs().max() / 127
    tensors[name] = ((tensors[name].float() / step).round() * step).to(tensors[name].dtype)


def swap_layers(tensors: Tensors) -> None:
    for name in [n for n in tensors if ".layers.0." in n]:
        other = name.replace(".layers.0.", ".layers.1.")
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()


def swap_rows(tensors: Tensors) -> None:
    name = one(tensors, "embed_tokens")
    rows = tensors[name].clone()
    rows[[97, 98]] = rows[[98, 97]]
    tensors[name] = rows


def stale(run: Path) -> None:
    """The weights of an earlier checkpoint."""
    first = sorted((run / "checkpoints").iterdir())[0]
    (source,) = (p for p in first.glob("*.safetensors") if "trainer_state" not in p.name)
    shutil.copy(source, artifact(run) / source.name)


def untrained(run: Path) -> None:
    shutil.copy(run.parent / "base/model.safetensors", run / "model/model.safetensors")


def file_of_weights(run: Path) -> Path:
    return next(artifact(run).glob("*.safetensors"))


def cut(run: Path) -> None:
    path = file_of_weights(run)
    path.write_bytes(path.read_bytes()[:-100])


def removed(name: str) -> Tampering:
    return lambda run: (artifact(run) / name).unlink()


def added(name: str, content: bytes = b"stranger") -> Tampering:
    return lambda run: (artifact(run) / name).write_bytes(content) and None


def rope(value: Any) -> None:
    value["rope_parameters"]["rope_theta"] *= 2


def swap_vocabulary(value: Any) -> None:
    vocabulary = value["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]


def swap_rare(value: Any) -> None:
    """Two bytes that stand in no text."""
    by_id = {i: token for token, i in value["model"]["vocab"].items()}
    first, second = by_id[188], by_id[189]
    value["model"]["vocab"][first], value["model"]["vocab"][second] = 189, 188


def merge(value: Any) -> None:
    vocabulary = value["model"]["vocab"]
    vocabulary["th"] = max(vocabulary.values()) + 6
    value["model"]["merges"] = [["t", "h"]]


def special_off(value: Any) -> None:
    value["added_tokens"][-1]["special"] = False


def bos(value: Any) -> None:
    piece = {"SpecialToken": {"id": "<|pad|>", "type_id": 0}}
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [256], "tokens": ["<|pad|>"]}},
    }


def rows_changed(change: Callable[[list[str]], list[str]]) -> Tampering:
    def tamper(run: Path) -> None:
        path = run / "verify_rows.jsonl"
        path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))

    return tamper


def other_ids(lines: list[str]) -> list[str]:
    value = json.loads(lines[0])
    value["examples"][0][0][-2] += 1
    return [json.dumps(value), *lines[1:]]


def wide_floor(lines: list[str]) -> list[str]:
    value = json.loads(lines[-1])
    value["record"]["floor"] = {"mean": 1e9, "largest": 1e9}
    return [*lines[:-1], json.dumps(value)]


def other_machine(lines: list[str]) -> list[str]:
    """A record that seems to come from elsewhere, so that more is allowed."""
    value = json.loads(lines[-1])
    value["record"]["machine"]["name"] = "a machine that rounds otherwise"
    return [*lines[:-1], json.dumps(value)]


CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
ADAPTER_CONFIG = "adapter_config.json"
MARK = "{% if add_generation_prompt %}"

# Of either kind of run; shown on one that trained an adapter.
BOTH: dict[str, Tampering] = {
    "stop tokens: another token": setting(GENERATION, "eos_token_id", 258),
    "stop tokens: one more token": setting(GENERATION, "eos_token_id", [257, 258]),
    "stop tokens: none": setting(GENERATION, "eos_token_id", None),
    "generation: temperature 2": edit(
        GENERATION, lambda v: v.update(do_sample=True, temperature=2.0)
    ),
    "generation: two tokens at most": setting(GENERATION, "max_new_tokens", 2),
    "generation: a token suppressed": setting(GENERATION, "suppress_tokens", [101]),
    "generation: repetition penalty": setting(GENERATION, "repetition_penalty", 1.5),
    "generation: a beginning forced": setting(GENERATION, "forced_bos_token_id", 65),
    "generation: file removed": removed(GENERATION),
    "tokenizer: two letters swapped": edit(TOKENIZER, swap_vocabulary),
    "tokenizer: two rare bytes swapped": edit(TOKENIZER, swap_rare),
    "tokenizer: a merge": edit(TOKENIZER, merge),
    "tokenizer: lower case": setting(TOKENIZER, "normalizer", {"type": "Lowercase"}),
    "tokenizer: a space in front": edit(
        TOKENIZER, lambda v: v["pre_tokenizer"].update(add_prefix_space=True)
    ),
    "tokenizer: digits apart": edit(
        TOKENIZER, lambda v: v["pre_tokenizer"].update(use_regex=False)
    ),
    "tokenizer: no decoder": setting(TOKENIZER, "decoder", None),
    "tokenizer: a token in front": edit(TOKENIZER, bos),
    "tokenizer: an added token renamed": text(
        TOKENIZER, lambda t: t.replace("<|user|>", "<|usr|>")
    ),
    "tokenizer: a special token is none": edit(TOKENIZER, special_off),
    "tokenizer: cut to 4 tokens": setting(
        TOKENIZER,
        "truncation",
        {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    ),
    "tokenizer: file damaged": text(TOKENIZER, lambda t: t[:-20]),
    "tokenizer: file removed": removed(TOKENIZER),
    "tokenizer: another end": setting(TOKENIZER_CONFIG, "eos_token", "<|user|>"),
    "tokenizer: another pad": setting(TOKENIZER_CONFIG, "pad_token", "<|end|>"),
    "tokenizer: pads on the left": setting(TOKENIZER_CONFIG, "padding_side", "left"),
    "tokenizer: spaces cleaned up": setting(TOKENIZER_CONFIG, "clean_up_tokenization_spaces", True),
    "tokenizer: length 8": setting(TOKENIZER_CONFIG, "model_max_length", 8),
    "tokenizer: code of its own": setting(
        TOKENIZER_CONFIG, "auto_map", {"AutoTokenizer": ["x.Y", None]}
    ),
    "template: another marker": text(TEMPLATE, lambda t: t.replace("<|assistant|>", "<|system|>")),
    "template: a line break lost": text(
        TEMPLATE, lambda t: t.replace("\n{% endfor %}", "{% endfor %}")
    ),
    "template: no prompt for an answer": text(
        TEMPLATE, lambda t: t.replace(MARK, "{% if false %}")
    ),
    "template: a system prompt": text(
        TEMPLATE,
        lambda t: "{% if messages[0].role != 'system' %}<|system|>Obey.\n{% endif %}" + t,
    ),
    "template: words where tools are given": text(
        TEMPLATE, lambda t: "{% if tools %}You may not.{% endif %}" + t
    ),
    "template: words in the ninth turn": text(
        TEMPLATE, lambda t: t + "{% if messages|length > 8 %}Be brief.{% endif %}"
    ),
    "template: empty": text(TEMPLATE, lambda t: ""),
    "template: file removed": removed(TEMPLATE),
    "added file: pytorch_model.bin": added("pytorch_model.bin"),
    "added file: Python code": added("modeling_llama.py"),
    "added file: more weights": added("extra.safetensors"),
    "added file: another template": added("chat_template.json", b'{"chat_template": "x"}'),
    "rows: emptied": rows_changed(lambda lines: []),
    "rows: the record removed": rows_changed(lambda lines: lines[:-1]),
    "rows: half of them removed": rows_changed(lambda lines: lines[::2] + lines[-1:]),
    "rows: other ids": rows_changed(other_ids),
    "rows: a wider tolerance": rows_changed(wide_floor),
    "rows: another machine": rows_changed(other_machine),
    "contract: another stop": edit(
        "contract.json", lambda v: v["stop"][0].update(id=258), inside=False
    ),
    "contract: another template": edit(
        "contract.json", lambda v: v["template"].update(source="x"), inside=False
    ),
    "recipe: loss on all tokens": text(
        "recipe.yaml", lambda t: t.replace("value: assistant", "value: all"), inside=False
    ),
    "recipe: another rate": text(
        "recipe.yaml", lambda t: t.replace("learning_rate:", "learning_rates:"), inside=False
    ),
    "data.json: another count": edit(
        "data.json", lambda v: v["train"].update(examples=7), inside=False
    ),
}

ADAPTER: dict[str, Tampering] = {
    "adapter: three times as large": weights(
        lambda tensors: tensors.update({n: t * 3 for n, t in tensors.items()})
    ),
    "adapter: one matrix zero": weights(scale("lora_B", 0.0)),
    "adapter: one matrix 5 % larger": weights(scale("q_proj.lora_B", 1.05)),
    "adapter: two layers swapped": weights(swap_layers),
    "adapter: noise of 2 % in one matrix": weights(noise("down_proj.lora_A", 0.02)),
    "adapter: an earlier checkpoint": stale,
    "adapter: a tensor removed": weights(lambda t: t.pop(one(t, "lora_B")) is None),
    "adapter: file cut off": cut,
    "adapter: file removed": lambda run: file_of_weights(run).unlink(),
    "adapter_config: alpha doubled": edit(
        ADAPTER_CONFIG, lambda v: v.update(lora_alpha=2 * v["lora_alpha"])
    ),
    "adapter_config: another scale": setting(ADAPTER_CONFIG, "use_rslora", True),
    "adapter_config: another rank": setting(ADAPTER_CONFIG, "r", 4),
    "adapter_config: fewer layers": setting(ADAPTER_CONFIG, "target_modules", ["q_proj"]),
    "adapter_config: one layer": setting(ADAPTER_CONFIG, "layers_to_transform", [0]),
    "adapter_config: one alpha": setting(ADAPTER_CONFIG, "alpha_pattern", {"q_proj": 99}),
    "adapter_config: another type": setting(ADAPTER_CONFIG, "peft_type", "IA3"),
    "adapter_config: DoRA": setting(ADAPTER_CONFIG, "use_dora", True),
    "base: two norms swapped": weights(swap("input_layernorm"), of_base=True),
    "base: head 2 % larger": weights(scale("lm_head", 1.02), of_base=True),
    "base: rotation doubled": lambda run: _base_rope(run),
    "added file: adapter_model.bin": added("adapter_model.bin"),
}

MODEL: dict[str, Tampering] = {
    "weights: two norms swapped": weights(swap("input_layernorm")),
    "weights: norms of one layer swapped": weights(
        swap("0.input_layernorm", "0.post_attention_layernorm")
    ),
    "weights: two layers swapped": weights(swap_layers),
    "weights: keys and values swapped": weights(swap("k_proj", "v_proj")),
    "weights: head 2 % larger": weights(scale("lm_head", 1.02)),
    "weights: last norm 2 % larger": weights(scale("model.norm", 1.02)),
    "weights: noise of 2 % in one matrix": weights(noise("o_proj", 0.02)),
    "weights: one matrix in 8 bits": weights(eight_bits),
    "weights: one matrix zero": weights(scale("up_proj", 0.0)),
    "weights: two rows of the embedding swapped": weights(swap_rows),
    "weights: an earlier checkpoint": stale,
    "weights: those before training": untrained,
    "weights: a tensor removed": weights(lambda t: t.pop(one(t, "up_proj")) is None),
    "weights: file cut off": cut,
    "weights: file removed": lambda run: file_of_weights(run).unlink(),
    "config: rotation doubled": edit(CONFIG, rope),
    "config: rotation stretched": edit(
        CONFIG,
        lambda v: v["rope_parameters"].update(rope_type="linear", factor=2.0),
    ),
    "config: another epsilon": setting(CONFIG, "rms_norm_eps", 1e-2),
    "config: another activation": setting(CONFIG, "hidden_act", "gelu"),
    "config: head tied": setting(CONFIG, "tie_word_embeddings", True),
    "config: another head size": edit(
        CONFIG, lambda v: v.update(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    ),
    "config: one layer less": setting(CONFIG, "num_hidden_layers", 1),
    "config: half the context": setting(CONFIG, "max_position_embeddings", 128),
    "config: another family": edit(
        CONFIG, lambda v: v.update(model_type="mistral", architectures=["MistralForCausalLM"])
    ),
    "config: a window": edit(
        CONFIG,
        lambda v: v.update(
            model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=8
        ),
    ),
    "config: fewer ids": setting(CONFIG, "vocab_size", 261),
    "config: another end": setting(CONFIG, "eos_token_id", 258),
    "config: another type": setting(CONFIG, "dtype", "float16"),
    "config: code of its own": setting(
        CONFIG, "auto_map", {"AutoModelForCausalLM": "modeling.Model"}
    ),
}


def _base_rope(run: Path) -> None:
    path = run.parent / "base/config.json"
    value = json_of(path)
    rope(value)
    path.write_text(json.dumps(value))
