"""Two and three processes over gloo are one process.

Tolerances, float32: losses to 2e-6 of the loss, gradients to 4e-6 of the largest of the model (the
same sums in another order). Resumed is uninterrupted to the last bit, dropout included.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed import branches, rows

from processes import in_processes
from tiny_families import SIX, family
from tiny_models import write_model
from tiny_runs import lines, sums, write_rows
from truetune import SFTTrainer
from truetune.contract.contract import PromptContract
from truetune.engine.parallel import Group, joined
from truetune.errors import CheckpointError, Interrupted, ToldElsewhere
from truetune.model.draw import Sampling
from truetune.model.load import load_model
from truetune.recipe import plan
from truetune.recipe.sources import make_recipe, recorded_recipe
from truetune.run import shared_replies
from truetune.run.pipeline import train
from truetune.run.shared_replies import SharedReplies
from truetune.run.worker_rank import Follower
from truetune.run_dir import RunDir

LOSS, GRADIENT = 2e-6, 4e-6

Steps = dict[str, tuple[float, float, tuple[int, ...], dict[str, torch.Tensor]]]


def steps(group: Group) -> Steps:
    """Loss and gradients of a packed step, and held-out loss: of each family, where there are at
    most two processes; and of one, padded, in small passes, in steps that count tokens, and with
    fewer rows than processes."""
    made: Steps = {}
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    if group.size < 3:
        cases |= {kind: (kind, {}) for kind in SIX}
    cases["padded"] = "llama", {"packing": False}
    cases["small passes"] = "llama", {"micro_batch_tokens": 40}
    cases["tokens"] = "llama", {"batch_size": None, "tokens_per_step": 150}
    cases["one row"] = "llama", {"batch_size": 1}
    for name, (kind, changes) in cases.items():
        model = family(kind)
        if group.rank:
            # Whatever a process starts from, the first one's weights are trained.
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(2)
        settings = {"batch_size": 16, "micro_batch_tokens": 1000, "max_seq_len": 64, **changes}
        trainer = SFTTrainer(
            model,
            examples=[*rows(), *branches()],
            pad_id=0,
            max_steps=1,
            max_lr=0.0,
            grad_clip=0,
            group=group,
            **settings,
        )
        gradients: dict[str, torch.Tensor] = {}

        def keep(*_: Any, model: Any = model, kept: Any = gradients) -> None:
            kept.update({n: p.grad.clone() for n, p in model.named_parameters()})

        trainer.optimizer.register_step_pre_hook(keep)
        facts = trainer._step()
        held_out = trainer.evaluate(rows())
        made[name] = facts.loss, held_out, tuple(sorted(facts.rows)), gradients
    return made


def steps_of_a_process() -> Steps:
    with joined() as group:
        return steps(group)


@pytest.fixture(scope="module")
def alone() -> Steps:
    return steps(Group())


@pytest.mark.parametrize("size", [2, 3])
def test_processes_are_one_process(size: int, alone: Steps) -> None:
    for found in in_processes(size, steps_of_a_process):
        assert set(alone) - set(found) == (set() if size < 3 else set(SIX))
        for name in found:
            loss, held_out, trained, gradients = alone[name]
            assert found[name][0] == pytest.approx(loss, rel=LOSS)
            assert found[name][1] == pytest.approx(held_out, rel=LOSS)
            assert found[name][2] == trained, name
            largest = max(float(g.abs().max()) for g in gradients.values())
            for parameter, gradient in gradients.items():
                apart = float((found[name][3][parameter] - gradient).abs().max())
                assert apart <= GRADIENT * largest, (name, parameter)


# Whole runs.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_model(folder / "tiny")
    write_rows(folder / "rows.jsonl", sums(120))
    return folder


def settings(place: Path, output: str) -> dict[str, Any]:
    return {
        "model": str(place / "tiny"),
        "data": str(place / "rows.jsonl"),
        "output": str(place / output),
        "lora": True,
        "lora_dropout": 0.3,
        "batch_size": 8,
        "micro_batch_tokens": 30,
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 4,
    }


def whole_run(place: Path, output: str) -> tuple[float, float | None, list[int]]:
    """Losses, and the prompts that this process answered each time."""
    asked = counted_replies()
    result = train(make_recipe(("test", settings(place, output))))
    assert result.artifact == place / output / "adapter"
    return result.train_loss, result.eval_loss, asked


def counted_replies() -> list[int]:
    own, asked = shared_replies.replies_to_ids, []

    def replies(loaded: Any, contract: Any, prompts: Any, *given: Any, **named: Any) -> Any:
        asked.append(len(prompts))
        return own(loaded, contract, prompts, *given, **named)

    shared_replies.replies_to_ids = replies
    return asked


def replies_of_a_process(place: Path) -> Any:
    """Greedy and drawn ones; and what is told where one process fails, and works again."""
    loaded = load_model(str(place / "tiny"), dtype="float32", purpose="inference")
    contract = PromptContract.load(place / "tiny")
    prompts = [list(range(5, 8 + n % 5)) for n in range(7)]
    drawn = Sampling(max_new_tokens=12, temperature=1.0, seed=4)
    with joined() as group:
        shared, asked = SharedReplies(group), counted_replies()
        own = shared_replies.replies_to_ids

        def failing(*given: Any, **named: Any) -> Any:
            if group.rank and len(asked) == 2:
                asked.append(0)
                raise ValueError("no memory")
            return own(*given, **named)

        shared_replies.replies_to_ids = failing
        if group.rank:
            shared.help(loaded, contract)
            return asked
        made = [shared(loaded, contract, prompts, Sampling(max_new_tokens=12)),
                shared(loaded, contract, prompts, drawn)]  # fmt: skip
        if group.size > 1:
            with pytest.raises(RuntimeError, match="process 1: ValueError"):
                shared(loaded, contract, prompts, drawn)
            assert shared(loaded, contract, prompts, drawn) == made[1]
            # One prompt is fewer than there are processes.
            assert shared(loaded, contract, prompts[:1], drawn) == made[1][:1]
        shared.finish()
    return made, asked


def test_replies_are_written_by_all_processes(place: Path) -> None:
    """They are those of one, drawn ones too."""
    own = shared_replies.replies_to_ids
    right, _ = replies_of_a_process(place)
    shared_replies.replies_to_ids = own
    (made, asked), others = in_processes(2, replies_of_a_process, place)
    assert made == right
    assert len({reply.ids for reply in right[1]}) == 7
    assert (asked, others) == ([4, 4, 4, 4, 1], [3, 3, 0, 3, 0])


def stopped_run(place: Path, output: str) -> None:
    """The second process is told to stop while it takes step 3."""
    step = Follower.on_step

    def stop(job: Follower, facts: Any) -> None:
        step(job, facts)
        if facts.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    Follower.on_step = stop  # type: ignore[method-assign]
    train(make_recipe(("test", settings(place, output))))


def resumed_run(place: Path, output: str) -> float:
    run = place / output
    return train(recorded_recipe(run / "recipe.yaml"), resume=run).train_loss


def failing_run(place: Path, output: str) -> None:
    train(make_recipe(("test", {**settings(place, output), "data": str(place / "absent.jsonl")})))


def test_a_run_of_two_processes_is_stopped_by_either_and_resumed_to_the_bit(place: Path) -> None:
    first, second = in_processes(2, whole_run, place, "whole")
    assert first[:2] == second[:2]
    # Eight held-out or trained prompts at both evaluations, and text that must not be forgotten.
    assert first[2] == second[2]
    assert len(first[2]) >= 2
    stopped = in_processes(2, stopped_run, place, "cut")
    assert [type(error) for error in stopped] == [Interrupted, ToldElsewhere]
    assert stopped[1].exit_code == Interrupted.exit_code
    assert RunDir(place / "cut").checkpoints()[-1].name.endswith("3")
    with pytest.raises(CheckpointError, match="processes: 2 then, 1 now"):
        resumed_run(place, "cut")
    assert in_processes(2, resumed_run, place, "cut") == [first[0]] * 2
    kept = ("step", "loss", "eval_loss", "grad_norm", "tokens", "supervised_tokens")
    whole, cut = (
        [{k: line[k] for k in kept if k in line} for line in lines(place / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    )
    assert whole == cut
    weights = [
        (place / n / "adapter/adapter_model.safetensors").read_bytes() for n in ("whole", "cut")
    ]
    assert weights[0] == weights[1]


def typed_run(place: Path, output: str) -> Any:
    """Process 0 measures that bfloat16 is faster, the other one that it is not; where the folder is
    not free, or the other cannot prepare, the run does not begin."""
    rank = int(os.environ["RANK"])
    plan._PROBED_PARAMETERS = 0
    plan.bf16_speedup = lambda *_, **__: (9.0, 0.2)[rank]
    if output == "other" and rank:
        plan.bf16_speedup = None
    changes = {"lora": False, "max_steps": 1, "verify": False}
    return train(make_recipe(("test", settings(place, output) | changes))).plan


def test_processes_compute_in_the_type_that_the_first_has_measured(place: Path) -> None:
    first, second = in_processes(2, typed_run, place, "typed")
    assert first.dtype == second.dtype == "bfloat16"
    assert "9.0 times" in first.origin("dtype")
    assert first.origins == second.origins
    (place / "taken").mkdir()
    (place / "taken" / "thesis.txt").touch()
    failed, told = in_processes(2, typed_run, place, "taken")
    assert "taken" in failed.where + failed.what
    assert (type(told), told.exit_code) == (ToldElsewhere, failed.exit_code)
    told, failed = in_processes(2, typed_run, place, "other")
    assert type(failed) is TypeError
    assert (type(told), told.exit_code) == (ToldElsewhere, 1)


def test_what_all_processes_run_into_is_told_once(place: Path) -> None:
    failed = in_processes(2, failing_run, place, "failed")
    assert failed[0].what.startswith("there is no")
    assert type(failed[1]) is ToldElsewhere
    assert failed[1].exit_code == failed[0].exit_code == 2
    assert not (place / "failed").exists()
