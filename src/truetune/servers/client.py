"""A JSON client for model servers, without proxies or redirects, with limits on size and time."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from truetune.errors import TruetuneError, UsageError

# An answer with the log-probabilities of a vocabulary of 256,000 tokens has 30 MB.
_MOST_BYTES = 256 * 2**20
_SECONDS = 600.0


class ServerError(TruetuneError):
    """A server did not answer, or refused a request.

    Args:
        status: of HTTP; 0 if there was no answer.
    """

    default_code = "server-failed"

    def __init__(self, what: str, *, status: int = 0, **parts: str) -> None:
        super().__init__(what, **parts)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Client:
    """Sends JSON to one server.

    Args:
        url: `http://host:port`, with or without `/v1` at its end.
        key: sent as a bearer token.

    Raises:
        UsageError: the address is not an HTTP address.
    """

    def __init__(self, url: str, key: str = "", seconds: float = _SECONDS) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                f"{url!r} is not the address of a server",
                where="--url",
                fix="pass an address such as --url http://127.0.0.1:8080",
                code="server-address",
            )
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.key, self.seconds = key, seconds
        # A proxy of the environment would send requests for this machine elsewhere.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    def get(self, path: str) -> Any:
        """The value at a path.

        Raises:
            ServerError: it does not answer with JSON.
        """
        return self._ask(path, None)

    def post(self, path: str, value: Any) -> Any:
        """What the server answers to a value; raises as `get`."""
        return self._ask(path, json.dumps(value).encode("utf-8"))

    def raw(self, method: str, path: str, data: bytes | None) -> http.client.HTTPResponse:
        """The server's answer as it comes, errors too; the caller closes it.

        Raises:
            ServerError: there is none.
        """
        try:
            return self._open(method, path, data)
        except urllib.error.HTTPError as error:
            # It reads like the answer that it was made of, and closes that when it goes.
            return error  # type: ignore[return-value]
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(path, error) from error

    def _open(self, method: str, path: str, data: bytes | None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        answer: http.client.HTTPResponse = self._opener.open(request, timeout=self.seconds)
        return answer

    def _unreachable(self, path: str, error: Exception) -> ServerError:
        reason = getattr(error, "reason", None) or error
        return ServerError(
            f"the server does not answer: {reason}",
            where=self.url + path,
            why="nothing listens there, or the server has stopped",
            fix="start it, or give its address with --url",
            code="server-unreachable",
        )

    def _ask(self, path: str, data: bytes | None) -> Any:
        where = self.url + path
        try:
            with self._open("GET" if data is None else "POST", path, data) as answer:
                raw = answer.read(_MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            said = error.read(4096).decode("utf-8", "replace")
            raise ServerError(
                f"the server refused the request: {_message(said) or error.reason}",
                status=error.code,
                where=where,
                why=f"status {error.code}",
                fix="read the server's own log",
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(path, error) from error
        if len(raw) > _MOST_BYTES:
            raise ServerError(
                "the server's answer is too large",
                where=where,
                fix="report this to the server's authors",
            )
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ServerError(
                "the server's answer is not valid JSON",
                where=where,
                why="a different kind of server listens there",
                fix="give the address of a model server",
            ) from error


def _message(said: str) -> str:
    """The message of an error as servers send it."""
    try:
        value = json.loads(said)
        error = value.get("error", value)
        return str(error.get("message", "") if isinstance(error, dict) else error)[:300]
    except (ValueError, AttributeError, RecursionError):
        return said.strip()[:200]
