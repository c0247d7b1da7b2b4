"""What is trained comes back as the row where a server's own parser reads it.

transformers' server reads replies by a response template: the tokenizer's own, or one of those that
it has for families of models. No published tokenizer beside the checkout brings one, so that
theirs are the server's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

import oracle_rows as judged
import template_corpus as corpus
from oracle import trained_turns
from truetune import PromptContract, UnfaithfulTemplate

pytestmark = pytest.mark.filterwarnings("error")
parsing = pytest.importorskip("transformers.utils.chat_parsing")
ROWS = (*judged.ROWS, *judged.MORE_ROWS)
# The official templates that the two families' formats belong to.
QWEN, CODER = ("Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "MiMo-VL"), ("Qwen3-Coder",)


def family(name: str) -> dict[str, Any]:
    """The response template of transformers' server for a type of model."""
    serving = pytest.importorskip("transformers.cli.serving.utils")
    known = getattr(serving, "_RESPONSE_TEMPLATE_FALLBACKS", {})
    found = next((spec for names, spec in known.items() if name in names), None)
    if found is None:
        pytest.skip(f"this transformers has no response template for {name}")
    return copy.deepcopy(found)


def own_spec() -> dict[str, Any]:
    """The family's format with the markers of our own template."""
    text = json.dumps(family("qwen3"))
    text = text.replace("<|im_start|>", "<|im_begin|>").replace("im_end", "im_stop")
    return dict(json.loads(text))


def spans(mask: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where supervised stretches begin and end."""
    edges = [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
    edges += [len(mask)] if mask[-1] else []
    yield from zip(edges[::2], edges[1::2], strict=True)


def read_back(
    contract: PromptContract, row: judged.Row, spec: Mapping[str, Any]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(what the row says, what the server returns) of each trained turn; [] for a refused row."""
    messages = [dict(m) for m in row.messages]
    tools = list(row.tools) if row.tools else None
    try:
        fitted = contract.fit([messages], tools, loss_on=row.loss_on)  # type: ignore[arg-type]
        encoded = fitted.encode(messages, tools, loss_on=row.loss_on)  # type: ignore[arg-type]
    except UnfaithfulTemplate:
        return []
    tokenizer, pairs = contract.tokenizer, []
    for example, turns in zip(encoded, encoded.turns, strict=True):
        own = list(spans(example.mask))[-len(turns) :]
        for (start, end), turn in zip(own, turns, strict=True):
            prompt, reply = (
                tokenizer.decode(ids, skip_special_tokens=False)
                for ids in (example.ids[:start], example.ids[start:end])
            )
            parsed = parsing.parse_response(reply, spec, prefix=prompt, tools=tools)
            pairs.append((said(messages[turn]), said(parsed)))
    assert len(pairs) == len(trained_turns(messages, row.loss_on))
    return pairs


def said(message: Mapping[str, Any]) -> dict[str, Any]:
    """Reasoning, content and calls, without outer whitespace, as a client compares them."""
    content, thought = (
        str(message.get(name) or "").strip() for name in ("content", "reasoning_content")
    )
    head, closed, rest = content.partition("</think>")
    if closed and head.startswith("<think>"):
        content, thought = rest.strip(), head.removeprefix("<think>").strip()
    calls = [call["function"] for call in message.get("tool_calls") or []]
    given = [
        json.loads(c["arguments"]) if isinstance(c["arguments"], str) else c["arguments"]
        for c in calls
    ]
    return {
        "reasoning": thought,
        "content": content,
        "calls": [[c["name"], some] for c, some in zip(calls, given, strict=True)],
    }


def require_rows_come_back(contract: PromptContract, spec: Mapping[str, Any]) -> int:
    """How many turns were read back."""
    count = 0
    for row in ROWS:
        for wanted, found in read_back(contract, row, spec):
            assert found == wanted, row.name
            count += 1
    return count


def test_rows_come_back_from_our_own_template() -> None:
    assert (
        require_rows_come_back(
            PromptContract.load(corpus.own_tokenizer("hybrid_switch")), own_spec()
        )
        > 25
    )


def test_what_is_wrong_does_not_come_back() -> None:
    tokenizer = corpus.own_tokenizer("hybrid_switch")
    contract, spec = PromptContract.load(tokenizer), own_spec()
    call = next(row for row in ROWS if row.name == "two calls")
    ((wanted, found),) = read_back(contract, call, spec)
    assert found == wanted
    other = copy.deepcopy(spec)
    other["fields"]["tool_calls"]["open_pattern"] = r"\s*<other>"
    ((wanted, found),) = read_back(contract, call, other)
    assert found != wanted


needs_shared = pytest.mark.skipif(
    not (corpus.OFFICIAL and corpus.MODELS), reason="the templates are not beside the checkout"
)


@needs_shared
@pytest.mark.parametrize("folder", ["qwen2.5-0.5b-instruct", "qwen3-0.6b"])
def test_rows_come_back_from_models_that_the_server_knows(folder: str) -> None:
    path = corpus.SHARED / "models" / folder
    kind = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    contract = PromptContract.load(path)
    assert getattr(contract.tokenizer, "response_template", None) is None
    assert require_rows_come_back(contract, family(kind)) > 20


@needs_shared
@pytest.mark.parametrize("name", [*QWEN, *CODER])
def test_rows_come_back_from_official_templates(name: str) -> None:
    spec = family("qwen3_5" if name in CODER else "qwen3")
    contract = corpus.official_contract(corpus.SHARED / f"templates/{name}.jinja")
    assert require_rows_come_back(contract, spec) > 15


@needs_shared
def test_no_published_tokenizer_brings_a_parser_of_its_own() -> None:
    for folder in corpus.MODELS:
        text = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
        assert "response_template" not in text
        assert "response_schema" not in text
