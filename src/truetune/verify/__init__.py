"""A fresh process opens what was saved, and says whether it is what was trained."""

from truetune.verify.artifact import VERDICT, run_of, verify, verify_merge
from truetune.verify.new_tokens import Written, written_findings, written_tokens
from truetune.verify.rows import (
    MOST_ROWS,
    VERIFY_ROWS,
    VerifyRow,
    examples_of,
    row_as_dict,
    with_reference,
)
from truetune.verify.verdict import Check, Verdict, shown

__all__ = [
    "MOST_ROWS",
    "VERDICT",
    "VERIFY_ROWS",
    "Check",
    "Verdict",
    "VerifyRow",
    "Written",
    "examples_of",
    "row_as_dict",
    "run_of",
    "shown",
    "verify",
    "verify_merge",
    "with_reference",
    "written_findings",
    "written_tokens",
]
