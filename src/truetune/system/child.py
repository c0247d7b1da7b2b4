"""The one way to start a child process: nothing runs from the working folder, no secrets are
inherited, and the child ends when its parent does, however that one ends.

This file is also the first thing that a child runs, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Names of environment variables that hold what a child has no use for.
_SECRET = re.compile(
    r"TOKEN(?!IZERS)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|PRIVATE|WEBHOOK|COOKIE|AUTH|_KEY(_|$)|KEY$",
    re.IGNORECASE,
)
# What opens a model of the Hub, for a child that loads one.
_HUB = frozenset({"HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"})
# Ends that keep a child alive. A forked copy of this process must not hold them open.
_held: set[int] = set()


def start(
    what: Path | str,
    *arguments: str,
    loads_models: bool = False,
    environment: Mapping[str, str] | None = None,
    **pipes: Any,
) -> subprocess.Popen[bytes]:
    """Start a Python file or module as a child process.

    Args:
        what: the path of a file, or the name of a module.
        loads_models: whether the child keeps the token of the Hub; every other secret is left out
            of its environment either way.
        environment: variables to set in the child.
        pipes: stdin, stdout and stderr, as `subprocess.Popen` takes them.
    """
    command = [sys.executable, "-P", __file__]
    given = {**_without_secrets(loads_models), **(environment or {})}
    words = ["file" if isinstance(what, Path) else "module", str(what), *arguments]
    if os.name != "posix":
        return subprocess.Popen([*command, "-", *words], env=given, **pipes)
    theirs, ours = os.pipe()
    _held.add(ours)
    try:
        process = subprocess.Popen(
            [*command, str(theirs), *words], env=given, pass_fds=[theirs], **pipes
        )
    except BaseException:
        _let_go(ours)
        raise
    finally:
        os.close(theirs)
    weakref.finalize(process, _let_go, ours)
    return process


@dataclass(frozen=True)
class Reply:
    """What a child left: standard output, exit status, and what it wrote to standard error."""

    data: bytes
    status: int
    errors: str


def ask(what: Path | str, question: bytes, *, loads_models: bool = False) -> Reply:
    """Start a file or module, give it the question on standard input, and wait for its answer on
    standard output. Nothing touches a disk, so nothing is left there when either is killed."""
    pipe = subprocess.PIPE
    with start(what, loads_models=loads_models, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            data, errors = process.communicate(question)
        except BaseException:
            process.kill()
            raise
    return Reply(data, process.returncode, errors.decode("utf-8", "replace").strip())


def ask_json(what: Path | str, question: Any) -> dict[str, Any]:
    """The same in JSON, of a child that runs `answer_json`; {"error": ...} if it did not answer."""
    reply = ask(what, json.dumps(question).encode("utf-8"))
    try:
        said: dict[str, Any] = json.loads(reply.data)
    except ValueError:
        said = {"error": reply.errors.strip()[-300:] or f"exit code {reply.status}"}
    return said


def answer_json(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side of `ask_json`."""
    reply = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # Libraries say on standard output what they do.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        said = answer(json.loads(sys.stdin.buffer.read()))
    except Exception as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(said), file=reply, flush=True)


def _without_secrets(loads_models: bool) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not _SECRET.search(name) or (loads_models and name in _HUB)
    }
    if "PYTHONPATH" in kept:
        # An empty entry is the working folder.
        entries = filter(None, kept["PYTHONPATH"].split(os.pathsep))
        kept["PYTHONPATH"] = os.pathsep.join(entries)
    return kept


def _let_go(descriptor: int) -> None:
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def _let_go_all() -> None:
    for descriptor in list(_held):
        _let_go(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_all)


def _end_with_parent(descriptor: int) -> None:
    """Have the kernel end this process when the other end of the pipe is closed: by the parent, or
    by the parent's death. It needs no thread and no turn of the interpreter, and unlike Linux's
    parent-death signal it does not mistake the end of a parent's thread for the parent's."""
    import fcntl
    import select

    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO])
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
    watch = select.poll()
    watch.register(descriptor, select.POLLIN)
    if watch.poll(0):
        os._exit(1)  # it was gone before it could be watched


def _main(watched: str, kind: str, what: str, *arguments: str) -> None:
    if watched != "-":
        _end_with_parent(int(watched))
    sys.argv = [what, *arguments]
    if kind == "file":
        runpy.run_path(what, run_name="__main__")
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
