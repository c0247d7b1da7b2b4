"""The process that compares replies by patterns and mathematics, which may run for ever.

Standard input is one JSON object, {"kind", "pattern", "pairs": [[reply, expected], ...]}; each pair
is answered by a line, [right, what the reply says]. The kernel ends the process when a pair takes
more than a few seconds of processor time; the answers before it stay.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time

from truetune.evaluation.match import mathematics, pattern_match

_SECONDS = 3
_MOST_MEMORY = 4 * 2**30


def main() -> None:
    """Answer pairs until there is none left."""
    logging.disable(logging.CRITICAL)
    question = json.load(sys.stdin)
    _limit_memory()
    for reply, expected in question["pairs"]:
        _limit_time()
        try:
            if question["kind"] == "regex":
                judged = pattern_match(question["pattern"], reply, expected)
            else:
                judged = mathematics(reply, expected)
            line = [judged.right, judged.said]
        except Exception:  # whatever a library says of a text that it cannot read
            line = [False, None]
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def _limit_time() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + _SECONDS, most))


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    except (ImportError, OSError, ValueError):
        pass  # macOS keeps no such limit


if __name__ == "__main__":
    main()
