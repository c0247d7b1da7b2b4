"""Export faults put into healthy exports: is each found, and at the stage where it was made?

    python -m bench.passport             both tables on the screen
    python -m bench.passport --write     and into docs/serving.md
    python -m bench.passport --match X   only faults whose name holds X

Every twin is a random model of two layers with a published tokenizer (../shared; without it a small
one of our own): base, adapter, merged folder, GGUF files. A fault changes one export of it; nothing
else tells `truetune diagnose` that anything is wrong.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.page import put

from tiny_models import tiny_tokenizer, write_model
from truetune.contract.contract import PromptContract
from truetune.diagnosis import diagnose as room
from truetune.diagnosis.diagnose import Diagnosis, diagnose
from truetune.exporting.gguf_file import write_file
from truetune.exporting.gguf_ids import choose_pre_tokenizer
from truetune.exporting.gguf_shape import Shape, shape_of
from truetune.exporting.gguf_vocabulary import Vocabulary, vocabulary_of
from truetune.exporting.merged import write_merged
from truetune.model.load import load_model
from truetune.model.lora import LoraSettings, add_lora
from truetune.model.merge import merge_adapter
from truetune.model.new_tokens import add_tokens, make_room
from truetune.model.save import save_model
from truetune.model.tokenizer import load_tokenizer, num_ids

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "serving.md"
SHARED = ROOT.parent / "shared" / "models"
# Architecture, published tokenizer, and what the architecture does differently.
TWINS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama-3.2-1b-instruct", {}),
    "qwen2": ("qwen2", "qwen2.5-0.5b-instruct", {}),
    "qwen3": ("qwen3", "qwen3-0.6b", {"tie_word_embeddings": True}),
    "gemma3": (
        "gemma3_text",
        "llama-3.2-1b-instruct",
        {"tie_word_embeddings": True, "sliding_window": 48, "query_pre_attn_scalar": 16},
    ),
    "phi3": ("phi3", "phi-3.5-mini-instruct", {}),
}
NEW = "<|plan|>"


@dataclass
class Twin:
    """A healthy model with everything that is made of it.

    Attributes:
        name: of the architecture.
        folder: holds base/, adapter/, merged/ and the GGUF files.
    """

    name: str
    folder: Path

    @property
    def adapter(self) -> str:
        return str(self.folder / "adapter")

    @functools.cached_property
    def parts(self) -> tuple[Any, Shape, Vocabulary]:
        """Merged model, shape and vocabulary, as an export makes them."""
        model = merge_adapter(self.adapter).loaded.transformers_model
        contract = PromptContract.load(load_tokenizer(self.adapter))
        rows = model.get_input_embeddings().weight.shape[0]
        vocabulary, _ = vocabulary_of(contract, rows)
        vocabulary, _ = choose_pre_tokenizer(vocabulary, contract, self.folder)
        return model, shape_of(model), vocabulary

    def gguf(
        self,
        name: str,
        quant: str = "f32",
        *,
        shape: Callable[[Shape], Shape] | None = None,
        vocabulary: Callable[[Vocabulary], Vocabulary] | None = None,
        weights: Callable[[Any], None] | None = None,
    ) -> Path:
        """A GGUF file, written like an export but for one thing; not proved."""
        model, own_shape, own_vocabulary = self.parts
        if weights:
            model = copy.deepcopy(model)
            weights(model)
        path = self.folder / f"{name}.gguf"
        write_file(
            path,
            model,
            shape(own_shape) if shape else own_shape,
            vocabulary(own_vocabulary) if vocabulary else own_vocabulary,
            quant,
            "twin",
        )
        return path


def make_twin(name: str, folder: Path, *, dora: bool = False) -> Twin:
    """Base, adapter with a new token, and the merged folder."""
    import torch

    kind, published, changes = TWINS[name]
    folder.mkdir(parents=True)
    base = folder / "base"
    if (SHARED / published).is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(SHARED / published)
        config = json.loads((SHARED / published / "config.json").read_text())
        settings = json.loads((SHARED / published / "generation_config.json").read_text())
        ends = {"eos_token_id": settings["eos_token_id"]}
        write_model(
            base, kind, tokenizer=tokenizer, generation=ends,
            **{"vocab_size": config["vocab_size"], "hidden_size": 64, "head_dim": 16,
               "intermediate_size": 96, "pad_token_id": 0, **changes},
        )  # fmt: skip
    else:
        write_model(
            base, kind, tokenizer=tiny_tokenizer(),
            **{"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, **changes},
        )  # fmt: skip
    loaded = load_model(base, purpose="lora", device="cpu")
    tokens, _ = add_tokens(loaded.tokenizer, [NEW])
    make_room(loaded.model, num_ids(loaded.tokenizer))
    loaded = add_lora(loaded, LoraSettings(r=4, dropout=0.0, dora=dora), seed=0, new_tokens=tokens)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in loaded.model.named_parameters():
            if parameter.requires_grad and "token" not in parameter_name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.1)
    save_model(loaded, PromptContract.load(loaded.tokenizer), folder / "adapter")
    write_merged(folder / "adapter", folder / "merged")
    return Twin(name, folder)


_Work = room.Work
_asked: dict[str, Any] = {}


def _once(source: str, *rest: Any, **more: Any) -> Any:
    """What was trained is measured once, and held to each of its exports."""
    if source not in _asked:
        _asked[source] = _Work(source, *rest, **more)
    return _asked[source]


room.Work = _once  # type: ignore[assignment,misc]


# --------------------------------------------------------------------------------- the faults


@dataclass(frozen=True)
class Fault:
    """One export fault.

    Attributes:
        name: what is done.
        twin: to the export of which architecture.
        stage: where.
        make: the arguments of `diagnose` for the spoilt export.
    """

    name: str
    twin: str
    stage: str
    make: Callable[[Twin], dict[str, Any]]


def merged_with(name: str, change: Callable[[Path], None]) -> Callable[[Twin], dict[str, Any]]:
    """A copy of the merged folder, changed."""

    def make(twin: Twin) -> dict[str, Any]:
        folder = twin.folder / name
        shutil.copytree(twin.folder / "merged", folder)
        change(folder)
        return {"merged": str(folder)}

    return make


def gguf_with(name: str, **changes: Any) -> Callable[[Twin], dict[str, Any]]:
    return lambda twin: {"gguf": str(twin.gguf(name, **changes))}


def weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        made = {name: value.contiguous().clone() for name, value in tensors.items()}
        save_file(made, path, metadata={"format": "pt"})

    return edit


def config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def unmerged(twin: Twin) -> dict[str, Any]:
    """What was saved is the base, under the adapter's tokenizer."""
    return merged_scaled("unmerged", 0.0)(twin)


