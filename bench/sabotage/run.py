"""Run a case past truetune, and past what the libraries themselves say."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.sabotage.build import Batches, Saved
from bench.sabotage.case import Case, Negative
from bench.sabotage.house import House

_LIBRARIES = ("transformers", "trl", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class Verdict:
    """What came of one case."""

    case: Case
    detected: bool
    cause: bool
    rows: bool | None
    fix: bool
    false_alarms: tuple[str, ...]
    found: tuple[str, ...]
    peers: str
    finding: Any = None


@dataclass
class Heard:
    """What the libraries said while a script was built and took one step."""

    said: list[str] = field(default_factory=list)
    raised: str = ""


def audited(subject: Any) -> Any:
    """The report on whatever a case is made of: `truetune.audit` of what is to be trained,
    `truetune check MODEL` of what was saved."""
    import truetune

    if isinstance(subject, Saved):
        from truetune.listener import Listener
        from truetune.recipe.settings import Recipe
        from truetune.run.checkup import check_model

        return check_model(Recipe(model=subject.folder), Listener())
    if isinstance(subject, Batches):
        return truetune.audit(
            subject.loader,
            subject.tokenizer,
            subject.model,
            subject.generation_config,
            evaluation=subject.evaluation,
        )
    return truetune.audit(subject)


def judge(case: Case, house: House, *, peers: bool = True) -> Verdict:
    """All columns of the table for one case.

    Args:
        peers: take one training step as well, and keep what the libraries say; the audit has left
            the trainer as it was.
    """
    broken, heard = built(lambda: case.make(house, True))
    twin, calm = built(lambda: case.make(house, False))
    for subject, said in ((broken, heard), (twin, calm)):
        if subject is None:
            raise RuntimeError(f"{case.id} cannot be built: {said.raised}")
    report, after = audited(broken), audited(twin)
    if peers:
        stepped(broken, heard)
        stepped(twin, calm)
    loud = [f for f in report.findings if f.level != "note"]
    named = [f for f in loud if f.code in case.codes]
    texts = [f"{f.what} {f.why}".lower() for f in named]
    cause = any(case.says.lower() in text for text in texts)
    fixes = any(case.fix.lower() in f.fix.lower() for f in named)
    alarms = tuple(f.code for f in after.findings if f.level != "note")
    return Verdict(
        case,
        detected=bool(loud),
        cause=cause,
        rows=_rows_named(case, named),
        fix=fixes and not alarms,
        false_alarms=alarms,
        found=tuple(f.code for f in loud),
        peers=_peers(broken, heard, calm) if peers else "not asked",
        finding=named[0] if named else None,
    )


def _peers(broken: Any, heard: Heard, calm: Heard) -> str:
    return "by hand" if isinstance(broken, Batches) else difference(heard, calm)


def quiet(negative: Negative, house: House) -> tuple[str, ...]:
    """Codes of warnings and errors on something healthy."""
    subject, _ = built(lambda: negative.make(house))
    return tuple(f.code for f in audited(subject).findings if f.level != "note")


def _rows_named(case: Case, named: list[Any]) -> bool | None:
    """Whether exactly the broken rows are listed; None where the fault lies in no row."""
    if case.rows is None:
        return None
    listed: set[int] = set()
    for finding in named:
        places = finding.rows or (finding.where,)
        listed.update(int(n) for place in places for n in re.findall(r"\d+", place)[-1:])
    if case.rows == "all":
        return max((f.count for f in named), default=0) >= len(listed) > 0
    return listed == set(case.rows)


# ------------------------------------------------------------------ what the libraries say


def built(make: Callable[[], Any]) -> tuple[Any, Heard]:
    """What a script builds (None if a library refused), and all that was said meanwhile."""
    heard = Heard()
    subject = None
    with _ears(heard):
        try:
            subject = make()
        except Exception as error:  # what a library raises is what is measured
            heard.raised = f"{type(error).__name__}: {error}"
    return subject, heard


def stepped(subject: Any, heard: Heard) -> None:
    """One optimizer step, if it is a trainer."""
    if not hasattr(subject, "train"):
        return
    with _ears(heard), contextlib.redirect_stdout(io.StringIO()):
        try:
            subject.train()
        except Exception as error:
            heard.raised = f"{type(error).__name__}: {error}"


@contextmanager
def _ears(heard: Heard) -> Iterator[None]:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.said.append(f"{record.name.split('.')[0]}: {record.getMessage()}")

    _forget_once()
    handler = Handler(level=logging.WARNING)
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [logger.handlers[:] for logger in loggers]
    for logger in loggers:
        logger.handlers = [handler]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for warning in caught:
            module = next((n for n in _LIBRARIES if f"/{n}/" in warning.filename), "")
            if module:
                heard.said.append(f"{module}: {warning.message}")
    finally:
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers = handlers


def _forget_once() -> None:
    """Warnings that are given once a process are given once a case."""
    import accelerate.logging
    import transformers.utils.logging as transformers_logging

    for once in (
        getattr(accelerate.logging.MultiProcessAdapter, "warning_once", None),
        getattr(transformers_logging, "warning_once", None),
    ):
        if hasattr(once, "cache_clear"):
            once.cache_clear()


def difference(broken: Heard, healthy: Heard) -> str:
    """What was said of the broken script and not of the healthy one."""
    if broken.raised and not healthy.raised:
        return f"raised: {_short(broken.raised)}"
    known = {_shape(said) for said in healthy.said}
    new = [said for said in broken.said if _shape(said) not in known]
    return f"warned: {_short(new[0])}" if new else "silent"


def _shape(said: str) -> str:
    return re.sub(r"\d+", "0", said)[:120]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 140 else line[:137] + "..."
