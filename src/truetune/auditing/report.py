"""The result of an audit: findings, whether they allow a run, and their text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.errors import CheckFailed
from truetune.findings import LEVELS, Finding, escaped, visible


@dataclass(frozen=True)
class AuditReport:
    """The result of `truetune.audit`.

    Attributes:
        findings: most severe first.
        summary: what was examined, by name: rows, tokens, stop tokens, seconds.
    """

    findings: tuple[Finding, ...]
    summary: dict[str, Any]

    @property
    def ok(self) -> bool:
        """No error was found."""
        return not any(finding.level == "error" for finding in self.findings)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes found, each once, most severe first."""
        return tuple(dict.fromkeys(finding.code for finding in self.findings))

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def raise_for_errors(self) -> AuditReport:
        """Raise if an error was found; otherwise return the report.

        Raises:
            CheckFailed: with all findings in `.findings`, and their text as its message.
        """
        if not self.ok:
            num = sum(finding.level == "error" for finding in self.findings)
            raise AuditFailed(
                f"the audit found {num} error{'s' if num > 1 else ''}", self.findings, str(self)
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """`{"ok", "findings", "summary"}`, plain values."""
        return {
            "ok": self.ok,
            "findings": [finding.as_dict() for finding in self.findings],
            "summary": self.summary,
        }

    def json(self) -> str:
        return json.dumps(self.as_dict(), ensure_ascii=False)

    def __str__(self) -> str:
        blocks = ["\n".join(map(visible, finding.lines())) for finding in self.findings]
        return "\n".join([*blocks, self._last_line()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{escaped(str(self))}</pre>"

    def _last_line(self) -> str:
        counts = [
            f"{n} {level}{'s' if n > 1 else ''}"
            for level in LEVELS
            if (n := sum(finding.level == level for finding in self.findings))
        ]
        verdict = "audit: ok" if self.ok else "audit: not ok"
        looked = self.summary.get("text", "")
        return f"{verdict} ({', '.join(counts) or 'nothing found'}; {looked})"


class AuditFailed(CheckFailed):
    """An audit found at least one error; the message holds the report."""

    default_code = "audit-failed"

    def __init__(self, what: str, findings: Sequence[Finding], report: str) -> None:
        super().__init__(what, findings)
        self.report = report

    def __str__(self) -> str:
        return f"{self.what}\n{self.report}"
