"""Put examples into the prompt, or train on the same examples."""

from __future__ import annotations

from collections.abc import Sequence

from truetune.lab.asked import ask, rows
from truetune.lab.bench import Arm, Tuned
from truetune.lab.chats import messages_of
from truetune.lab.experiment import Column, Expectation, Experiment

_SHOTS = (0, 4, 16, 32)
# Plain text, as the base has read; a line ends an answer.
_PLAIN = (
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{- 'Question: ' + m['content'] + '\\n'"
    " -}}{%- else -%}{{- 'Answer: ' + m['content'] + '\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Answer:' -}}{%- endif -%}"
)


def _prompted(number: int, seed: int) -> Arm:
    """The base, with examples in front of each question: the rows of the arm that is tuned on as
    many."""
    before = [message for row in rows(number, seed) for message in messages_of(row)]
    return Arm(f"prompt with {number} examples", served=_PLAIN, stop=["\n"], before=before)


def arms(seed: int) -> Sequence[Arm]:
    prompted = [_prompted(n, seed) for n in _SHOTS]
    return [*prompted, *(Arm(f"tuned on {n} rows", rows=rows(n, seed)) for n in _SHOTS[1:])]


def measure(tuned: Tuned) -> dict[str, Column]:
    return ask(tuned).columns()


EXPERIMENT = Experiment(
    number=17,
    name="prompting",
    title="Prompting compared with fine-tuning",
    claim="Examples in the prompt show a base model the task, but fine-tuning on the same "
        "examples gives more right answers.",
    source="the course's exercise on few-shot prompting",
    exercises=("Few-shot prompting against SFT",),
    setup="for *prompt with N examples*, the unchanged base reads N rows as lines *Question:* and "
        "*Answer:* before each question, and its answer ends at the end of the line. *Tuned on N "
        "rows* trains on the same rows, and so on the same tokens, with the usual recipe, which "
        "reads each row many times",
    expected="32 examples in the prompt give more than 10 points more right answers than none; "
        "fine-tuning on the same 32 gives more than 20 points more than prompting with them, and "
        "fine-tuning on 4 gives more than prompting with 4",
    refuted="prompting within 20 points of fine-tuning with 32 examples, or above it with 4",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation(
            "examples in the prompt help",
            "right", "prompt with 32 examples", "prompt with 0 examples", above=0.1,
        ),
        Expectation(
            "fine-tuning on 32 rows gives more",
            "right", "tuned on 32 rows", "prompt with 32 examples", above=0.2,
        ),
        Expectation(
            "fine-tuning on 4 rows gives more",
            "right", "tuned on 4 rows", "prompt with 4 examples", above=0.0,
        ),
    ),
    shown=("right", "ended", "repeats"),
    remark="Examples in the prompt change the form and little else: with 4 examples, 97 % of the "
        "replies end with the line instead of 2 %, and 13 % are right instead of 1 %; 16 and 32 "
        "examples add nothing. Replies to prompts with 4 and 32 examples were read for seed 1. "
        "They continue in the style of the corpus (*it is the Quorne. The craft that is practised "
        "there is beekeeping*), mostly with a value of another place (14 and 18 of the 30 that "
        "were read). A possible reason is that a base with 5M weights that has read no questions "
        "has hardly learned to copy from far back. One seed of three meets the bound of 10 points "
        "for 32 examples. With 4 rows, the result of fine-tuning depends on which rows were drawn "
        "(28, 26 and 16 % right), and in seed 3 it is 1 point above that of prompting. From 16 "
        "rows on, fine-tuning is far ahead. The sentence under *Refuted by* does not mention the "
        "first expectation; for it, the bound alone decides.",
)  # fmt: skip