def merged_scaled(name: str, factor: float) -> Callable[[Twin], dict[str, Any]]:
    """The adapter's update times a factor, saved by the library's own means."""

    def make(twin: Twin) -> dict[str, Any]:
        loaded = load_model(twin.adapter, dtype="float32", device="cpu", purpose="inference")
        for module in loaded.model.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                for key in module.scaling:
                    module.scaling[key] *= factor
        model = loaded.model.merge_and_unload()
        plain = dataclasses.replace(loaded, model=model, is_adapter=False, fingerprint=None)
        folder = twin.folder / name
        save_model(plain, PromptContract.load(loaded.tokenizer), folder)
        return {"merged": str(folder)}

    return make


def magnitude_lost(twin: Twin) -> dict[str, Any]:
    """A DoRA adapter, merged as if it were plain LoRA."""
    dora = make_twin(twin.name, twin.folder / "dora-twin", dora=True)
    plain = dora.folder / "plain"
    shutil.copytree(dora.adapter, plain)
    path = plain / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    from safetensors.torch import load_file, save_file

    tensors = load_file(plain / "adapter_model.safetensors")
    kept = {n: t for n, t in tensors.items() if "magnitude" not in n}
    save_file(kept, plain / "adapter_model.safetensors", metadata={"format": "pt"})
    write_merged(plain, dora.folder / "lost")
    return {"source": dora.adapter, "merged": str(dora.folder / "lost")}


