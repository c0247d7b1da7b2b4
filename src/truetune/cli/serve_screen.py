"""What `truetune serve` does and shows."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from truetune.cli.screen import Screen
from truetune.errors import UsageError
from truetune.exporting.serve import Served, serving_chat, serving_gguf
from truetune.system.local_http import require_port


def serve(screen: Screen, source: str, port: int, *, fast: bool, device: str) -> None:
    """Serve until Ctrl-C."""
    require_port(port)
    path = Path(source)
    if source.lower().endswith(".gguf"):
        if not path.is_file():
            raise UsageError(
                f"there is no file {source}", fix="specify a GGUF file", code="no-such-file"
            )
        screen.stage("loading the file")
        with serving_gguf(path, port, fast=fast, name=path.stem) as address:
            _told(screen, address, path.stem)
            # The server is a process of its own, which ends with this one.
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        return
    if fast:
        raise UsageError(
            "--fast has no effect without a GGUF file", where="--fast", fix="leave it out"
        )
    from truetune.generate import open_speaker

    screen.stage("loading the weights")
    speaker = open_speaker(source, None, None, device)
    name = path.name or source
    with serving_chat(Served(name, speaker.model, speaker.contract), port) as server:
        _told(screen, server.address, name)
        server.run()


def _told(screen: Screen, address: str, name: str) -> None:
    screen.close()
    screen.line(f"{address}/v1  (model {name}; press Ctrl-C to stop)")
