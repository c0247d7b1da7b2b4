"""Real templates and tokenizers: the equation holds, or the row is refused. Nothing else happens.

They lie beside the repository where it is developed, and are no part of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tiny_contracts import chat, require_equation
from truetune import PromptContract, UnfaithfulTemplate

pytestmark = pytest.mark.filterwarnings("error")

SHARED = Path(__file__).parents[2] / "shared"
TEMPLATES = sorted((SHARED / "templates").glob("*.jinja"))
MODELS = sorted(p for p in (SHARED / "models").glob("*") if p.is_dir())
QWEN = SHARED / "models" / "qwen2.5-0.5b-instruct"
MARKER = re.compile(r"<[|\uff5c]?[\w\uff5c\u2581/|:.-]{1,40}>|\[/?[A-Z_]{3,30}\]")

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def reasoned() -> list[dict[str, Any]]:
    messages = chat("Why?", "It is so.", "And?", "Also so.")
    messages[1]["reasoning_content"] = "first thought"
    messages[3]["reasoning_content"] = "second thought"
    return messages


def called() -> list[dict[str, Any]]:
    function = {"name": "add", "arguments": {"a": 17}}
    call = {"type": "function", "id": "abcdefghi", "function": function}
    return [
        {"role": "user", "content": "Add 17."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "18", "name": "add", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "It is 18."},
    ]


ROWS: dict[str, list[dict[str, Any]]] = {
    "one turn": chat("Hi", "Hello."),
    "three turns": chat("Hi", "Hello.", "Sum of 1 and 2?", "3", "Thanks", "You are welcome!"),
    "system": chat("Hi", "Hello.", "Bye", "See you.", system="Be short."),
    "whitespace": chat(" Hi\n", "\n Hello \n\n", "\tx", " y"),
    "unicode": chat("Ça va? \u6f22\u5b57", "e\u0301 \U0001f600\u200d \u00a0ok", "\u2028", "\u0416"),
    "empty": chat("Hi", "", "", "ok"),
    "thinking in the content": chat("Hi", "<think>\nhm\n</think>\n\nHello.", "More", "No."),
    "reasoning": reasoned(),
}


def tools_render(contract: PromptContract) -> bool:
    return contract.renderer.render(called()[:2], tools=[TOOL]).count("17") > 1


def judge(contract: PromptContract) -> set[str]:
    """Names of the rows that are trained; each of them is proved, the others are refused."""
    kept = set()
    for name, row in [*ROWS.items(), ("tools", called())]:
        tools = [TOOL] if name == "tools" else None
        fitted = contract.fit([row], tools)
        try:
            encoded = fitted.encode(row, tools)
        except UnfaithfulTemplate:
            continue
        require_equation(fitted, row, encoded, tools)
        turns = [turn for turns in encoded.turns for turn in turns]
        assert turns == [i for i, m in enumerate(row) if m["role"] == "assistant"]
        kept.add(name)
    # No server answers an empty conversation.
    with pytest.raises(UnfaithfulTemplate):
        contract.encode(chat("Hi", "Hello.", "x", "y")[1:])
    return kept


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Qwen2.5's, with the markers of every template as tokens of their own."""
    from transformers import AutoTokenizer

    if not TEMPLATES or not QWEN.is_dir():
        pytest.skip(f"{SHARED.name}/templates and {SHARED.name}/models are not beside the checkout")
    made = AutoTokenizer.from_pretrained(QWEN)
    found = {m for p in TEMPLATES for m in MARKER.findall(p.read_text(encoding="utf-8"))}
    made.add_special_tokens({"additional_special_tokens": sorted(found)})
    made.bos_token = "<|im_start|>"
    return made


def test_templates(tokenizer: Any) -> None:
    kept = {}
    for path in TEMPLATES:
        contract = PromptContract.load(tokenizer, str(path))
        kept[path.stem] = judge(contract)
        if "one turn" in kept[path.stem]:
            row = ROWS["one turn"]
            fitted = contract.fit([row])
            saved = PromptContract.load(tokenizer, fitted.saved_template())
            assert list(saved.encode(row)) == list(fitted.encode(row))
    # What would make this test empty: a contract that refuses everything, or takes everything.
    assert sum("one turn" in names for names in kept.values()) >= 0.6 * len(kept)
    assert any("thinking in the content" not in names for names in kept.values())


@pytest.mark.skipif(not MODELS, reason="shared/models is not beside the checkout")
@pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)
def test_models(folder: Path) -> None:
    contract = PromptContract.load(folder)
    kept = judge(contract)
    assert {"one turn", "three turns", "system", "unicode", "tools"} <= kept or not tools_render(
        contract
    )
    text = contract.tokens.decode(contract.prompt_ids(chat("Hi")))
    bos = contract.tokenizer.bos_token
    assert bos is None or text.count(bos) <= 1
