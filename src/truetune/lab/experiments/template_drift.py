"""Ask the same model through its training template and through other templates."""

from __future__ import annotations

from collections.abc import Sequence

from truetune.lab.asked import ask, instructions
from truetune.lab.bench import Arm, Tuned
from truetune.lab.experiment import Column, Expectation, Experiment

_TEMPLATE = (
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{- USER + m['content'] + BREAK -}}"
    "{%- else -%}{{- ASSISTANT + m['content'] + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ASSISTANT -}}{%- endif -%}"
)


def _template(user: str, between: str, assistant: str) -> str:
    """ChatML-lite with other text around what is said."""
    parts = {"USER": user, "BREAK": between, "ASSISTANT": assistant}
    text = _TEMPLATE
    for name, part in parts.items():
        text = text.replace(name, f"'{part}'")
    return text


def arms(seed: int) -> Sequence[Arm]:
    served = {
        "as trained": None,
        "no newline at the end": _template("<|user|>\\n", "\\n", "<|assistant|>"),
        "no newlines": _template("<|user|>", "", "<|assistant|>"),
        "other markers": _template("### Instruction:\\n", "\\n\\n", "### Response:\\n"),
        "User: and Assistant:": _template("User: ", "\\n", "Assistant:"),
        "raw text": _template("", "", ""),
    }
    return [Arm(name, rows=instructions(), served=text) for name, text in served.items()]


def measure(tuned: Tuned) -> dict[str, Column]:
    return ask(tuned).columns()


EXPERIMENT = Experiment(
    number=6,
    name="template-drift",
    title="Serving with a different template",
    claim="A model that is served with a different template from the one it was trained with "
        "loses its behaviour; even a missing newline costs some of it.",
    source="the course's exercise on template drift; threads LLaMA-Factory#6736 and #4639 on "
    "models that answer well in the trainer and badly in the server",
    exercises=("Template drift: trained with one template, served with another",),
    setup="one model, trained in ChatML-lite, is asked through six templates. With *no newline at "
        "the end*, nothing follows `<|assistant|>`; with *no newlines*, there are only the "
        "markers; *other markers* are `### Instruction:` and `### Response:`; *raw text* is the "
        "question alone. In each template, an answer may end on the marker with which it was "
        "trained to end",
    expected="a missing last newline costs more than 5 points of right answers; other markers and "
        "raw text each cost more than 30 points",
    refuted="the missing newline costs less than 5 points, or other markers or raw text cost less "
        "than 30 points",
    seeds=(1, 2, 3),
    arms=arms,
    measure=measure,
    expectations=(
        Expectation("with the trained template, it answers", "right", "as trained", above=0.8),
        Expectation(
            "a missing last newline costs 5 points",
            "right", "no newline at the end", "as trained", below=-0.05,
        ),
        Expectation(
            "other markers cost 30 points", "right", "other markers", "as trained", below=-0.3
        ),
        Expectation("raw text costs 30 points", "right", "raw text", "as trained", below=-0.3),
    ),
    shown=("right", "ended", "role leak", "repeats"),
    remark="The missing newline cost 0, 1 and 1 of a hundred answers in the three seeds. Its "
        "interval ends at 4.9 points, and so the bound of 5 is refuted, though narrowly (before "
        "2026-11-23, with counts rounded to whole questions, it was not decided; the verdict "
        "was the same). Raw text cost less than claimed. The markers are single tokens that "
        "carry only the format, and the model has learned only one kind of question, which it "
        "recognises by its words. A model with several formats could confuse them more easily. "
        "Text markers that look like another format (### Instruction) do the damage: the model "
        "answers with another place or relation.",
)  # fmt: skip
