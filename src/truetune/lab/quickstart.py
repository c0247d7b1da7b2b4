"""The quickstart: fine-tune the embedded base on hand-written instructions and show what changed.

input   nothing
does    fine-tunes through the pipeline like any user, then asks base and tuned model the same
        questions through the saved contract, and counts
output  Comparison, quickstart.json beside the run's files... nothing is printed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from truetune.behaviour.replies import Said
from truetune.contract.contract import PromptContract
from truetune.lab import base_path
from truetune.lab.asked import ask
from truetune.lab.bench import Arm, Tuned
from truetune.lab.evaluate import Question, held_out_documents, prose_loss, unseen_questions
from truetune.lab.world import World
from truetune.listener import Listener
from truetune.model.load import load_model
from truetune.recipe.settings import Recipe
from truetune.recipe.sources import make_recipe
from truetune.run.pipeline import RunResult, train

_PROSE_DOCUMENTS = 40


@dataclass(frozen=True)
class Score:
    """One model's results on the questions.

    Attributes:
        replies: one per question, greedy.
        finished: not empty, and ended on a stop token by itself.
        correct: finished, and the fact is in it.
        prose_loss: nats per token on held-out documents about the world.
    """

    replies: tuple[Said, ...]
    finished: int
    correct: int
    prose_loss: float


@dataclass(frozen=True)
class Comparison:
    """Base and tuned model on the same questions about places that no instruction names."""

    questions: tuple[Question, ...]
    base: Score
    tuned: Score


def quickstart_recipe(output: Path | str, *, seed: int = 42, overwrite: bool = False) -> Recipe:
    """The settings of the quickstart: all weights, ChatML-lite, about 150 steps."""
    instructions = Path(__file__).parent / "instructions.jsonl"
    return make_recipe(
        (
            "quickstart",
            {
                "model": str(base_path()),
                "data": str(instructions),
                "chat_template": "chatml-lite",
                "max_steps": 150,
                "learning_rate": 1e-4,
                "batch_size": 16,
                "seed": seed,
                "output": str(output),
                "overwrite": overwrite,
            },
        )
    )


def quickstart(
    output: Path | str,
    *,
    seed: int = 42,
    overwrite: bool = False,
    num_questions: int = 100,
    listener: Listener | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> tuple[RunResult, Comparison]:
    """Train and compare. The tuned model is the saved artifact, loaded again."""
    result = train(quickstart_recipe(output, seed=seed, overwrite=overwrite), listener)
    contract = PromptContract.load(result.artifact)
    world = World.generate()
    questions = unseen_questions(world, num_questions)
    documents = held_out_documents(world, _PROSE_DOCUMENTS)
    scores = []
    for name, source in (("base", str(base_path())), ("tuned", str(result.artifact))):
        if on_stage:
            on_stage(f"answering {num_questions} questions with the {name} model")
        loaded = load_model(source, device="cpu", purpose="inference")
        tuned = Tuned(Arm(name), seed, loaded, contract, (), Path(source))
        scores.append(score(tuned, questions, documents))
    return result, Comparison(tuple(questions), *scores)


def score(tuned: Tuned, questions: Sequence[Question], documents: Sequence[str]) -> Score:
    """Ask a model, greedily, through its contract, as every arm of an experiment is asked."""
    heard = ask(tuned, questions)
    finished = [said.stopped and not said.empty for said in heard.said]
    return Score(heard.said, sum(finished), sum(heard.right), prose_loss(tuned.loaded, documents))
