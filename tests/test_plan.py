"""The numbers of a run: DESIGN's table of defaults, the arithmetic of batches, the length."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_tokenizer, write_model
from truetune.model.inspect import ModelFacts, describe
from truetune.model.placement import bf16_speedup
from truetune.model.start import by_template
from truetune.model.tokenizer import load_tokenizer
from truetune.recipe.plan import Plan, make_plan, plan_length, suggested_rate
from truetune.recipe.sources import make_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plan") / "tiny")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> ModelFacts:
    return describe(folder)


def plan(
    facts: ModelFacts,
    settings: dict[str, Any] | None = None,
    *,
    start: Any = "instruct",
    size: int = 1_000_000_000,
    reasoning: float = 0.0,
    examples: int = 1000,
    length: int = 512,
    head_rows: int | None = None,
) -> Plan:
    facts = replace(facts, num_parameters=size, head_rows=head_rows or facts.head_rows)
    return make_plan(
        make_recipe(("test", settings or {})),
        model=facts,
        start=start,
        start_reason="REASON",
        max_length=(length, "default: test"),
        lengths=[100] * examples,
        reasoning_share=reasoning,
    )


@pytest.mark.parametrize(
    ("lora", "start", "size", "reasoning", "rate"),
    [
        (True, "base", 10**9, 0.0, 2e-4),
        (True, "base", 10**9, 1.0, 2e-4),
        (True, "instruct", 10**9, 0.0, 1e-4),
        (True, "instruct", 10**9, 0.5, 1e-4),
        (True, "instruct", 10**9, 0.51, 3e-5),
        (True, "instruct", 50_000_000, 0.0, 1e-4),
        # Ten times the rate of all weights, as measured on the embedded base.
        (True, "instruct", 49_999_999, 0.0, 3e-3),
        (True, "base", 10**6, 0.0, 3e-3),
        (False, "base", 10**9, 0.0, 2e-5),
        (False, "instruct", 10**9, 0.0, 1e-5),
        (False, "instruct", 10**9, 1.0, 1e-5),
        (False, "instruct", 50_000_000, 0.0, 1e-5),
        (False, "instruct", 49_999_999, 0.0, 3e-4),
        (False, "base", 10**6, 0.0, 3e-4),
    ],
)
def test_learning_rates(
    tiny: ModelFacts, lora: bool, start: str, size: int, reasoning: float, rate: float
) -> None:
    made = plan(tiny, {"lora": lora}, start=start, size=size, reasoning=reasoning)
    assert made.learning_rate == rate
    assert made.origin("learning_rate").startswith("default: ")
    assert suggested_rate(made, replace(tiny, num_parameters=size)) == rate
    own = plan(tiny, {"lora": lora, "lr": 0.05}, start=start, size=size, reasoning=reasoning)
    assert own.learning_rate == 0.05
    assert own.origin("learning_rate") == "test"


@pytest.mark.parametrize(("start", "epochs"), [("base", 3.0), ("instruct", 2.0)])
def test_epochs_and_steps(tiny: ModelFacts, start: str, epochs: float) -> None:
    made = plan(tiny, start=start, examples=1000)
    assert made.epochs == epochs
    assert made.max_steps == math.ceil(1000 * epochs / 16)
    assert made.warmup_steps == math.ceil(0.03 * made.max_steps)
    assert made.eval_steps == math.ceil(made.max_steps / 10)
    assert made.save_steps == math.ceil(made.max_steps / 4)
    assert "REASON" in made.origin("epochs")
    assert f"{epochs:g} epochs of 1,000 examples" in made.origin("max_steps")


@pytest.mark.parametrize(
    ("examples", "size", "epochs"),
    [
        (50, 49_999_999, 75),  # 3 1/8 steps a pass
        (150, 10**6, 32),
        (300, 10**6, 30),
        (1000, 10**6, 10),  # 62 1/2 steps a pass
        (5, 10**6, 75),
        (5000, 10**6, 3),  # 937 1/2 steps
        (50, 50_000_000, 3),
    ],
)
def test_a_small_model_takes_many_passes(
    tiny: ModelFacts, examples: int, size: int, epochs: int
) -> None:
    assert plan(tiny, start="base", examples=examples, size=size).epochs == epochs
    own = plan(tiny, {"epochs": 2}, start="base", examples=examples, size=size)
    assert own.epochs == 2


@pytest.mark.parametrize("settings", [{}, {"tokens_per_step": 1600}])
@pytest.mark.parametrize("examples", [65, 104, 105, 113, 150])
def test_so_many_passes_are_at_least_three_hundred_steps(
    tiny: ModelFacts, examples: int, settings: dict[str, Any]
) -> None:
    """A step goes on in the next pass, so that no pass costs a whole number of steps."""
    made = plan(tiny, settings, start="base", examples=examples, size=10**6)
    assert 300 <= made.max_steps <= 310


@pytest.mark.parametrize(
    ("settings", "examples", "steps"),
    [
        ({"epochs": 0.5}, 1000, 32),  # 500 rows
        ({"epochs": 1}, 16, 1),
        ({"epochs": 1}, 17, 2),
        ({"epochs": 2}, 17, 3),  # 34 rows in a stream, not 2 x 2 steps
        ({"epochs": 1}, 1, 1),
        ({"max_steps": 7}, 1000, 7),
    ],
)
def test_steps(tiny: ModelFacts, settings: dict[str, Any], examples: int, steps: int) -> None:
    assert plan(tiny, settings, examples=examples).max_steps == steps


def test_steps_instead_of_epochs(tiny: ModelFacts) -> None:
    made = plan(tiny, {"max_steps": 7})
    assert made.epochs is None
    assert made.origin("max_steps") == "test"
    assert made.origin("epochs") == "default"


@pytest.mark.parametrize(
    ("settings", "warmup"),
    [
        ({}, 3),
        ({"warmup_ratio": 0}, 0),
        ({"warmup_ratio": 0.5}, 50),
        ({"warmup_steps": 9}, 9),
        ({"warmup_steps": 0}, 0),
    ],
)
def test_warmup(tiny: ModelFacts, settings: dict[str, Any], warmup: int) -> None:
    assert plan(tiny, {"max_steps": 100, **settings}).warmup_steps == warmup


@pytest.mark.parametrize("batch", [None, 12])
@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("passes", [None, 4])
def test_batches_in_all_combinations(
    tiny: ModelFacts, batch: int | None, micro: int | None, passes: int | None
) -> None:
    given = {"batch_size": batch, "micro_batch_size": micro, "gradient_accumulation_steps": passes}
    made = plan(tiny, given)
    assert made.batch_size == (12 if batch or (micro and passes) else 16)
    if micro:
        assert made.micro_batch_size == 3
    elif passes:
        assert made.micro_batch_size * 4 == made.batch_size
    else:
        assert made.micro_batch_size == made.batch_size
    # What the run holds is what it says, and where it came from.
    assert made.batch_size == made.batch_size
    assert made.micro_batch_size == made.micro_batch_size
    for name, value in given.items():
        if name != "gradient_accumulation_steps":
            origin = made.origin(name)
            assert origin == "test" if value else origin.startswith("default: ")


@pytest.mark.parametrize(
    ("given", "batch", "micro"),
    [
        ({"gradient_accumulation_steps": 5}, 20, 4),  # 16 cannot be cut into five
        ({"gradient_accumulation_steps": 32}, 32, 1),
        ({"micro_batch_size": 24}, 24, 24),
        ({"micro_batch_size": 5}, 16, 5),
        ({"batch_size": 1}, 1, 1),
    ],
)
def test_batches_that_need_rounding(
    tiny: ModelFacts, given: dict[str, int], batch: int, micro: int
) -> None:
    made = plan(tiny, given)
    assert (made.batch_size, made.micro_batch_size) == (batch, micro)
    if passes := given.get("gradient_accumulation_steps"):
        assert math.ceil(batch / micro) == passes


def test_the_micro_batch_keeps_logits_under_two_gibibytes(tiny: ModelFacts) -> None:
    padded = {"packing": False}
    made = plan(tiny, padded, head_rows=150_000, length=1024)
    assert made.batch_size == 16
    assert made.micro_batch_size == 2**31 // (1024 * 150_000 * 12) == 1
    assert plan(tiny, padded, head_rows=30_000, length=1024).micro_batch_size == 5
    assert plan(tiny, padded, head_rows=150_000, length=10**6).micro_batch_size == 1


def test_packed_rows_are_limited_by_their_tokens(tiny: ModelFacts) -> None:
    made = plan(tiny, head_rows=150_000, length=1024)
    assert made.micro_batch_size == 16


@pytest.mark.parametrize(
    ("given", "longest", "context", "text", "length"),
    [
        (None, 100, 4096, False, 100),
        (None, 4096, 4096, False, 4096),
        (None, 4097, 4096, False, 4096),
        (None, 5000, None, False, 5000),
        (None, 1, 4096, False, 2),
        (64, 100, 4096, False, 64),
        (9999, 100, 4096, False, 9999),
        (None, 0, 4096, True, 1024),
        (None, 0, 256, True, 256),
        (None, 0, None, True, 1024),
        (300, 0, 256, True, 300),
    ],
)
def test_length(
    given: int | None, longest: int, context: int | None, text: bool, length: int
) -> None:
    recipe = make_recipe(("test", {"max_length": given}))
    found, reason = plan_length(recipe, longest=longest, context=context, is_text=text)
    assert found == length
    assert reason == ("test" if given else reason)
    assert given is not None or reason.startswith("default: ")


def test_a_cut_at_the_context_says_how_long_the_longest_row_is() -> None:
    _, reason = plan_length(make_recipe(), longest=5000, context=4096, is_text=False)
    assert "5,000" in reason


def test_a_model_without_template_is_a_base() -> None:
    assert by_template(tiny_tokenizer(None)).kind == "base"


@pytest.mark.parametrize(("eos", "start"), [(257, "instruct"), (256, "base")])
def test_base_or_instruct_by_the_stop_that_the_model_brings(
    tmp_path: Path, eos: int, start: str
) -> None:
    # The template closes answers with <|end|>, which is 257.
    folder = write_model(tmp_path / "m", generation={"eos_token_id": eos}, eos_token_id=eos)
    assert by_template(load_tokenizer(folder)).kind == start


def test_a_template_that_is_no_jinja_makes_no_instruct_model() -> None:
    tokenizer = tiny_tokenizer("{% for %}")
    assert by_template(tokenizer).kind == "base"


@pytest.mark.parametrize("lora", [True, False])
def test_steps_that_count_tokens(tiny: ModelFacts, lora: bool) -> None:
    """1,000 rows of 100 tokens: 5 rows fit into 512 tokens, twice over all of them."""
    made = plan(tiny, {"tokens_per_step": 512, "epochs": 2, "lora": lora})
    assert (made.batch_size, made.tokens_per_step, made.micro_batch_size) == (None, 512, None)
    assert made.max_steps == 2 * 1000 / 5
    assert made.warmup_steps == 12
    padded = plan(tiny, {"tokens_per_step": 512, "packing": False}, head_rows=2**20)
    assert padded.micro_batch_size == 1


@pytest.mark.parametrize(
    ("device", "dtype", "settings", "optim"),
    [
        ("cuda", "bfloat16", {}, "adamw_bf16"),
        ("cuda", "bfloat16", {"optim": "adamw"}, "adamw"),
        ("cuda", "bfloat16", {"dtype": "float32"}, "adamw"),
        ("cuda", "bfloat16", {"lora": True}, "adamw"),
        ("cuda", "float32", {}, "adamw"),
        ("cpu", "bfloat16", {}, "adamw"),
    ],
)
def test_all_weights_of_a_bfloat16_model_on_a_gpu_are_kept_in_two_halves(
    tiny: ModelFacts,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: str,
    settings: dict[str, Any],
    optim: str,
) -> None:
    import torch

    monkeypatch.setattr(
        "truetune.recipe.plan.choose_device", lambda _: (torch.device(device), None)
    )
    monkeypatch.setattr("truetune.recipe.plan.bf16_speedup", lambda *_, **__: 9.0)
    made = plan(replace(tiny, dtype=dtype), settings)
    assert made.optim == optim
    assert ("14 bytes" in made.origin("optim")) == (optim == "adamw_bf16")


CUDA, MPS = "cuda", "mps"


@pytest.mark.parametrize(
    ("settings", "size", "stored", "times", "dtype", "said"),
    [
        ({}, 500_000_000, "bfloat16", 4.4, "bfloat16", "4.4 times as fast as float32"),
        ({}, 500_000_000, "bfloat16", 0.95, "bfloat16", "as fast as float32, and takes half"),
        ({}, 500_000_000, "bfloat16", 0.8, "float32", "slower than float32"),
        ({}, 500_000_000, "bfloat16", 0.0, "float32", "not computed here, or wrongly"),
        ({"qlora": True}, 500_000_000, "bfloat16", 4.4, "bfloat16", "4.4 times"),
        ({"device": CUDA}, 500_000_000, "bfloat16", 9.0, "bfloat16", "9.0 times as fast"),
        ({"device": CUDA}, 500_000_000, "bfloat16", 0.2, "float32", "slower than float32"),
        # All weights stay in float32, and bfloat16 copies of them cost memory.
        (
            {"lora": False},
            500_000_000,
            "bfloat16",
            2.0,
            "bfloat16",
            "2.0 times as fast as float32;",
        ),
        ({"lora": False}, 500_000_000, "bfloat16", 1.0, "float32", "and takes more memory"),
        # Float32 on disk is kept where it is as fast.
        (
            {"lora": False},
            500_000_000,
            "float32",
            2.0,
            "bfloat16",
            "bfloat16 is 2.0 times as fast as float32, the dtype of the weights; trained weights",
        ),
        ({"lora": False}, 500_000_000, "float32", 1.0, "float32", "and takes more memory"),
        ({"device": CUDA}, 500_000_000, "float32", 8.0, "bfloat16", "8.0 times as fast"),
        ({"device": CUDA}, 500_000_000, "float32", 1.0, "float32", "is as fast as float32, the"),
        ({"device": CUDA, "lora": False}, 500_000_000, "float32", 8.0, "bfloat16", "8.0 times"),
        ({"qlora": True}, 500_000_000, "float32", 4.0, "bfloat16", "4.0 times"),
        ({"device": MPS}, 500_000_000, "bfloat16", 1.0, "bfloat16", "and takes half"),
        ({"device": MPS, "lora": False}, 500_000_000, "float32", 0.0, "float32", "or wrongly"),
        # Nothing is measured: a frozen base would be rounded, few weights, or held in halves.
        ({}, 500_000_000, "float32", None, "auto", ""),
        ({"device": MPS}, 500_000_000, "float32", None, "auto", ""),
        ({}, 49_000_000, "bfloat16", None, "auto", ""),
        ({"lora": False, "optim": "adamw_bf16"}, 500_000_000, "bfloat16", None, "auto", ""),
    ],
)
def test_the_type_to_compute_in_is_measured(
    tiny: ModelFacts,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    size: int,
    stored: str,
    times: float | None,
    dtype: str,
    said: str,
) -> None:
    import torch

    settings = {"lora": True, "device": "cpu"} | settings

    def measured(hidden_size: int, device: torch.device, *, trained: bool) -> float:
        assert (hidden_size, device.type) == (tiny.hidden_size, settings["device"])
        on_cuda = device.type == "cuda"
        assert trained == (not settings["lora"] and not (on_cuda and stored == "bfloat16"))
        assert times is not None
        return times

    monkeypatch.setattr("truetune.recipe.plan.bf16_speedup", measured)
    monkeypatch.setattr(
        "truetune.recipe.plan.choose_device", lambda device: (torch.device(device), None)
    )
    made = plan(replace(tiny, dtype=stored), settings, size=size)
    assert made.dtype == dtype
    if times is None:
        return
    assert made.origin("dtype").startswith("measured on this device: ")
    assert said in made.origin("dtype")
    # A run from its recipe, as a resumed one is, keeps what was measured.
    monkeypatch.setattr("truetune.recipe.plan.bf16_speedup", lambda *_, **__: 5.0 - times)
    again = plan(replace(tiny, dtype=stored), settings | {"dtype": dtype}, size=size)
    assert again.dtype == dtype


@pytest.mark.parametrize(("times", "optim"), [(8.0, "adamw_bf16"), (0.2, "adamw")])
def test_weights_are_kept_in_halves_where_bfloat16_is_computed(
    tiny: ModelFacts, monkeypatch: pytest.MonkeyPatch, times: float, optim: str
) -> None:
    import torch

    monkeypatch.setattr("truetune.recipe.plan.bf16_speedup", lambda *_, **__: times)
    monkeypatch.setattr(
        "truetune.recipe.plan.choose_device", lambda device: (torch.device(device), None)
    )
    made = plan(replace(tiny, dtype="bfloat16"), {"device": CUDA}, size=500_000_000)
    assert made.optim == optim
    again = plan(
        replace(tiny, dtype="bfloat16"), {"device": CUDA, "dtype": made.dtype}, size=500_000_000
    )
    assert again.optim == optim


@pytest.mark.parametrize("trained", [False, True])
def test_a_processor_is_timed(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert 0 < bf16_speedup(64, trained=trained) < 1e4
    own = torch.nn.functional.linear

    def wrong(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return own(x, weight) * (1 if x.dtype == torch.float32 else 1.1)

    monkeypatch.setattr(torch.nn.functional, "linear", wrong)
    assert bf16_speedup(64, trained=trained) == 0

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bfloat16:
            raise RuntimeError("\"addmm\" not implemented for 'BFloat16'")
        return own(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert bf16_speedup(64, trained=trained) == 0
