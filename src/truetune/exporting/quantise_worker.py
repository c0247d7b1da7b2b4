"""The child process in which another library quantises a model folder.

input   a question (JSON on standard input)
does    loads a plain model folder, quantises it, saves it as transformers does
output  JSON on standard output: versions of the libraries; or an error
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from truetune.system.child import answer_json
from truetune.system.lazy import torch


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Do what was requested."""
    torch.manual_seed(0)
    kind, how = asked["kind"], asked["how"]
    if kind == "bitsandbytes":
        model = _bitsandbytes(asked, how)
    elif kind == "torchao":
        model = _torchao(asked, how)
    else:
        model = _llm_compressor(asked, how)
    model.save_pretrained(asked["folder"])
    names = [kind, "torch", "transformers"]
    return {"versions": {name: importlib.metadata.version(name) for name in names}}


def _opened(asked: dict[str, Any], **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from truetune.model.architecture import causal_config
    from truetune.model.source import locate

    return AutoModelForCausalLM.from_pretrained(
        asked["source"],
        # Without what could fetch code.
        config=causal_config(locate(asked["source"], weights=True)),
        dtype=asked["dtype"],
        use_safetensors=True,
        trust_remote_code=False,
        **more,
    )


def _bitsandbytes(asked: dict[str, Any], how: Any) -> Any:
    from truetune.model.quantise import quantization_config

    config = quantization_config(how, getattr(torch, asked["dtype"]))
    return _opened(asked, quantization_config=config, device_map={"": asked["device"]})


def _torchao(asked: dict[str, Any], how: str) -> Any:
    import torchao.quantization
    from transformers import TorchAoConfig

    config = TorchAoConfig(getattr(torchao.quantization, how)())
    return _opened(asked, quantization_config=config, device_map={"": asked["device"]})


def _llm_compressor(asked: dict[str, Any], how: str) -> Any:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model = _opened(asked)
    head = model.get_output_embeddings()
    kept = [name for name, module in model.named_modules() if module is head]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in asked["rows"]]
    oneshot(
        model=model,
        recipe=GPTQModifier(targets="Linear", scheme=how, ignore=kept),
        dataset=Dataset.from_list(rows),
        num_calibration_samples=len(rows),
        max_seq_length=max(map(len, asked["rows"])),
        shuffle_calibration_samples=False,
    )
    return model


if __name__ == "__main__":
    answer_json(answer)
