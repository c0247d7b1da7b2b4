"""A lock file that allows one writer at a time, names its owner, and is released when the owner
dies.

The kernel's lock decides wherever there is one: it ends with its process, whatever the file says.
Where the file system has none, and where the file names another machine whose locks this one may
not see, the owner's sign of life decides.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from truetune.errors import SaveError, UsageError
from truetune.system import threads

# An owner touches its lock this often, in seconds; after so long without, it is taken for dead.
_SIGN_OF_LIFE = 10.0
_DEAD_AFTER = 120.0
# The lock file is not the one that was opened: its owner let go in between. Look again.
_TRIES = 20
# What a file system says that keeps no locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
# Locks of this process.
_held: dict[tuple[int, Path], _Held] = {}


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, or held it.

    Attributes:
        pid, began: process, and when it began (the kernel's clock): a pid is used again.
        host: its name.
        machine: what tells it from every other running machine.
        space: where the pid counts (a container has a space of its own).
        since: when it took the lock.
    """

    pid: int
    began: str
    host: str
    machine: str
    space: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Busy(UsageError):
    """Another process holds the lock."""


@dataclass
class _Held:
    """A lock of this process: the thread that holds it, who died with it, its open file (another
    one where the first was taken away), and what guards that."""

    thread: int
    dead: Owner | None
    descriptor: int
    guard: threading.Lock = field(default_factory=threading.Lock)
    done: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[Owner | None]:
    """Hold a lock file, which is gone afterwards; at once where this thread holds it already.

    Yields:
        The owner that died with it, if there was one.

    Raises:
        Busy: another process or thread holds it; nothing was changed.
        OSError: the file cannot be made.
    """
    key = _key(path)
    if _is_ours(path):
        yield _held[key].dead
        return
    descriptor, dead = _take(path)
    held = _held[key] = _Held(threading.get_ident(), dead, descriptor)
    try:
        threads.begin(_show_life, path, held)
        yield dead
    finally:
        with held.guard:
            held.done.set()
        del _held[key]
        # While it is locked: afterwards the name may be another's.
        with contextlib.suppress(OSError):
            if _is_named(path, held.descriptor):
                path.unlink()
        os.close(held.descriptor)


def require_held(path: Path) -> None:
    """Stop a process whose lock file was taken away, and whose place another has taken; a file that
    is only gone is made again. Nothing is asked where this process does not hold the lock.

    Raises:
        SaveError: another process holds it.
    """
    held = _held.get(_key(path))
    if held is None:
        return
    with held.guard:
        if _kept(path, held):
            return
    raise SaveError(
        "another process has taken over this run",
        where=str(path),
        why=f"{path.name} was moved or deleted while this process wrote the run, and another "
        "process started or resumed it: two writers would corrupt it, so this one stops",
        fix="leave the lock file where it is; the other process continues",
        code="lock-lost",
    )


