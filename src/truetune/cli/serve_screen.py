"""What `truetune serve` does and shows."""

from __future__ import annotations

from pathlib import Path

from truetune.cli.screen import Screen
from truetune.errors import UsageError
from truetune.exporting.serve import Served, serving_chat, serving_gguf
from truetune.model.placement import require_device
from truetune.run_dir import CHECKPOINTS, opened
from truetune.servers.llama_cpp import require_gguf
from truetune.system.local_http import LocalServer, require_port


def serve(screen: Screen, source: str, port: int, *, fast: bool, device: str) -> None:
    """Serve until it is interrupted."""
    require_port(port)
    path = Path(source)
    # What clients may call it besides the name that is listed.
    aliases = tuple(dict.fromkeys((source, path.name, str(path.absolute()))))
    if source.lower().endswith(".gguf"):
        if not path.is_file():
            raise UsageError(
                f"there is no file {source}", fix="specify a GGUF file", code="no-such-file"
            )
        require_gguf(path)
        screen.stage("loading the file")
        with serving_gguf(path, port, fast=fast, name=path.stem, aliases=aliases) as server:
            _run(screen, server, path.stem)
        return
    if fast:
        raise UsageError(
            "--fast has no effect without a GGUF file", where="--fast", fix="leave it out"
        )
    require_device(device)
    from truetune.generate import open_speaker

    screen.stage("loading the weights")
    speaker = open_speaker(source, None, None, device)
    name = path.name or path.resolve().name
    folder = Path(opened(source))
    if folder.parent.name == CHECKPOINTS and folder != path:
        screen.line(f"the run is unfinished: its last checkpoint is served, {folder}")
    with serving_chat(Served(name, speaker.model, speaker.contract, aliases), port) as server:
        _run(screen, server, name)


def _run(screen: Screen, server: LocalServer, name: str) -> None:
    screen.close()
    screen.line(f"{server.address}/v1  (model {name}; press Ctrl-C to stop)")
    server.run()
