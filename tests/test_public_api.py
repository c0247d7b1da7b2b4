"""What `truetune` exports, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import truetune

NAMES = [
    "ChatTemplate",
    "Encoded",
    "Finding",
    "HealthCallback",
    "PromptContract",
    "SFTExample",
    "SFTTrainer",
    "TruetuneError",
    "UnfaithfulTemplate",
    "__version__",
    "audit",
    "chat",
    "check",
    "diagnose",
    "evaluate",
    "evaluate_tasks",
    "export",
    "inspect",
    "masked_cross_entropy",
    "pad_and_collate",
    "push",
    "report",
    "serve",
    "train",
    "verify",
    "watch",
]


def test_the_names_are_pinned() -> None:
    """Growing this list is a decision."""
    assert sorted(truetune.__all__) == NAMES
    assert dir(truetune) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves(name: str) -> None:
    value = getattr(truetune, name)
    assert value is getattr(truetune, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__module__.startswith("truetune.")


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = truetune.Nope


@pytest.mark.parametrize(
    "statement",
    [
        "import truetune",
        "import truetune.contract",
        "import truetune.compute, truetune.engine, truetune.behaviour.steps",
        "from truetune import ChatTemplate, SFTExample, PromptContract, Encoded",
        "from truetune import pad_and_collate, masked_cross_entropy, SFTTrainer",
    ],
)
def test_importing_loads_neither_torch_nor_transformers(statement: str) -> None:
    code = (
        f"import sys; {statement}; "
        "print(*sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