def _kept(path: Path, held: _Held) -> bool:
    """Whether the lock is still this process's; its file is made again if it is gone."""
    if _is_named(path, held.descriptor):
        return True
    try:
        fresh = _open(path, os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return False
    except OSError:
        return True  # the whole folder is gone: whoever writes there says so
    try:
        _locked(path, fresh)
        os.pwrite(fresh, json.dumps(asdict(_this())).encode(), 0)
    except (OSError, Busy):
        # Another opened it before it was locked, and has it.
        os.close(fresh)
        return False
    os.close(held.descriptor)
    held.descriptor = fresh
    return _is_named(path, fresh)


def require_free(path: Path) -> None:
    """Refuse what another process holds, and change nothing.

    Raises:
        Busy: it is held.
    """
    if _is_ours(path):
        return
    try:
        descriptor = _open(path)
    except OSError:
        return  # there is none; or it cannot be read, as whoever takes it will find
    try:
        _require_dead(path, descriptor, kept=_locked(path, descriptor))
    finally:
        os.close(descriptor)


def is_alive(path: Path) -> bool:
    """Whether whoever a lock file names shows life; nothing is taken, and nothing is written."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return False
    try:
        owner, this = _read(descriptor), _this()
        if owner and (owner.machine, owner.space) == (this.machine, this.space):
            return bool(owner.began) and _began(owner.pid) == owner.began
        return time.time() - os.fstat(descriptor).st_mtime < _DEAD_AFTER
    finally:
        os.close(descriptor)


def _key(path: Path) -> tuple[int, Path]:
    # A forked copy of this process holds nothing.
    return os.getpid(), Path(os.path.realpath(path))


def _is_ours(path: Path) -> bool:
    """Whether this thread holds it.

    Raises:
        Busy: another thread of this process does.
    """
    held = _held.get(_key(path))
    if held is not None and held.thread != threading.get_ident():
        raise _busy(path, _this())
    return held is not None


def _take(path: Path) -> tuple[int, Owner | None]:
    for _ in range(_TRIES):
        made = False
        try:
            descriptor = _open(path)
        except FileNotFoundError:
            try:
                descriptor = _open(path, os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                continue
            made = True
        try:
            kept = _locked(path, descriptor)
            if made or not _is_named(path, descriptor):
                dead = None
            else:
                dead = _require_dead(path, descriptor, kept=kept)
                if not kept:
                    # Without the kernel's lock the name alone decides: who made the file has it.
                    _clear(path, descriptor)
                    os.close(descriptor)
                    descriptor, _ = _take(path)
                    return descriptor, dead
            if _is_named(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(asdict(_this())).encode(), 0)
                return descriptor, dead
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        os.close(descriptor)
    raise _busy(path, None)


def _open(path: Path, flags: int = 0) -> int:
    # A link in a folder of somebody else would have us write wherever it leads.
    flags |= os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.open(path, flags, 0o666)


def _locked(path: Path, descriptor: int) -> bool:
    """Lock it with the kernel; False if there is no such lock.

    Raises:
        Busy: another process has.
    """
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise _busy(path, _read(descriptor)) from None
        raise
    return True


def _require_dead(path: Path, descriptor: int, *, kept: bool) -> Owner | None:
    """The dead owner of a lock file.

    Raises:
        Busy: it may be alive.
    """
    owner, this = _read(descriptor), _this()
    if kept and (owner is None or owner.machine == this.machine):
        # The kernel that gave us the lock is the one that took it from the dead; without a name,
        # the owner was killed before it could write it.
        return owner
    if owner and (owner.machine, owner.space) == (this.machine, this.space):
        if owner.began and _began(owner.pid) == owner.began:
            raise _busy(path, owner)
        return owner
    if (quiet := _age(path, descriptor)) < _DEAD_AFTER:
        raise _busy(path, owner, quiet)
    return owner


def _clear(path: Path, descriptor: int) -> None:
    """Take a dead owner's file away; of several who want to, one does.

    Raises:
        Busy: another is about it.
    """
    guard = path.with_name(f"{path.name}.clearing")
    try:
        os.close(_open(guard, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        with contextlib.suppress(OSError):
            if time.time() - guard.stat().st_mtime > _DEAD_AFTER:
                guard.unlink()  # of one who was killed in here
        raise _busy(path, None) from None
    try:
        # The open descriptor keeps the number of the dead file from being given to another.
        if _is_named(path, descriptor):
            path.unlink()
    finally:
        guard.unlink(missing_ok=True)


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether the open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _age(path: Path, descriptor: int) -> float:
    """Seconds since the owner's last sign of life, by the clock that wrote it: a file system's
    may be ahead of this machine's."""
    shown = os.fstat(descriptor).st_mtime
    probe = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        now = time.time()
    return now - shown


def _show_life(path: Path, held: _Held) -> None:
    while not held.done.wait(_SIGN_OF_LIFE):
        # Afterwards the descriptor may be another file's.
        with held.guard, contextlib.suppress(OSError):
            if not held.done.is_set() and _kept(path, held):
                os.utime(held.descriptor)


def _read(descriptor: int) -> Owner | None:
    """Who the file names; None if it was not written whole."""
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (OSError, ValueError, TypeError):
        return None


def _busy(path: Path, owner: Owner | None, quiet: float | None = None) -> Busy:
    why = "two processes writing the same run would corrupt it"
    fix = "wait for it, or stop it; chat, inspect and verify can be used meanwhile"
    if quiet is not None:
        why = (
            f"it was last active {max(quiet, 0):.0f} seconds ago; it is considered dead after "
            f"{_DEAD_AFTER:.0f} seconds without activity"
        )
    named = f" ({owner})" if owner else ""
    return Busy(
        f"another process is writing this run{named}",
        where=str(path.parent),
        why=why,
        fix=fix,
        code="run-busy",
    )


def _this() -> Owner:
    return Owner(
        os.getpid(),
        _began(os.getpid()),
        platform.node(),
        _text("/proc/sys/kernel/random/boot_id") or platform.node(),
        _link("/proc/self/ns/pid"),
        time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _began(pid: int) -> str:
    """When a process began; empty if there is none, "runs" where only that is known."""
    if stat := _text(f"/proc/{pid}/stat"):
        # The name of the program, in brackets, may hold anything.
        fields = stat.rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    if os.path.isdir("/proc/self") or os.name != "posix":
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "runs"


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