def four_bits(tensors: dict[str, Any]) -> None:
    """The base in 4 bits, into which the adapter was added."""
    for name, value in tensors.items():
        if value.ndim == 2 and "embed" not in name and "head" not in name:
            blocks = value.float().reshape(-1, 32)
            scale = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 7
            tensors[name] = ((blocks / scale).round() * scale).reshape(value.shape).to(value.dtype)


def swap(one: str, other: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    return change


def overflow(tensors: dict[str, Any]) -> None:
    """A weight of bfloat16's range, saved as float16 by a cast that nobody looked at."""
    import torch

    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][0, 0] = 1e6
    for key, value in tensors.items():
        tensors[key] = value.to(torch.float16)


def truncated(folder: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                rows = len(tensors[name]) - 400
                tensors[name] = tensors[name][:rows]

    weights(cut)(folder)
    value = json.loads((folder / "config.json").read_text())
    config(vocab_size=value["vocab_size"] - 400)(folder)


def untied(folder: Path) -> None:
    """A tied head that was saved as one of its own, before training."""
    import torch

    def change(tensors: dict[str, Any]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
        tensors["lm_head.weight"] = embedding + 0.3 * embedding.std() * noise

    weights(change)(folder)
    config(tie_word_embeddings=False)(folder)


def stale_generation_config(folder: Path) -> None:
    path = folder / "generation_config.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"eos_token_id": 5}))


def base_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder.parent / "base" / name, folder / name)


def near_miss(folder: Path) -> None:
    """One character less: what a template matched by edit distance brings."""
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    path.write_text(_missed(text), encoding="utf-8")


def _missed(text: str) -> str:
    """The template without what it writes behind the name of a role."""
    for old, new in (
        ("<|end_header_id|>\n\n", "<|end_header_id|>\n"),
        ("<|end_header_id|>\\n\\n", "<|end_header_id|>\\n"),
        ("<|im_start|>assistant\\n", "<|im_start|>assistant"),
        ("<|assistant|>\\n", "<|assistant|>"),
        ("<|assistant|>", "<|assistant|> "),
        ("Response:", "Response"),
    ):
        if old in text:
            return text.replace(old, new)
    return text + " "


def _template(change: Callable[[str], str]) -> Callable[[Vocabulary], Vocabulary]:
    def edit(own: Vocabulary) -> Vocabulary:
        assert isinstance(own.template, str)
        made = change(own.template)
        assert made != own.template
        return dataclasses.replace(own, template=made)

    return edit


def _value(name: str, value: Any) -> Callable[[Shape], Shape]:
    def edit(shape: Shape) -> Shape:
        there = [(n, value if n == name else v) for n, v in shape.values]
        assert tuple(there) != shape.values
        return dataclasses.replace(shape, values=tuple(there))

    return edit


_rope = _value("rope_freq_base", 500.0)
_near = _template(_missed)


def _lost_token(own: Vocabulary) -> Vocabulary:
    at = own.tokens.index(NEW)
    tokens = [*own.tokens]
    tokens[at] = f"[PAD{at}]"
    types = [*own.types]
    types[at] = 5
    return dataclasses.replace(own, tokens=tuple(tokens), types=tuple(types))


def _wrong_eos(own: Vocabulary) -> Vocabulary:
    special = {k: v for k, v in own.special.items() if k not in ("eos", "eot", "eom")}
    # llama.cpp finds some ends by their text: here they have another.
    ends = {own.special[k] for k in ("eos", "eot", "eom") if k in own.special}
    types = [1 if i in ends else kind for i, kind in enumerate(own.types)]
    tokens = [f"{t}\u00b7" if i in ends else t for i, t in enumerate(own.tokens)]
    return dataclasses.replace(
        own, special=special | {"eos": 7}, types=tuple(types), tokens=tuple(tokens)
    )


def _swap_norms(model: Any) -> None:
    import torch

    layer = model.model.layers[0]
    one, other = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    with torch.no_grad():
        one.copy_(torch.linspace(0.2, 3.0, len(one)))
        other.copy_(torch.linspace(3.0, 0.2, len(other)))


def _half_of_down(model: Any) -> None:
    import torch

    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.5)


