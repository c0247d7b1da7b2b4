"""The exceptions that truetune raises. Each class defines its exit code for the command line.

TruetuneError                 1   the work failed part way; what was saved stays intact
├── UsageError                2   bad options, a folder that may not be written
│   ├── RecipeError           2   a recipe with unknown or contradictory settings
│   └── OutputExists          2   the output folder holds something that would be lost
├── InputError                2   input that cannot be read at all: no file, no model, no weights
│   ├── DataError             2   a data file that cannot be read
│   └── ModelError            2   a model folder that cannot be loaded
├── BadRows                   1   rows that no schema or contract can take (a list of findings)
├── UnfaithfulTemplate        1   no faithful completion exists for a conversation (also ValueError)
├── CheckFailed               1   the preflight found an error
├── Collapsed                 1   a probe found that the run has collapsed
│   └── NonFiniteLoss         1   loss or gradient is NaN or infinite; no weight was changed
├── OutOfMemory               1   a single row does not fit in memory; no weight was changed
├── CheckpointError           1   a checkpoint is incomplete or belongs to another run
├── SaveError                 1   the saved files differ from what was trained when read back
├── Interrupted             130   Ctrl-C; a checkpoint was saved (SIGTERM 143, SIGHUP 129)
└── ToldElsewhere             1   another process of this run stopped and reports why; its exit code
"""

from __future__ import annotations

import errno
import shlex
import signal
from typing import TYPE_CHECKING

from truetune.findings import Finding, labelled

if TYPE_CHECKING:
    from collections.abc import Sequence


class TruetuneError(Exception):
    """Base class of all errors that truetune raises deliberately.

    Args:
        what: what happened, in one sentence.
        where: file, line, row or option, if there is one.
        why: the likely cause.
        fix: the next command or edit.
        code: stable identifier, as in a finding.
    """

    exit_code = 1
    default_code = "failed"

    def __init__(
        self, what: str, *, where: str = "", why: str = "", fix: str = "", code: str = ""
    ) -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        self.code = code or self.default_code
        super().__init__(what)

    def __str__(self) -> str:
        return "\n".join([self.what, *labelled(self.parts())])

    @property
    def finding(self) -> Finding:
        """Return the error as a finding, for callers that continue their work."""
        return Finding(self.code, "error", self.what, self.where, why=self.why, fix=self.fix)

    @property
    def words(self) -> dict[str, str]:
        """Return the arguments for another error with the same texts."""
        return {name: getattr(self, name) for name in ("what", "where", "why", "fix", "code")}

    def parts(self) -> list[tuple[str, str]]:
        """Return the labelled lines below the first one, in the order in which they are shown."""
        return [("where", self.where), ("why", self.why), ("fix", self.fix)]


class UsageError(TruetuneError):
    """Bad options."""

    exit_code = 2
    default_code = "usage"


class RecipeError(UsageError):
    """Unknown or contradictory settings, all of them in one error."""

    default_code = "recipe"


class OutputExists(UsageError):
    """The output folder contains something that would be lost."""

    default_code = "output-exists"


class InputError(TruetuneError):
    """Input that cannot be read at all."""

    exit_code = 2
    default_code = "input"


class DataError(InputError):
    """A data file that cannot be read."""

    default_code = "data"


class ModelError(InputError):
    """A model folder that cannot be loaded."""

    default_code = "model"


class _WithFindings(TruetuneError):
    def __init__(
        self, what: str, findings: Sequence[Finding], *, why: str = "", fix: str = ""
    ) -> None:
        self.findings = list(findings)
        super().__init__(what, why=why, fix=fix)


class BadRows(_WithFindings):
    """Rows that cannot be trained; all of them are in `findings`."""

    default_code = "bad-rows"


class CheckFailed(_WithFindings):
    """The preflight found at least one error; all findings are in `findings`."""

    default_code = "check-failed"


class UnfaithfulTemplate(TruetuneError, ValueError):
    """The template offers no completion that continues the served prompt."""

    default_code = "unfaithful-template"


