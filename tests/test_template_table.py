"""docs/templates.md says what the code does; each official template is refused for known reasons.

The official templates lie beside the repository where it is developed, and are no part of it; they
take a minute: `scripts/test -m slow tests/test_template_table.py`.
"""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scripts import template_table

import template_corpus as corpus
from tiny_contracts import require_equation, supervised_texts
from truetune import PromptContract, UnfaithfulTemplate

pytestmark = pytest.mark.filterwarnings("error")
REMAKE = "remake it: python scripts/template_table.py"
official = cache(template_table.official)
needs_official = pytest.mark.skipif(
    not (corpus.OFFICIAL and corpus.MODELS), reason="the templates are not beside the checkout"
)

PLAIN = ("one turn", "three turns", "train: false", "last only", "tools offered")
REASONING = ("reasoning last", "reasoning every")
CALLS = ("one call", "parallel calls", "call, answer")


def refused(code: str, *kinds: str) -> dict[str, str]:
    return dict.fromkeys(kinds, code)


# No field, no marker: reasoning has no place.
NO_REASONING = refused("target-dropped", *REASONING, "reasoned call")
# Calls are not written, or replaced by nothing.
NO_CALLS = refused("target-dropped", *CALLS, "reasoned call")
# Every prompt opens a think block, and no argument closes it.
THINKS = refused("thinking-only", *PLAIN, "system", *CALLS)
# It calls list.append, which the sandbox of every server forbids.
UNSAFE_CALLS = refused("template-refuses", *CALLS, "reasoned call")
ONE_CALL = refused("template-refuses", "parallel calls")

# Every refusal there is. What is not named here is exact.
REFUSED: dict[str, dict[str, str]] = {
    # It has no field for it, and content stands in a response, where no parser looks for reasoning.
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": NO_REASONING,
    # A function call stands behind the separator of messages.
    "GigaChat3-10B-A1.8B": NO_REASONING
    | refused("target-behind-stop", "one call", "call, answer")
    | refused("target-dropped", "parallel calls"),
    "HuggingFaceTB-SmolLM3-3B": NO_CALLS,
    "Kimi-K2-Instruct": NO_REASONING | UNSAFE_CALLS,
    # An empty block before every answer, and no switch.
    "Kimi-K2-Thinking": refused("target-invented", *PLAIN, "system") | UNSAFE_CALLS,
    "LFM2-8B-A1B": NO_REASONING | NO_CALLS,
    # It cuts at the closing marker, and neither it nor its tokenizer here has the opening one.
    "LFM2.5-Instruct": NO_REASONING | NO_CALLS,
    "MiMo-VL": NO_REASONING,
    "MiniMax-M2": THINKS,
    "NVIDIA-Nemotron-Nano-v2": THINKS,
    "Qwen-Qwen2.5-7B-Instruct": NO_REASONING,
    "Qwen3-Coder": NO_REASONING,
    "StepFun3.5-Flash": THINKS,
    # It demands arguments of its own: functions and a date.
    "fireworks-ai-llama-3-firefunction-v2": refused(
        "template-refuses", *PLAIN, "system", *REASONING, *CALLS, "reasoned call"
    ),
    # Neither a system role nor a tool's.
    "google-gemma-2-2b-it": NO_REASONING
    | NO_CALLS
    | refused("template-refuses", "system", "call, answer", "reasoned call"),
    "ibm-granite-granite-3.3-2B-Instruct": NO_CALLS,
    "llama-cpp-rwkv-world": NO_CALLS,
    "meetkai-functionary-medium-v3.1": NO_REASONING,
    "meetkai-functionary-medium-v3.2": NO_REASONING,
    "meta-llama-Llama-3.2-3B-Instruct": NO_REASONING | ONE_CALL,
    "microsoft-Phi-3.5-mini-instruct": NO_REASONING | NO_CALLS,
    "mistralai-Mistral-Nemo-Instruct-2407": NO_REASONING,
    "moonshotai-Kimi-K2": NO_REASONING,
    # It writes the first call only.
    "openai-gpt-oss-120b": refused("target-dropped", "parallel calls"),
    "llama-3.2-1b-instruct": NO_REASONING | ONE_CALL,
    "phi-3.5-mini-instruct": NO_REASONING | NO_CALLS,
    "qwen2.5-0.5b-base": NO_REASONING,
    "qwen2.5-0.5b-instruct": NO_REASONING,
}