def _other_layer(model: Any) -> None:
    import torch

    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            one, other = (layer.get_submodule(name).weight for layer in model.model.layers[:2])
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)


def _of_base(twin: Twin) -> dict[str, Any]:
    base = load_model(twin.folder / "base", dtype="float32", device="cpu", purpose="inference")
    model = base.transformers_model
    rows = twin.parts[0].get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows)
    path = twin.folder / "of-base.gguf"
    write_file(path, model, shape_of(model), twin.parts[2], "f32", "twin")
    return {"gguf": str(path)}


def _generation(**settings: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return edit


def stops_on_text(folder: Path) -> None:
    """One more stop token: the text that the id 29 is."""
    path = folder / "generation_config.json"
    own = json.loads(path.read_text())["eos_token_id"]
    _generation(eos_token_id=[*(own if isinstance(own, list) else [own]), 29])(folder)


def swapped_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    words = value["model"]["vocab"]
    one, other = sorted(words, key=lambda text: words[text])[-2:]
    words[one], words[other] = words[other], words[one]
    path.write_text(json.dumps(value), encoding="utf-8")


def _swapped_tokens(own: Vocabulary) -> Vocabulary:
    tokens = list(own.tokens)
    normal = [n for n, kind in enumerate(own.types) if kind == 1][-2:]
    tokens[normal[0]], tokens[normal[1]] = tokens[normal[1]], tokens[normal[0]]
    return dataclasses.replace(own, tokens=tuple(tokens))


def half(change: Callable[[Path], None]) -> Callable[[Twin], dict[str, Any]]:
    """A merged folder in bfloat16, changed."""

    def make(twin: Twin) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(dir=twin.folder)) / "half"
        write_merged(twin.adapter, folder, dtype="bfloat16")
        change(folder)
        return {"merged": str(folder)}

    return make


def one_percent(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = (tensors[name].float() * 1.01).to(tensors[name].dtype)


def not_a_number(tensors: dict[str, Any]) -> None:
    tensors["model.embed_tokens.weight"][29] = float("nan")


def rope_of(factor: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        value = json.loads(path.read_text())
        value["rope_parameters"]["rope_theta"] *= factor
        path.write_text(json.dumps(value))

    return edit


def _half_more_rope(shape: Shape) -> Shape:
    values = [(n, v * 1.5 if n == "rope_freq_base" else v) for n, v in shape.values]
    return dataclasses.replace(shape, values=tuple(values))


def _near_norms(model: Any) -> None:
    """Norms whose values are near, as of another layer of a trained model."""
    import torch

    layer = model.model.layers[1]
    one, other = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    with torch.no_grad():
        one.mul_(1 + 0.02 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1)))
        other.mul_(1 + 0.02 * torch.randn(one.shape, generator=torch.Generator().manual_seed(2)))