class Collapsed(TruetuneError):
    """A probe found that a run has collapsed.

    Args:
        rows: indices of the examples of the step that showed it; empty if no step did.
    """

    default_code = "collapsed"

    def __init__(self, what: str, *, rows: Sequence[int] = (), **parts: str) -> None:
        super().__init__(what, **parts)
        self.rows = tuple(rows)


class NonFiniteLoss(Collapsed):
    """Loss or gradient norm is NaN or infinite; `rows` are the examples of the step."""

    default_code = "non-finite"


class OutOfMemory(TruetuneError):
    """A single example does not fit in memory.

    Args:
        rows: its index among the examples.
    """

    default_code = "row-too-large"

    def __init__(self, what: str, *, rows: Sequence[int] = (), **parts: str) -> None:
        super().__init__(what, **parts)
        self.rows = tuple(rows)


class CheckpointError(TruetuneError):
    """A checkpoint is incomplete, damaged or belongs to another run."""

    default_code = "checkpoint"


class SaveError(TruetuneError):
    """Writing failed, or the saved files differ from what was trained when they are read back."""

    default_code = "save"


class Interrupted(TruetuneError):
    """The run was stopped from outside; the state up to the last finished step is saved.

    Args:
        number: the signal that stopped it.
    """

    exit_code = 128 + signal.SIGINT
    default_code = "interrupted"

    def __init__(self, what: str, *, number: int = signal.SIGINT, **parts: str) -> None:
        super().__init__(what, **parts)
        self.number = number
        self.exit_code = 128 + number


class ToldElsewhere(TruetuneError):
    """Another process of the run failed or was stopped, and reports why."""

    default_code = "stopped-elsewhere"

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of the run stopped")
        self.exit_code = exit_code


# Of torch's allocator for the CPU, of C++, and of Python where a thread has no stack.
_NO_MEMORY = ("DefaultCPUAllocator", "std::bad_alloc", "can't start new thread")


# errno -> (what, why, fix, code).
_OF_THE_SYSTEM: dict[int, tuple[str, str, str, str]] = {
    errno.EACCES: (
        "permission denied",
        "this user may not read the file or write to it, or may not enter a folder above it",
        "look at owner and rights (ls -ld {path}), or copy the files to a folder of your own",
        "no-permission",
    ),
    errno.ENAMETOOLONG: (
        "the file name is too long",
        "it may have 255 bytes; perhaps the content of a file was passed, not its path",
        "pass the path of a file or folder",
        "name-too-long",
    ),
    errno.EIO: (
        "the disk cannot be read or written",
        "the disk or the network drive reports an error",
        "look at the system's log (dmesg), and copy the files to another disk",
        "disk-failed",
    ),
    errno.EMFILE: (
        "too many files are open",
        "a process may open only so many files at once",
        "raise the limit with `ulimit -n 4096`, and repeat the command",
        "too-many-open-files",
    ),
}
_OF_THE_SYSTEM[errno.EPERM] = _OF_THE_SYSTEM[errno.EACCES]
_OF_THE_SYSTEM[errno.ESTALE] = _OF_THE_SYSTEM[errno.EIO]


def of_the_system(error: BaseException) -> InputError | None:
    """What the operating system refuses for a reason that a user can mend; None for all else."""
    if not isinstance(error, OSError) or error.errno not in _OF_THE_SYSTEM:
        return None
    what, why, fix, code = _OF_THE_SYSTEM[error.errno]
    where = "" if error.filename is None else str(error.filename)
    return InputError(
        what, where=where, why=why, fix=fix.format(path=shlex.quote(where or "FILE")), code=code
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out; each library raises its own type."""
    return (
        isinstance(error, MemoryError)
        # torch's, for devices; this module does not import torch.
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))
        # Of a library in Rust, where the system grants no thread.
        or (type(error).__name__ == "PanicException" and "ThreadPoolBuildError" in str(error))
        # The interpreter's own, where not even the exception found room.
        or (isinstance(error, SystemError) and "without exception set" in str(error))
    )
