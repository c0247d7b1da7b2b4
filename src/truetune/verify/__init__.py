"""A fresh process opens what was saved, and says whether it is what was trained."""

from truetune.verify.artifact import VERDICT, run_of, verify, verify_merge
from truetune.verify.new_tokens import Written, written_findings, written_tokens
from truetune.verify.record import measure_rows, read_record, take_record, write_rows
from truetune.verify.rows import MOST_ROWS, VERIFY_ROWS, VerifyRow
from truetune.verify.verdict import Check, Verdict, shown

__all__ = [
    "MOST_ROWS",
    "VERDICT",
    "VERIFY_ROWS",
    "Check",
    "Verdict",
    "VerifyRow",
    "Written",
    "measure_rows",
    "read_record",
    "run_of",
    "shown",
    "take_record",
    "verify",
    "verify_merge",
    "write_rows",
    "written_findings",
    "written_tokens",
]
