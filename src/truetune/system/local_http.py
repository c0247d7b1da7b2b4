"""A small HTTP server that only programs on this machine can reach."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from truetune.errors import UsageError

HOST = "127.0.0.1"


class LocalServer:
    """Answers on 127.0.0.1 until it is interrupted or stopped."""

    def __init__(self, handler: type[LocalHandler], port: int, subject: Any) -> None:
        self._server = _Server((HOST, port), handler)
        self._server.subject = subject

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self._server.server_port}"

    def run(self) -> None:
        """Answer until `stop`, or an exception as Ctrl-C and SIGTERM raise it."""
        self._server.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._server.shutdown()

    def close(self) -> None:
        self._server.server_close()


@contextlib.contextmanager
def serving_here(handler: type[LocalHandler], port: int, subject: Any) -> Iterator[LocalServer]:
    """A server that holds its port.

    Args:
        handler: answers the requests.
        port: 0 takes any that is free.
        subject: what is served; the handler finds it as `self.server.subject`.

    Raises:
        UsageError: the port cannot be used.
    """
    try:
        server = LocalServer(handler, port, subject)
    except (OSError, OverflowError) as error:
        raise _taken(port, error) from error
    try:
        yield server
    finally:
        server.close()


def require_port(port: int) -> None:
    """Say that a port is taken before anything is loaded.

    Raises:
        UsageError: it cannot be had.
    """
    try:
        with socket.socket() as probe:
            if _REUSE:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    except (OSError, OverflowError) as error:
        raise _taken(port, error) from error


# Elsewhere it would let two programs share a port; here it lets one begin again at once.
_REUSE = os.name == "posix"


def _taken(port: int, error: Exception) -> UsageError:
    return UsageError(
        f"port {port} cannot be used: {getattr(error, 'strerror', None) or error}",
        why="another program uses this port",
        fix="choose another port with --port, or use --port 0 for any free one",
        code="port-taken",
    )


class _Server(http.server.ThreadingHTTPServer):
    subject: Any
    daemon_threads = True
    allow_reuse_address = _REUSE


class LocalHandler(http.server.BaseHTTPRequestHandler):
    """What every handler shares: who may ask, and how an answer is sent."""

    server: _Server
    server_version, sys_version = "truetune", ""
    # Sent with every answer.
    headers_of_all: tuple[tuple[str, str], ...] = (
        ("X-Content-Type-Options", "nosniff"),
        ("Cache-Control", "no-store"),
    )

    def hosts(self) -> set[str]:
        """The names under which this server may be asked."""
        port = self.server.server_port
        return {f"{name}{end}" for name in ("localhost", HOST) for end in ("", f":{port}")}

    def is_named_rightly(self) -> bool:
        """Whether the request names this server. A page of somebody else, whose own name was made
        to lead here, could otherwise read what is served."""
        named = self.headers.get_all("Host") or []
        return len(named) == 1 and named[0].strip().lower() in self.hosts()

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of an answer."""
        self.send_response(status)
        for name, value in (*self.headers_of_all, *headers.items()):
            self.send_header(name, value)
        self.end_headers()

    def send(self, status: int, body: bytes, kind: str, *, with_body: bool = True) -> None:
        """Send an answer whole.

        Args:
            kind: its media type.
        """
        self.begin(
            status, {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        )
        if with_body:
            # A client that has gone away is no error.
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not shown on the terminal."""
