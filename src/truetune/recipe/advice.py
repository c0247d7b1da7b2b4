"""Give advice about runs like this one, as notes that never stop a run.

input   the plan, facts of the model, counts of the rows
output  notes, each with its source; none for models under 50 million weights, of which nothing is
        known beyond docs/log.md

docs/choose.md has the longer answer: whether to fine-tune at all, which start, how much data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from truetune.findings import Finding
from truetune.recipe.rates import SMALL, Start

_PAGE = "docs/choose.md"


@dataclass(frozen=True)
class RunOutline:
    """What advice is given on.

    Attributes:
        num_parameters: of the base.
        num_rows: training examples.
        num_supervised: supervised tokens of all rows.
        reasoning_share: of the conversations, the share with reasoning.
        start: base or instruct.
        lora: whether an adapter is trained.
        num_trainable: weights that are trained.
        is_text: plain text, no conversation.
    """

    num_parameters: int
    num_rows: int
    num_supervised: int
    reasoning_share: float
    start: Start
    lora: bool
    num_trainable: int
    is_text: bool


def advise(situation: RunOutline) -> list[Finding]:
    """Notes for this situation, in the order of the rules."""
    if situation.num_parameters < SMALL:
        return []
    return [note for rule in RULES for note in rule(situation)]


def few_rows(s: RunOutline) -> Iterator[Finding]:
    """Below some fifty rows a prompt with examples is the cheaper way to the same end."""
    if s.num_rows < 50 and not s.is_text:
        yield Finding(
            "advice-few-rows",
            "note",
            f"{s.num_rows} rows are few enough to put into a prompt as examples, which is quicker "
            "to try",
            why="gains from fine-tuning are typically clear only with at least 50 to 100 rows "
            "(OpenAI's guide)",
            fix=f"try a prompt first; for more, see {_PAGE}",
        )


def reasoning_rows(s: RunOutline) -> Iterator[Finding]:
    """Some hundred traces teach a format and a narrow skill, and a small model no more."""
    if s.reasoning_share <= 0.5 or s.num_rows >= 10_000 or s.num_parameters >= 10**10:
        return
    yield Finding(
        "advice-reasoning-rows",
        "note",
        f"{s.num_rows:,} reasoning traces will teach a {s.num_parameters / 1e9:.1f}B model "
        "their format and their kind of problem, not better reasoning in general",
        why="817 to 1,000 traces were enough for 32B models that could already reason (LIMO, Ye "
        "et al. 2025; s1, Muennighoff et al. 2025); models up to 3B learn better from short "
        "traces (Li et al. 2025); DeepSeek-R1's distilled models needed 800,000",
        fix="use them for one skill, as a held-out set, or as seeds for more traces; start with "
        "short ones",
    )


def base_start(s: RunOutline) -> Iterator[Finding]:
    """An instruct model has the format already, for which a base needs about a thousand rows."""
    if s.start == "base" and s.num_rows < 1000 and not s.is_text:
        yield Finding(
            "advice-base-start",
            "note",
            f"{s.num_rows:,} rows have to teach a base model to answer and to stop, in addition "
            "to their content",
            why="about 1,000 curated rows taught a 65B base to respond like an assistant (LIMA, "
            "Zhou et al. 2023); an instruct model can do that already",
            fix="start from the instruct model of the family, unless you do not want its style",
        )


def text_rows(s: RunOutline) -> Iterator[Finding]:
    """Plain text is fed for its facts, and those are what it teaches last."""
    if s.is_text and s.num_supervised < 10**8:
        yield Finding(
            "advice-text-knowledge",
            "note",
            f"{s.num_supervised:,} tokens of plain text teach style and vocabulary before facts",
            why="new facts are learned late in fine-tuning (Gekhman et al. 2024); facts stated "
            "in a single wording are stored but not recalled (Allen-Zhu and Li 2023); retrieval "
            "beat fine-tuning for knowledge (Ovadia et al. 2023)",
            fix="for facts, state each one in many wordings and add rows that ask for it, or put "
            f"the documents into the prompt; for more, see {_PAGE}",
        )


def adapter_capacity(s: RunOutline) -> Iterator[Finding]:
    """An adapter stores about two bits a weight; beyond that it learns less than all weights."""
    # About one bit a supervised token is new to the model after pretraining.
    if s.lora and s.num_supervised > 2 * s.num_trainable:
        yield Finding(
            "advice-adapter-capacity",
            "note",
            f"{s.num_supervised:,} supervised tokens may exceed the capacity of an adapter of "
            f"{s.num_trainable:,} weights",
            why="a weight stores about 2 bits (Allen-Zhu and Li 2024) and a token carries about "
            "1; beyond its capacity LoRA learns more slowly than full fine-tuning (Schulman et al. "
            "2025)",
            fix="use a larger --lora-r, or train all weights",
        )


def adapter_is_enough(s: RunOutline) -> Iterator[Finding]:
    """All weights on few rows: an adapter learns as well, and forgets less."""
    if not s.lora and not s.is_text and s.num_rows < 10_000 and s.num_parameters > 5 * 10**8:
        yield Finding(
            "advice-adapter-enough",
            "note",
            f"all weights of this {s.num_parameters / 1e9:.1f}B model are trained on "
            f"{s.num_rows:,} rows, which an adapter would learn equally well",
            why="on datasets of this size LoRA on all layers matches full fine-tuning (Schulman et "
            "al. 2025) and forgets less of what the model knew (Biderman et al. 2024)",
            fix="use --lora, unless you need a model without an adapter",
        )


RULES: tuple[Callable[[RunOutline], Iterator[Finding]], ...] = (
    few_rows,
    reasoning_rows,
    base_start,
    text_rows,
    adapter_capacity,
    adapter_is_enough,
)
