"""Answer three questions about a run, each with one word and one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from truetune.findings import counted, percent, phrase
from truetune.reporting.facts import RunFacts

Word = Literal["yes", "no", "doubtful", "not measured", "not yet"]
# Findings that one sentence names.
_NAMED = 3


@dataclass(frozen=True)
class Answer:
    """A question and the answer that the run's files give.

    Attributes:
        question: in two or three words.
        word: yes, no, doubtful (a warning), not measured, or not yet.
        why: one or two sentences.
    """

    question: str
    word: Word
    why: str


def verdict(run: RunFacts) -> tuple[Answer, Answer, Answer]:
    """Trained as served, saved as trained, behaves."""
    return _served(run), _saved(run), _behaves(run)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _served(run: RunFacts) -> Answer:
    question = "Trained as served"
    train = _mapping(run.data.get("train"))
    if not run.contract or not train:
        return Answer(question, "not measured", "contract.json or data.json is missing or damaged.")
    stops = ", ".join(
        f"{stop.get('token', '')} ({stop.get('id', '')})" for stop in run.contract.get("stop") or ()
    )
    examples, supervised = int(train.get("examples", 0)), int(train.get("supervised_tokens", 0))
    proved = (
        f"{counted(examples, 'example')} with {counted(supervised, 'supervised token')} "
        f"{'was' if examples == 1 else 'were'} compared with the prompts that a server sends and "
        f"with the rows; answers end on {stops or 'no stop token'}."
    )
    if run.data.get("schema") == "text":
        pieces = counted(examples, "piece")
        why = f"{pieces} of plain text: no prompt is served, and none was used in training."
        return Answer(question, "not measured", why)
    unread = [f for f in run.findings if f.get("code") == "adapter-stop-unread"]
    if unread:
        said = f"But {unread[0].get('what', '')}: {unread[0].get('fix', '')}."
        return Answer(question, "doubtful", f"{proved} {said}")
    if not stops:
        return Answer(question, "doubtful", proved)
    if "skipped" in str(run.env.get("check", "")):
        return Answer(question, "yes", f"{proved} The checks before the run: {run.env['check']}.")
    return Answer(question, "yes", proved)


def _saved(run: RunFacts) -> Answer:
    question = "Saved as trained"
    checks = [_mapping(check) for check in run.verdict.get("checks") or ()]
    if not checks:
        if run.state == "finished":
            why = "The run was not verified. Run `truetune verify`."
            return Answer(question, "not measured", why)
        if run.state == "running":
            return Answer(question, "not yet", "The run has not reached its verification.")
        return Answer(question, "not measured", "The run ended before its model was verified.")
    failed = [check for check in checks if check.get("state") == "failed"]
    if failed:
        said = "; ".join(f"{c.get('name')}: {c.get('what')}" for c in failed[:_NAMED])
        return Answer(question, "no", f"{said}.")
    passed = [check for check in checks if check.get("state") == "passed"]
    if not passed:
        return Answer(question, "not measured", f"{checks[0].get('what', 'nothing was checked')}.")
    names = ", ".join(str(check.get("name")) for check in passed)
    return Answer(
        question, "yes", f"A fresh process opened it; {len(passed)} checks passed ({names})."
    )


def _behaves(run: RunFacts) -> Answer:
    question = "Behaves"
    grave = run.behaviour("error")
    doubts = run.behaviour("warning")
    back = ""
    if run.rewound:
        what = str(run.findings[run.rewound[-1]].get("what", "the run went back"))
        back = f" {what[:1].upper()}{what[1:]}."
    for found, word in ((grave, "no"), (doubts, "doubtful")):
        if found:
            said = phrase((str(f.get("what", "")) for f in found), _NAMED, "; ")
            return Answer(question, word, f"{said[:1].upper()}{said[1:]}.{back}")  # type: ignore[arg-type]
    if len(run.vitals) > 1:
        numbers = " ".join(vital_sentences(run))
        return Answer(question, "yes", f"No probe found anything wrong. {numbers}{back}".strip())
    if run.state == "running":
        return Answer(question, "not yet", "The probes have not compared two steps yet.")
    return Answer(question, "not measured", "Vital signs were measured at fewer than two steps.")


# Vital signs: (name, words, share); what a good model does first.
SHARES: dict[str, str] = {
    "stop_rate": "replies that end by themselves",
    "repetition": "replies that repeat themselves",
    "role_leak": "replies that write another turn",
    "open_thinking": "replies that leave their thinking open",
    "empty": "empty replies",
    "copied": "replies that copy the prompt",
    "other_language": "replies in another script",
}
LOSSES: dict[str, str] = {
    "keep_loss": "loss on text to keep",
    "held_out_loss": "held-out loss",
    "eval_loss": "held-out loss",
    "trained_loss": "loss on trained rows",
    "stop_loss": "loss on stop tokens",
}


def vital_sentences(run: RunFacts) -> Iterator[str]:
    """How the vital signs changed from the first step to the last; those that stayed at zero are
    omitted."""
    steps = [line.get("step") for line in run.vitals]
    for name, words in SHARES.items():
        if points := run.series(name):
            (first_step, first), (last_step, last) = points[0], points[-1]
            if name == "stop_rate" or first or last:
                # A sign that could not be taken at a step says nothing of it.
                since = "before" if first_step == steps[0] else f"at step {first_step:,}"
                at = "" if last_step == steps[-1] else f" at step {last_step:,}"
                was = f" ({since}: {percent(first)})" if first_step != last_step else ""
                yield f"{words.capitalize()}: {percent(last)}{at}{was}."
    points = run.series("keep_loss")
    if len(points) > 1:
        before, now = points[0][1], points[-1][1]
        yield f"Loss on text to keep: {now:.3f} nats per token (before: {before:.3f})."
