"""Try an untrusted tokenizer and untrusted patterns in a child process with bounded memory and
time before this process opens them.

This file is also what the child runs; there it imports the tokenizers library and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

# The largest published vocabularies take a third of this, and three seconds on a slow machine.
_MEMORY = 2 * 2**30
_SECONDS = 20  # of processor time: a crowded machine is no fault of the tokenizer's
# Runs of each kind of character that end otherwise: what a pattern that tries all ways stumbles on.
_LINES = (
    *(part * 200 + end for part in "aA1 .\n_" for end in ("", "!", "\u00e9")),
    "The quick brown fox, 12 of them, jumps.\n" * 20,
    "\u6f22\u5b57\u0440\u0443\u0441 " * 40,
)
# What a line of 200 characters may become at most.
_MOST_TOKENS = 20_000
# What a published tokenizer adds to its vocabulary is some thousands of tokens; each of a million
# takes the library ever longer.
_MOST_ADDED = 2**17


def require_harmless(folder: Path) -> None:
    """Raise if the tokenizer takes more memory or time than a tokenizer may, or a chat template
    beside it is longer than one can be.

    Raises:
        ModelError: `model-tokenizer-hostile`, `model-file-hostile`.
    """
    from truetune.model.source import require_bounded

    for template in [*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")]:
        require_bounded(template)
    path = folder / "tokenizer.json"
    with contextlib.suppress(OSError):  # a file that is not there cannot do harm
        found = path.stat()
        _tried(path.resolve(), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=64)
def _tried(path: Path, size: int, changed: int) -> None:
    from truetune.errors import ModelError

    def refused(what: str) -> ModelError:
        return ModelError(
            f"the tokenizer cannot be used: {what}",
            where=str(path),
            why="tokenizer.json is damaged or malicious",
            fix="copy the tokenizer files again from the source of the model",
            code="model-tokenizer-hostile",
        )

    try:
        out, status = _child(str(path))
    except subprocess.TimeoutExpired:
        raise refused(f"a few lines take more than {30 * _SECONDS} seconds") from None
    words = out.decode("utf-8", "replace").strip().splitlines()
    if words[-1:] == ["memory"] or status < 0:
        raise refused(
            f"a few lines take more than {_MEMORY // 2**30} GiB of memory or {_SECONDS} seconds, "
            "or crash the tokenizers library"
        )
    if words[-1:] == ["added"]:
        raise refused(f"it adds more than {_MOST_ADDED:,} tokens to its vocabulary")
    if words[-1:] == ["tokens"]:
        raise refused(f"a line of 200 characters becomes more than {_MOST_TOKENS:,} tokens")
    # Any other failure is reported by the library that opens it for good, in its own words.


def are_quick(patterns: Sequence[str], names: Sequence[str]) -> bool:
    """Whether Python matches patterns with names in bounded time; one that is no pattern is
    reported by whoever uses it."""
    return _quick(tuple(patterns), tuple(names))


@lru_cache(maxsize=8)
def _quick(patterns: tuple[str, ...], names: tuple[str, ...]) -> bool:
    asked = json.dumps({"patterns": patterns, "names": names}).encode("ascii")
    try:
        out, _ = _child(_MATCH, asked=asked)
    except subprocess.TimeoutExpired:
        return False
    return out.strip() == b"fine"


# In place of a tokenizer's path, which is absolute.
_MATCH = "match"


def _child(argument: str, *, asked: bytes = b"") -> tuple[bytes, int]:
    """(standard output, exit status)."""
    from truetune.system import child

    # One thread: a machine of many cores would reserve the whole memory for its threads' stacks.
    single = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    process = child.start(
        Path(__file__),
        argument,
        environment=single,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        out, _ = process.communicate(asked, timeout=30 * _SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return out, process.returncode


def _main(path: str) -> str:
    # Healthy patterns match in milliseconds; Python itself takes a tenth of a second.
    seconds = 2 if path == _MATCH else _SECONDS
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if path == _MATCH:
        return _match(json.loads(sys.stdin.buffer.read()))
    # Each added token has this key; the library is asked afterwards.
    if Path(path).read_bytes().count(b'"single_word"') > _MOST_ADDED:
        return "added"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    for line in _LINES:
        if len(tokenizer.encode(line).ids) > _MOST_TOKENS:
            return "tokens"
    return "fine"


def _match(asked: dict[str, list[str]]) -> str:
    for text in asked["patterns"]:
        with contextlib.suppress(re.error, RecursionError, OverflowError):
            pattern = re.compile(text)
            for name in asked["names"]:
                # Whole: it tries at least as many ways as the beginning alone.
                pattern.fullmatch(name)
    return "fine"


if __name__ == "__main__":
    try:
        print(_main(sys.argv[1]))  # noqa: T201
    except MemoryError:
        print("memory")  # noqa: T201
    except Exception:
        print("other")  # noqa: T201
