"""Read a run directory, in which any file may be missing, incomplete or damaged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from truetune.errors import TruetuneError
from truetune.findings import Finding
from truetune.recipe.sources import read_yaml
from truetune.run_dir import CONTRACT, DATA, LOCK, MANIFEST, RECIPE, VERDICT, RunDir, parsed
from truetune.system.lock import is_alive

State = Literal["finished", "running", "unfinished", "failed"]
# A file of a run above this is none that a page can show.
_LARGEST = 1 << 28
_STEP = re.compile(r"\bstep ([\d,]+)")

# Findings that say how the model behaves; all others are about rows, settings and files.
BEHAVIOUR = frozenset(
    """answers-do-not-end rows-not-learned held-out-falling held-out-rising worse-than-untrained
    unlearned loss-not-of-answers memorising forgetting stop-not-learned nothing-learned stops-lost
    replies-repeat role-leak thinking-open replies-empty replies-copy replies-switch-script
    non-finite no-gradient loss-diverged loss-spike
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class RunFacts:
    """A run, as read from its files.

    Attributes:
        path: the run directory.
        state: finished; running, while a process writes it; failed, with what ended it among the
            findings; else unfinished: stopped, or killed.
        recipe: setting -> {value, origin}.
        contract, data, env, verdict, manifest: of their files; {} if there is none.
        adapter: adapter_config.json of the artifact.
        metrics, samples: their lines.
        findings: lines of findings.jsonl.
        problems: files that could not be read, in words.
    """

    path: Path
    state: State
    recipe: Mapping[str, Any] = field(default_factory=dict)
    contract: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, Any] = field(default_factory=dict)
    verdict: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    findings: Sequence[Mapping[str, Any]] = ()
    problems: Sequence[str] = ()

    @classmethod
    def read(
        cls, run: RunDir, *, state: State | None = None, also: Sequence[Finding] = ()
    ) -> RunFacts:
        """Read everything that exists.

        Args:
            state: where the caller knows it; a run that is about to write its manifest has none.
            also: findings that stand in no file, such as what ended the run.
        """
        files = _Files(run.path)
        artifact = run.artifact()
        manifest = files.json(MANIFEST)
        findings = files.lines("findings.jsonl")
        known = {(f.get("code"), f.get("what")) for f in findings}
        findings += [f.as_dict() for f in also if (f.code, f.what) not in known]
        return cls(
            run.path,
            state or _state(run, findings),
            files.yaml(RECIPE),
            files.json(CONTRACT),
            files.json(DATA),
            files.json("env.json"),
            files.json(VERDICT),
            manifest,
            files.json(f"{artifact.name}/adapter_config.json") if artifact else {},
            files.lines("metrics.jsonl"),
            files.lines("samples.jsonl"),
            findings,
            files.problems,
        )

    @staticmethod
    def read_adapter(folder: Path) -> dict[str, Any]:
        """adapter_config.json of a folder that is no run's."""
        return _Files(folder).json("adapter_config.json")

    def setting(self, name: str) -> Any:
        """The value of a setting; None if the recipe does not have it."""
        row = self.recipe.get(name)
        return row.get("value") if isinstance(row, Mapping) else None

    @cached_property
    def steps(self) -> list[Mapping[str, Any]]:
        """Lines of optimizer steps."""
        return [line for line in self.metrics if "loss" in line]

    @cached_property
    def vitals(self) -> list[Mapping[str, Any]]:
        """Lines of the probes."""
        return [line for line in self.metrics if line.get("probe")]

    @property
    def total(self) -> int:
        """Steps that the run is to take; 0 if that is not known."""
        value = self.setting("max_steps")
        return value if isinstance(value, int) else 0

    @property
    def done(self) -> int:
        """Steps that were taken."""
        return max((int(line["step"]) for line in self.steps), default=0)

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a metric, of whatever lines hold it."""
        return [
            (line["step"], float(line[name]))
            for line in self.metrics
            if isinstance(line.get(name), int | float) and not isinstance(line[name], bool)
        ]

    @cached_property
    def rewound(self) -> list[int]:
        """Places among the findings at which the run went back to an earlier checkpoint."""
        return [at for at, f in enumerate(self.findings) if f.get("code") == "rewound"]

    def behaviour(self, *levels: str) -> list[Mapping[str, Any]]:
        """Findings on behaviour of these levels; those that led to a return to an earlier
        checkpoint no longer count."""
        since = self.findings[self.rewound[-1] + 1 :] if self.rewound else self.findings
        found = [f for f in since if f.get("code") in BEHAVIOUR]
        return [f for f in found if f.get("level") in levels]

    def marks(self, most: int = 6) -> list[tuple[int, str]]:
        """(step, what happened), for the curves: where a probe stopped the run or went back."""
        said = []
        for finding in self.findings:
            grave = finding.get("level") == "error" or finding.get("code") == "rewound"
            text = f"{finding.get('what', '')} {finding.get('where', '')}"
            behaves = finding.get("code") in (*BEHAVIOUR, "rewound")
            if grave and behaves and (match := _STEP.search(text)):
                said.append((int(match[1].replace(",", "")), str(finding.get("what", ""))))
        return said[:most]


def asked(sample: Mapping[str, Any]) -> str:
    """What a sample of samples.jsonl was asked: the last message, or, of a prompt that is known by
    its tokens alone, the text that is served."""
    messages = sample.get("messages") or ()
    return str((messages[-1].get("content") if messages else sample.get("prompt")) or "")


def _state(run: RunDir, findings: Sequence[Mapping[str, Any]]) -> State:
    if run.finished:
        return "finished"
    if is_alive(run.file(LOCK)):
        return "running"
    return "failed" if any(f.get("level") == "error" for f in findings) else "unfinished"


class _Files:
    """Read the files of a run; what cannot be read is reported and treated as missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def _text(self, name: str) -> str:
        path = self.folder / name
        try:
            if not path.exists():
                return ""
            if not path.resolve().is_relative_to(self.folder.resolve()):
                self.problems.append(f"{name} is a link to outside the run")
                return ""
            if not path.is_file() or path.stat().st_size > _LARGEST:
                self.problems.append(f"{name} is not a file of a run")
                return ""
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            self.problems.append(f"{name} cannot be read: {error.strerror}")
            return ""

    def json(self, name: str) -> dict[str, Any]:
        if not (text := self._text(name)):
            return {}
        try:
            return self._mapping(name, parsed(text))
        except ValueError:
            return self._mapping(name, None)

    def yaml(self, name: str) -> dict[str, Any]:
        if not self._text(name):
            return {}
        try:
            return self._mapping(name, read_yaml(self.folder / name))
        except (TruetuneError, ValueError):
            return self._mapping(name, None)

    def _mapping(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.problems.append(f"{name} is damaged")
            return {}
        shape = _SHAPES.get(Path(name).name, {})
        odd = [key for key, kind in shape.items() if key in value and not _fits(value[key], kind)]
        if odd:
            self.problems.append(f"{name} is damaged: {', '.join(odd)} cannot be read")
        return {key: held for key, held in value.items() if key not in odd}

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Values of a .jsonl file that are objects; a last line without its end is being
        written."""
        found, bad = [], 0
        text = self._text(name)
        for line in text[: text.rfind("\n") + 1].split("\n")[:-1]:
            try:
                value = parsed(line)
            except ValueError:
                value = None
            if isinstance(value, dict) and _fits(value, _LINE):
                found.append(value)
            else:
                bad += 1
        if bad:
            self.problems.append(f"{bad:,} lines of {name} are damaged and were skipped")
        return found


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is what truetune writes: of a type; each of a list's of one; an object whose
    values, if it has them, are."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(one, kind[0]) for one in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(
            _fits(value[key], of) for key, of in kind.items() if key in value
        )
    if kind is float:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    return isinstance(value, kind)


_TEXT = str | None
_COUNT = int | None
_COUNTS = dict.fromkeys(("examples", "tokens", "supervised_tokens", "longest"), int)
# What is read of a line, and of the values of a file, without being asked for its type again.
_LINE = {"step": float, "code": str, "what": str, "where": str, "level": str}
_SHAPES: dict[str, dict[str, Any]] = {
    RECIPE: {
        "model": {"value": _TEXT},
        "lora_r": {"value": _COUNT},
        "max_steps": {"value": _COUNT},
    },
    CONTRACT: {"template": dict, "template_kwargs": dict | None, "stop": [dict]},
    DATA: {
        "files": [{"path": str, "sha256": _TEXT, "num_rows": int, "num_bytes": int}],
        "rows_read": int,
        "dropped": [dict],
        "train": _COUNTS,
        "held_out": _COUNTS,
    },
    "env.json": {"versions": dict},
    VERDICT: {"checks": [dict]},
    "adapter_config.json": {"base_model_name_or_path": _TEXT, "revision": _TEXT},
}
