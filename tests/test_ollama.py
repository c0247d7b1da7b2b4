"""A Modelfile: Ollama keeps the model's template, or gets one as Go text that was rendered."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tiny_models import TEMPLATE, tiny_tokenizer, write_model
from tiny_runs import command
from truetune.contract.frame import Separators
from truetune.errors import CheckFailed
from truetune.exporting.ollama import go_text, guarded, rendered
from truetune.run.export_gguf import export_gguf

needs_llama = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "xllamacpp")),
    reason="the gguf extra is missing",
)
needs_go = pytest.mark.skipif(
    importlib.util.find_spec("go") is None and shutil.which("go") is None,
    reason="Go is missing (the ollama extra)",
)
# With a system message, another opening where there is none, and ends that only history has.
SYSTEM = (
    "{{ '<|pad|>' }}{% if messages[0].role == 'system' %}<|system|>{{ messages[0].content }}\n"
    '{% else %}<|system|>You are "kind" {x}.\n{% endif %}{% for m in messages %}'
    "{% if m.role != 'system' %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TRIMS = TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
NUMBERED = TEMPLATE.replace("<|{{ m.role }}|>", "<|{{ m.role }}|>{{ loop.index }}: ")


def model(folder: Path, template: str, **generation: Any) -> Path:
    settings = {"eos_token_id": 257, **generation}
    return write_model(folder, tokenizer=tiny_tokenizer(template), generation=settings)


def written(folder: Path) -> str:
    return (folder / "Modelfile").read_text(encoding="utf-8")


def in_file(path: Path) -> str:
    """The chat template that a GGUF file holds."""
    import gguf

    field = gguf.GGUFReader(path).fields["tokenizer.chat_template"]
    return str(field.contents())


@needs_llama
def test_ollama_keeps_the_files_own_template(tmp_path: Path) -> None:
    model(tmp_path / "model", SYSTEM, do_sample=True, temperature=0.5, top_k=7)
    told = command("export", tmp_path / "model", "--to", "ollama", "-o", tmp_path / "out")
    assert told.code == 0, told.err
    assert "ollama create out -f" in told.out
    assert written(tmp_path / "out").splitlines() == [
        "FROM ./model-f16.gguf",
        "REQUIRES 0.30.0",
        "PARAMETER num_ctx 256",
        "PARAMETER temperature 0.5",
        "PARAMETER top_k 7",
        'PARAMETER stop "<|end|>"',
    ]
    assert json.loads((tmp_path / "out" / "proof.json").read_text())["holds"]
    # A hundred edits are too many for Ollama, and each mark is one: no template has it.
    held = in_file(tmp_path / "out" / "model-f16.gguf")
    assert held.endswith(SYSTEM)
    assert held.count("\u2042") >= 100
    plain = export_gguf(str(tmp_path / "model"), tmp_path / "plain")
    assert in_file(plain.path) == SYSTEM


@needs_llama
def test_arguments_that_no_modelfile_can_name_are_fixed_in_the_template(tmp_path: Path) -> None:
    """llama.cpp gives templates enable_thinking = true over their own default."""
    template = TEMPLATE.replace(
        "<|assistant|>{% endif %}",
        "<|assistant|>{% if enable_thinking is defined and enable_thinking %}!{% endif %}"
        "{% endif %}",
    )
    assert template != TEMPLATE
    model(tmp_path / "model", template)
    plain = export_gguf(str(tmp_path / "model"), tmp_path / "plain", quant="f32")
    assert plain.proof.template_kwargs == {"enable_thinking": False}
    made = export_gguf(str(tmp_path / "model"), tmp_path / "out", quant="f32", ollama=True)
    assert made.proof.template_kwargs == {}
    assert "{% set enable_thinking = false %}" in in_file(made.path)
    assert guarded({"default": "x"})["default"].endswith("\nx")  # type: ignore[index]


@needs_llama
@needs_go
def test_a_template_as_go_text_is_rendered_and_proved(tmp_path: Path) -> None:
    for name, template, findings in (
        ("system", SYSTEM, []),
        ("plain", TEMPLATE, []),
        ("trims", TRIMS, ["ollama-template-trims"]),
    ):
        model(tmp_path / name, template)
        made = export_gguf(
            str(tmp_path / name), tmp_path / f"{name}-out", quant="f32", ollama=True,
            go_template=True,
        )  # fmt: skip
        assert [f.code for f in made.findings if f.level == "warning"] == findings
        text = written(tmp_path / f"{name}-out")
        assert 'TEMPLATE """' in text
        assert "REQUIRES" not in text


@needs_llama
@needs_go
def test_a_template_that_go_text_cannot_say_is_refused(tmp_path: Path) -> None:
    model(tmp_path / "model", NUMBERED)
    with pytest.raises(CheckFailed) as caught:
        export_gguf(
            str(tmp_path / "model"), tmp_path / "out", quant="f32", ollama=True, go_template=True
        )
    assert [f.code for f in caught.value.findings] == ["ollama-template"]
    assert not (tmp_path / "out").exists()


@needs_go
def test_go_text_holds_what_go_and_a_modelfile_would_take_otherwise() -> None:
    """Braces, quotes, backslashes, and what a Modelfile's reader leaves out."""
    strange = '{{ "x" }} \'\'\'""" \\n \u200b\t\U0001f600{%'
    around = Separators(strange, (strange, strange), "", strange, strange, strange)
    text = go_text(around)
    assert '"""' not in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)

    class Talk:
        def __init__(self, *contents: str, system: str = "") -> None:
            self.messages = [
                {"role": "assistant" if i % 2 else "user", "content": c}
                for i, c in enumerate(contents)
            ]
            if system:
                self.messages.insert(0, {"role": "system", "content": system})

    talks: Any = [Talk("a"), Talk("a", "b", "c"), Talk("{{ .X }}", system="s")]
    assert rendered(text, talks) == [
        (f"{strange}a{strange}", ""),
        (f"{strange}a{strange}b{strange}c{strange}", ""),
        (f"{strange}s{strange}{{{{ .X }}}}{strange}", ""),
    ]


def test_what_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = command("export", tmp_path, "--to", "gguf", "--go-template", "-o", tmp_path / "out")
    assert told.code == 2
    assert "[export-what]" in told.err
    if importlib.util.find_spec("xllamacpp") is None:
        return
    monkeypatch.setattr("truetune.exporting.ollama.shutil.which", lambda *_, **__: None)
    told = command("export", tmp_path, "--to", "ollama", "--go-template", "-o", tmp_path / "out")
    assert told.code == 2
    assert "truetune[ollama]" in told.err
