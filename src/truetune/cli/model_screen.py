"""What `truetune inspect` shows: the facts of a model and of its prompt contract."""

from __future__ import annotations

from typing import Any

from truetune.cli.screen import Screen
from truetune.contract.contract import PromptContract
from truetune.errors import UnfaithfulTemplate
from truetune.model.inspect import describe
from truetune.model.tokenizer import load_tokenizer
from truetune.run_dir import opened

_PROBE = [
    {"role": "user", "content": "QUESTION"},
    {"role": "assistant", "content": "ANSWER"},
]


def model_facts(
    source: str, *, revision: str | None = None, chat_template: str | None = None
) -> dict[str, Any]:
    """Facts for people and programs.

    Raises:
        ModelError, UsageError: it cannot be opened.
    """
    folder = opened(source)
    facts = describe(folder, revision)
    tokenizer = load_tokenizer(folder, revision)
    contract = PromptContract.load(tokenizer, chat_template).fit([_PROBE])
    shown: dict[str, Any] = {"folder": folder, **facts.as_dict()}
    shown["template"] = contract.origin
    shown["template_arguments"] = {
        "read": contract.renderer.variables(),
        "chosen for plain rows": contract.template_kwargs,
    }
    shown["stop"] = [{"id": i, "token": contract.tokens.decode([i])} for i in contract.stop_ids]
    shown["notes"] = [finding.what for finding in contract.findings]
    try:
        encoded = contract.encode(_PROBE)[0]
        first = encoded.mask.index(1)
        shown["one_turn"] = {
            "prompt": contract.tokens.decode(encoded.ids[:first]),
            "supervised": contract.tokens.decode(encoded.ids[first:]),
        }
    except UnfaithfulTemplate as error:
        shown["one_turn"] = {"refused": str(error)}
    return shown


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def show_model(screen: Screen, facts: dict[str, Any]) -> None:
    """Show the facts."""
    stops = ", ".join(f"{s['token']!r} ({s['id']})" for s in facts["stop"])
    targets = ", ".join(f"{name} x{count}" for name, count in facts["lora_targets"].items())
    arguments = facts["template_arguments"]
    spare = facts["spare_rows"]
    context = facts["context_length"]
    rows = [
        ("model", f"{facts['architecture']}, {_millions(facts['num_parameters'])} parameters"),
        *([("base", str(facts["base"]))] if facts["base"] else []),
        (
            "shape",
            f"{facts['num_layers']} layers of {facts['hidden_size']}, "
            f"context {f'{context:,} tokens' if context else 'without limit'}",
        ),
        ("weights", f"{facts['weights'] or 'none here'}, {facts['dtype'] or 'dtype unknown'}"),
        (
            "vocabulary",
            f"{facts['tokenizer_length']:,} tokens, {facts['head_rows']:,} logits "
            + (f"({spare:,} spare)" if spare >= 0 else f"({-spare:,} too few)"),
        ),
        (
            "head",
            "tied to the input embedding" if facts["tied"] else "not tied to the input embedding",
        ),
        ("LoRA targets", targets),
        ("template", facts["template"]),
        *([("arguments", ", ".join(arguments["read"]))] if arguments["read"] else []),
        *(
            [("plain rows", str(arguments["chosen for plain rows"]))]
            if arguments["chosen for plain rows"]
            else []
        ),
        ("stop tokens", stops or "none: no token would end an answer"),
    ]
    screen.pairs(rows)
    for note in facts["notes"]:
        screen.line(f"  note: {note}", "cyan")
    turn = facts["one_turn"]
    screen.line()
    if "refused" in turn:
        screen.line("a simple turn has no faithful completion:", "yellow")
        screen.line(turn["refused"])
        return
    screen.line(
        "how one turn is used in training: the served prompt, then the supervised tokens", "dim"
    )
    screen.line(turn["prompt"], "dim")
    screen.line(turn["supervised"], "green")
