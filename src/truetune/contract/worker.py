"""The process that renders chat templates. `sandbox.py` starts one for a whole run.

A template is a program from somebody else's folder. The sandbox of transformers keeps it away from
files and attributes, but only a separate process can stop an endless loop and limit the memory of a
multiplied string. This file is run by its path, in a process without torch, and imports nothing
from truetune.

Requests and answers are JSON, one per line. A request is {"describe": source} or {"source",
"special", "date", "texts": [JSON, ...], "jobs": [[messages, tools, add_generation_prompt,
arguments], ...]}. Messages, tools and arguments are indices into texts; a request without "texts"
uses those of the request before. Each request has "seconds", the CPU time that one answer may take.
The kernel ends a process that takes more, by SIGPROF, whatever it is doing. Each job is answered by
one line, [CPU seconds, answer], so that the parent sees progress.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, BinaryIO

# In bytes, in addition to what the process uses once its libraries are loaded.
_MORE_MEMORY = 768 * 2**20
_LONGEST_TEXT = 32_000_000
_MOST_VERDICTS = 10_000


def main() -> None:
    """Answer requests until the pipe closes."""
    import signal

    # Ctrl-C reaches the whole group; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    from transformers.utils import chat_template_utils as library

    _remember_verdicts()
    _limit_memory()
    _send(answers, ["ready"])
    known: list[Any] = []
    while (request := _receive(requests)) is not None:
        if "describe" in request:
            described = _timed(lambda r=request: _describe(library, r["describe"]), request)
            _send(answers, described)
            continue
        _freeze(library, request["date"])
        if "texts" in request:
            known = [json.loads(text) for text in request["texts"]]
        for job in request["jobs"]:
            _send(
                answers,
                _timed(lambda j=job, r=request, k=known: _render(library, r, j, k), request),
            )


def _timed(work: Any, request: dict[str, Any]) -> list[Any]:
    """Return [CPU seconds, answer]."""
    _alarm(request["seconds"])
    # CPU time, so that other programs on the machine do not count.
    began = time.process_time()
    answer = _guarded(work)
    _alarm(0.0)
    return [time.process_time() - began, answer]


def _alarm(seconds: float) -> None:
    import signal

    if hasattr(signal, "setitimer"):  # without it, the parent enforces a deadline
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _remember_verdicts() -> None:
    """Let the sandbox judge each attribute of a type only once."""
    # These judgements take half of the time of a rendering.
    from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

    judged = Sandbox.is_safe_attribute
    verdicts: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(self: Any, obj: Any, attr: str, value: Any) -> bool:
        # The verdict follows from the object's type and the name alone.
        key = type(obj), attr
        if key not in verdicts:
            if len(verdicts) > _MOST_VERDICTS:
                verdicts.clear()
            verdicts[key] = judged(self, obj, attr, value)
        return verdicts[key]

    Sandbox.is_safe_attribute = is_safe_attribute  # type: ignore[method-assign]


def _render(
    library: Any, request: dict[str, Any], job: list[Any], known: Sequence[Any]
) -> list[Any]:
    numbers, tools, prompt, arguments = job
    # transformers deletes fields that are None before rendering.
    chat = [{k: v for k, v in known[n].items() if v is not None} for n in numbers]
    texts, _ = library.render_jinja_template(
        conversations=[chat],
        tools=known[tools] if tools is not None else None,
        chat_template=request["source"],
        add_generation_prompt=prompt,
        **{**request["special"], **known[arguments]},
    )
    if len(texts[0]) > _LONGEST_TEXT:
        return ["size", len(texts[0])]
    return ["ok", texts[0]]


def _describe(library: Any, source: str) -> list[Any]:
    """Return ["ok", facts] about a template.

    The facts are the variables that it reads but does not set, the constants that it compares them
    with, the fields that it reads of any value, and its literal texts.
    """
    from jinja2 import meta, nodes

    environment = library._compile_jinja_template(source).environment
    # find_undeclared_variables folds the constants of its tree, so it gets a tree of its own.
    free = meta.find_undeclared_variables(environment.parse(source))
    tree = environment.parse(source)
    stands_for = _aliases(tree, free)
    choices: dict[str, list[Any]] = {}
    for compare in tree.find_all(nodes.Compare):
        sides = [compare.expr, *(operand.expr for operand in compare.ops)]
        names = {name for side in sides for name in _names(side, free, stands_for)}
        for side in sides:
            options = side.items if isinstance(side, nodes.List | nodes.Tuple) else [side]
            values = [o.value for o in options if isinstance(o, nodes.Const)]
            for name in sorted(names):
                choices.setdefault(name, []).extend(v for v in values if isinstance(v, str | int))
    literals = [node.data for node in tree.find_all(nodes.TemplateData)]
    literals += [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
    fields = {node.attr for node in tree.find_all(nodes.Getattr)}
    fields |= {n.arg.value for n in tree.find_all(nodes.Getitem) if isinstance(n.arg, nodes.Const)}
    fields |= {
        call.args[0].value
        for call in tree.find_all(nodes.Call)
        if isinstance(call.node, nodes.Getattr)
        and call.node.attr == "get"
        and call.args
        and isinstance(call.args[0], nodes.Const)
    }
    facts = {
        "variables": sorted(free),
        "choices": choices,
        "literals": literals,
        "fields": sorted(name for name in fields if isinstance(name, str)),
        # This is not an undeclared variable, because the library provides it.
        "dated": any(node.name == "strftime_now" for node in tree.find_all(nodes.Name)),
    }
    return ["ok", facts]


def _names(expression: Any, free: set[str], stands_for: dict[Any, set[str]]) -> set[str]:
    """Return the arguments in an expression, also those behind names that the template sets."""
    from jinja2 import nodes

    found: set[str] = set()
    for node in (expression, *expression.find_all((nodes.Name, nodes.Getattr))):
        if isinstance(node, nodes.Name):
            found |= {node.name} & free or stands_for.get(node.name, set())
        elif isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
            found |= stands_for.get((node.node.name, node.attr), set())
    return found


def _aliases(tree: Any, free: set[str]) -> dict[Any, set[str]]:
    """Return the arguments behind each name that the template sets itself.

    The key is (name, attribute) for an attribute of a namespace.
    """
    from jinja2 import nodes

    found: dict[Any, set[str]] = {}
    for _ in range(3):  # an alias of an alias of an alias
        for assign in tree.find_all(nodes.Assign):
            target = assign.target
            if isinstance(target, nodes.Name):
                key: Any = target.name
            elif isinstance(target, nodes.NSRef):
                key = (target.name, target.attr)
            else:
                continue
            names = _names(assign.node, free, found)
            if names:
                found.setdefault(key, set()).update(names)
    return found


def _guarded(work: Any) -> list[Any]:
    """Return the answer to a job, or the way in which the template failed."""
    import jinja2

    try:
        return list(work())
    except jinja2.TemplateSyntaxError as error:
        return ["syntax", str(error.message), error.lineno]
    except MemoryError:
        return ["memory"]
    except RecursionError:
        return ["error", "it recurses without end"]
    except Exception as error:
        return ["error", str(error)[:2000] or type(error).__name__]


class _Frozen(datetime):
    """A clock that is stopped, so that templates that read today's date get the date of the run."""

    at = datetime(2000, 1, 1)

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls.at


def _freeze(library: Any, date: str) -> None:
    # transformers' strftime_now reads `datetime` from its module and has no argument for the date.
    _Frozen.at = datetime.fromisoformat(date) + timedelta(hours=12)
    library.datetime = _Frozen


def _limit_memory() -> None:
    try:
        import resource
        from pathlib import Path

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + _MORE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ImportError, OSError, ValueError):
        pass  # only Linux enforces such a limit; the deadline applies everywhere


def _send(stream: BinaryIO, value: list[Any]) -> None:
    stream.write(json.dumps(value).encode("ascii") + b"\n")
    stream.flush()


def _receive(stream: BinaryIO) -> dict[str, Any] | None:
    line = stream.readline()
    request: dict[str, Any] | None = json.loads(line) if line else None
    return request


if __name__ == "__main__":
    main()