def faults() -> list[Fault]:
    """Those that show in predictions or prompts, then those that only an exact comparison finds."""
    swapped = {
        "shape": lambda s: dataclasses.replace(
            s, family=dataclasses.replace(s.family, interleaved=not s.family.interleaved)
        )
    }
    q, layers = "self_attn.o_proj.weight", "model.layers."
    return [
        Fault("adapter not merged", "qwen2", "merged", unmerged),
        Fault("adapter merged twice", "llama", "merged", merged_scaled("twice", 2.0)),
        Fault("alpha lost in the merge", "phi3", "merged", merged_scaled("alpha", 0.5)),
        Fault("DoRA's magnitude lost in the merge", "qwen2", "merged", magnitude_lost),
        Fault(
            "merged into 4-bit weights", "llama", "merged", merged_with("bits", weights(four_bits))
        ),
        Fault(
            "bfloat16 saved as float16", "qwen2", "merged", merged_with("f16", weights(overflow))
        ),
        Fault("rows of the embedding cut off", "llama", "merged", merged_with("cut", truncated)),
        Fault(
            "tied head saved with stale weights", "qwen3", "merged", merged_with("untied", untied)
        ),
        Fault(
            "shards swapped",
            "qwen3",
            "merged",
            merged_with("shards", weights(swap(f"{layers}0.{q}", f"{layers}1.{q}"))),
        ),
        Fault(
            "generation_config of the base",
            "llama",
            "merged",
            merged_with("stale", stale_generation_config),
        ),
        Fault("tokenizer of the base", "qwen2", "merged", merged_with("tokens", base_tokenizer)),
        Fault("template nearly the same", "qwen3", "merged", merged_with("near", near_miss)),
        Fault(
            "rope base of another model",
            "llama",
            "merged",
            merged_with(
                "rope", config(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
            ),
        ),
        Fault("GGUF of the base", "phi3", "gguf", _of_base),
        Fault("query and key permuted", "llama", "gguf", gguf_with("permuted", **swapped)),
        Fault("norms swapped", "qwen3", "gguf", gguf_with("norms", weights=_swap_norms)),
        Fault("layers swapped", "qwen2", "gguf", gguf_with("layers", weights=_other_layer)),
        Fault(
            "norms without the 1 that is added",
            "gemma3",
            "gguf",
            gguf_with("plus", shape=lambda s: dataclasses.replace(s, added={})),
        ),
        Fault(
            "rope base", "qwen2", "gguf", gguf_with("theta", shape=_value("rope_freq_base", 500.0))
        ),
        Fault("another end token", "llama", "gguf", gguf_with("eos", vocabulary=_wrong_eos)),
        Fault(
            "first token twice",
            "llama",
            "gguf",
            gguf_with("bos", vocabulary=_template(lambda t: "{{ bos_token }}{{ bos_token }}" + t)),
        ),
        Fault("added token missing", "qwen3", "gguf", gguf_with("token", vocabulary=_lost_token)),
        Fault(
            "template nearly the same",
            "qwen2",
            "gguf",
            gguf_with("near", vocabulary=_template(_missed)),
        ),
        Fault(
            "another pre-tokenizer",
            "qwen3",
            "gguf",
            gguf_with("pre", vocabulary=lambda v: dataclasses.replace(v, pre="gpt-2")),
        ),
        Fault("rope base times 1.03, bfloat16", "llama", "merged", half(rope_of(1.03))),
        Fault("rope base times 1.5, bfloat16", "qwen2", "merged", half(rope_of(1.5))),
        Fault("another activation, bfloat16", "qwen3", "merged", half(config(hidden_act="gelu"))),
        Fault("a matrix times 1.01, bfloat16", "phi3", "merged", half(weights(one_percent))),
        Fault("NaN in one embedding", "qwen3", "merged", half(weights(not_a_number))),
        Fault(
            "a context shorter than the rows",
            "llama",
            "merged",
            merged_with("context", config(max_position_embeddings=16)),
        ),
        Fault("one more stop token", "qwen2", "merged", merged_with("more", stops_on_text)),
        Fault(
            "two tokens of the vocabulary swapped",
            "qwen3",
            "merged",
            merged_with("vocabulary", swapped_tokens),
        ),
        Fault(
            "norms of a layer changed by 2 %, q8_0",
            "qwen2",
            "gguf",
            gguf_with("near-norms", quant="q8_0", weights=_near_norms),
        ),
        Fault(
            "rope base times 1.5, q8_0",
            "phi3",
            "gguf",
            gguf_with("near-theta", quant="q8_0", shape=_half_more_rope),
        ),
        Fault(
            "two tokens of the vocabulary swapped",
            "llama",
            "gguf",
            gguf_with("vocabulary", vocabulary=_swapped_tokens),
        ),
    ]


def judged(fault: Fault, twin: Twin) -> tuple[Diagnosis, float]:
    """What `diagnose` says of one fault, and how long it took."""
    arguments = fault.make(twin)
    source = arguments.pop("source", twin.adapter)
    began = time.perf_counter()
    found = diagnose(source, **arguments)
    return found, time.perf_counter() - began


def shown(text: str, most: int = 150) -> str:
    line = text.splitlines()[0] if text else ""
    line = line if len(line) <= most else f"{line[:most]}…"
    return line.replace("|", "\\|").replace("<", "\\<")


def fault_table(twins: dict[str, Twin], match: str) -> tuple[str, int, int, int]:
    lines = [
        "| fault | model | made at | found at | finding | right |",
        "|---|---|---|---|---|---|",
    ]
    hit = placed = 0
    chosen = [fault for fault in faults() if match in fault.name]
    for fault in chosen:
        found, seconds = judged(fault, twins[fault.twin])
        first = found.first
        error = next((f for f in first.findings if f.level == "error"), None) if first else None
        hit += first is not None
        right = first is not None and first.name == fault.stage
        placed += right
        told = shown((error.why or error.what) if error else "")
        lines.append(
            f"| {fault.name} | {fault.twin} | {fault.stage} | {first.name if first else 'nowhere'} "
            f"| {told} | {'yes' if right else '**no**'} |"
        )
        print(f"{lines[-1]} {seconds:.1f} s", flush=True)
    lines.append(f"\n{hit} of {len(chosen)} found, {placed} at the stage where they were made.")
    return "\n".join(lines), hit, placed, len(chosen)


def merged_by_peft(twin: Twin) -> Path:
    """The adapter added in bfloat16, to weights in bfloat16."""
    folder = twin.folder / "merged-by-peft"
    shutil.copytree(twin.folder / "merged-bf16", folder)
    (folder / "model.safetensors").unlink()
    loaded = load_model(twin.adapter, dtype="bfloat16", device="cpu", purpose="inference")
    loaded.model.merge_and_unload().save_pretrained(folder)
    return folder


def rounded(model: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())


def healthy_table(twins: dict[str, Twin]) -> tuple[str, int]:
    lines = [
        "| model | export | change of predictions, share of the spread | alarms |",
        "|---|---|---|---|",
    ]
    alarms = 0
    for twin in twins.values():
        base = twin.folder / "merged-bf16"
        write_merged(twin.adapter, base, dtype="bfloat16")
        cases: list[tuple[str, dict[str, Any]]] = [
            ("merged, float32", {"merged": str(twin.folder / "merged")}),
            ("merged, bfloat16", {"merged": str(base)}),
        ]
        for quant in ("f32", "f16", "bf16", "q8_0"):
            cases.append((f"GGUF, {quant}", {"gguf": str(twin.gguf(f"healthy-{quant}", quant))}))
        # What other tools make: a merge in bfloat16, and files of weights that were rounded before.
        cases.append(("merged by peft in bfloat16", {"merged": str(merged_by_peft(twin))}))
        for quant in ("f16", "q8_0"):
            path = twin.gguf(f"rounded-{quant}", quant, weights=rounded)
            cases.append((f"GGUF, {quant}, from bfloat16", {"gguf": str(path)}))
        for name, arguments in cases:
            found = diagnose(twin.adapter, **arguments)
            above = [f for f in found.findings() if f.level != "note"]
            alarms += bool(above)
            apart = found.stages[-1].apart
            lines.append(
                f"| {twin.name} | {name} | {apart.relative if apart else -1:.1e} | {len(above)} |"
            )
            print(lines[-1], [f.what for f in above], flush=True)
    lines.append(f"\n{alarms} alarms on {len(lines) - 2} healthy exports.")
    return "\n".join(lines), alarms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--match", default="", help="only faults whose name holds this")
    parser.add_argument("--only", choices=("faults", "healthy"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        needed = {f.twin for f in faults() if options.match in f.name}
        names = [n for n in TWINS if options.only == "healthy" or not options.match or n in needed]
        twins = {name: make_twin(name, Path(place) / name) for name in names}
        good = True
        if options.only != "healthy":
            table, hit, placed, number = fault_table(twins, options.match)
            good = hit == number and placed >= number - 2
            if options.write:
                put(table, "<!-- faults -->", "<!-- /faults -->", PAGE)
        if options.only != "faults" and not options.match:
            table, alarms = healthy_table(twins)
            good &= not alarms
            if options.write:
                put(table, "<!-- healthy -->", "<!-- /healthy -->", PAGE)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