def test_the_page_says_what_becomes_of_our_own_templates() -> None:
    assert template_table.parts()[0] == template_table.own_part(), REMAKE


def test_the_page_explains_every_word_in_its_tables() -> None:
    text = template_table.PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.count("|") == len(corpus.KINDS) + 3]
    assert rows
    words = {
        cell
        for row in rows
        for cell in (part.strip() for part in row.split("|")[2:-2])
        if cell and not cell[0].isdigit() and not cell.startswith("---")
    }
    words -= {kind.name for kind in corpus.KINDS}
    assert words <= set(template_table.SHORT.values())
    assert text.startswith(template_table.INTRO)
    for word, code in ((w, c) for c, w in template_table.SHORT.items()):
        assert f"| {word} | `{code}` |" in text


@pytest.mark.slow
@needs_official
def test_official_templates_are_exact_or_refused_for_the_reason_known() -> None:
    for name, found in [pair for some in official() for pair in some]:
        codes: dict[str, Any] = {kind: made.code for kind, made in found.items() if made.code}
        assert codes == REFUSED.get(name, {}), name
        assert set(found) == {kind.name for kind in corpus.KINDS}


@pytest.mark.slow
@needs_official
def test_the_page_says_what_becomes_of_official_templates() -> None:
    assert template_table.parts()[1] == template_table.official_part(*official()), REMAKE


# ---------------------------------------------------------------- any text, on every template

# Markers and switches of templates are written with these; rows that hold them are tested apart.
_WRITTEN = st.characters(
    exclude_categories=("Cs",), exclude_characters="<>[]|\u2581/\uff5c\u25c1\u25b7"
)
_SAID = st.text(
    st.one_of(_WRITTEN, st.sampled_from(" \n\t\u00a0\u2028e\u0301")), min_size=1, max_size=40
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """One to three turns of any text that is not all whitespace, a system text sometimes."""
    said = _SAID.filter(str.strip)
    turns = draw(st.integers(1, 3))
    rows = [{"role": "system", "content": draw(said)}] if draw(st.booleans()) else []
    for _ in range(turns):
        rows += [
            {"role": "user", "content": draw(said)},
            {"role": "assistant", "content": draw(said)},
        ]
    return rows


@cache
def fitted(path: Path) -> tuple[PromptContract, set[bool]]:
    """A contract for plain rows, and whether they may have a system text: those that it takes."""
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    # The day that transformers writes, which they are compared with.
    contract = replace(corpus.official_contract(path), date=None).fit([plain])
    taken = set()
    for system in (False, True):
        rows = [{"role": "system", "content": "Be short."}, *plain] if system else plain
        try:
            contract.encode(rows)
            taken.add(system)
        except UnfaithfulTemplate:
            pass
    return contract, taken


def bare(text: str) -> str:
    """What a tokenizer's normaliser and a template's stripping leave alone."""
    return "".join(unicodedata.normalize("NFKC", text).split())


@needs_official
@pytest.mark.slow
@pytest.mark.parametrize("path", corpus.OFFICIAL, ids=lambda path: path.stem)
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(rows=conversations())
def test_any_text_survives_on_every_template(path: Path, rows: list[dict[str, Any]]) -> None:
    contract, taken = fitted(path)
    if not taken:
        pytest.skip("it refuses plain rows: its refusals are named above")
    assume((rows[0]["role"] == "system") in taken)
    encoded = contract.encode(rows)
    require_equation(contract, rows, encoded)
    trained = [turn for turns in encoded.turns for turn in turns]
    assert trained == [i for i, m in enumerate(rows) if m["role"] == "assistant"]
    for text, turn in zip(supervised_texts(contract, encoded), trained, strict=True):
        said = bare(str(rows[turn]["content"]))
        # The frame of a format may stand around the answer, and the stop behind it.
        assert said in bare(text)
        frame = bare(text).replace(said, "", 1)
        assert not any(
            bare(str(m["content"])) in frame for m in rows if len(str(m["content"])) > 20
        )
