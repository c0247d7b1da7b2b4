"""Pushing to the Hub, against an endpoint of this machine that answers as the Hub does."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from run_folders import files, write_run
from tiny_runs import command
from truetune.reporting.card import CARD
from truetune.run_dir import sha256


class Hub(ThreadingHTTPServer):
    """Repositories as name -> {path: content}."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str] = set()
        self.requests: list[str] = []
        self.refuse: tuple[str, int] | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, repo: str, private: bool, *names: str) -> None:
        self.repos[repo], self.private[repo] = dict.fromkeys(names, b"old"), private


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def _json(self, status: int, value: Any, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _seen(self) -> bytes:
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _is_refused(self) -> bool:
        refuse = self.server.refuse
        if refuse and refuse[0] in self.path:
            self._json(refuse[1], {"error": "not today"}, X_Error_Message="not today")
            return True
        return False

    def do_GET(self) -> None:
        self._seen()
        repo = self.path.removeprefix("/api/models/").partition("?")[0]
        if self._is_refused():
            return
        if repo not in self.server.repos:
            self._json(404, {"error": "none"}, X_Error_Code="RepoNotFound")
            return
        there = [{"rfilename": name} for name in self.server.repos[repo]]
        told = {"id": repo, "private": self.server.private[repo], "siblings": there, "sha": "0"}
        self._json(200, {**told, "tags": [], "downloads": 0})

    def do_POST(self) -> None:
        body = self._seen()
        if self._is_refused():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization')}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.add(repo, bool(private))
            self._json(200, {"url": f"{self.server.url}/{repo}"})
        elif "/preupload/" in self.path:
            told = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json(200, {"files": told})
        elif "/commit/" in self.path:
            repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "deletedFile":
                    del self.server.repos[repo][value["path"]]
            url = f"{self.server.url}/{repo}/commit/1"
            self._json(200, {"commitUrl": url, "commitOid": "1", "success": True})
        elif "validate-yaml" in self.path:
            self._json(200, {"errors": [], "warnings": []})
        else:
            self._json(404, {"error": self.path})

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    made = Hub()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield made
    made.shutdown()
    made.server_close()


def finished(folder: Path, *, verified: bool | None = True, adapter: bool = False) -> Path:
    """A finished run whose manifest lists its files."""
    contents = files(adapter=adapter)
    inside = "adapter" if adapter else "model"
    contents[f"{inside}/{CARD}"] = (
        "---\nlicense: mit\n---\n# mine\n\n<!-- truetune: how to use it -->\nold\n"
        "<!-- truetune: end -->\n"
    )
    contents[f"{inside}/trainer_state.json"] = "private"
    contents[f"{inside}/.cache"] = "hidden"
    write_run(folder, contents)
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest = {"finished": True, "artifact": inside, "verified": verified, "files": listed}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def merged(folder: Path) -> Path:
    """What `export --merge` leaves."""
    folder.mkdir()
    for name, text in (("config.json", "{}"), ("model.safetensors", "w")):
        (folder / name).write_text(text)
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / CARD).write_text("# merged\n")
    (folder / "verify.json").write_text(json.dumps({"passed": True, "checks": [], "files": hashes}))
    return folder


def test_a_verified_run_is_pushed_privately_in_one_commit(hub: Hub, tmp_path: Path) -> None:
    told = command("push", finished(tmp_path / "run"), "me/first")
    assert told.code == 0, told.err
    assert f"pushed 3 files: {hub.url}/me/first (private)" in told.out
    assert hub.private == {"me/first": True}
    there = hub.repos["me/first"]
    assert sorted(there) == [CARD, "config.json", "model.safetensors"]
    assert there["model.safetensors"] == b"weights"
    card = there[CARD].decode()
    assert "# mine" in card
    assert "hf download me/first --local-dir first" in card
    assert 'from_pretrained("me/first")' in card
    assert str(tmp_path) not in card
    assert sum("/commit/" in request for request in hub.requests) == 1
    assert hub.tokens <= {"Bearer hf_secret", ""}
    assert "hf_secret" not in told.out + told.err


def test_a_public_one_on_demand(hub: Hub, tmp_path: Path) -> None:
    told = command("push", merged(tmp_path / "merged"), "me/first", "--public")
    assert told.code == 0, told.err
    assert "(public)" in told.out
    assert hub.private == {"me/first": False}
    assert "verify.json" not in hub.repos["me/first"]


def test_what_was_not_verified_is_refused_and_nothing_is_made(hub: Hub, tmp_path: Path) -> None:
    changed = merged(tmp_path / "changed")
    (changed / "model.safetensors").write_text("other")
    added = merged(tmp_path / "added")
    (added / "modeling.py").write_text("evil")
    alone = merged(tmp_path / "alone")
    (alone / "verify.json").unlink()
    for folder in (changed, added, alone):
        told = command("push", folder, "me/first")
        assert told.code == 2, folder
        assert "error[push-unverified]" in told.err
        assert "--unverified" in told.err
    assert hub.repos == {}
    told = command("push", alone, "me/first", "--unverified")
    assert told.code == 0, told.err
    assert "warning[pushed-unverified]" in told.out


def test_a_run_that_failed_its_verification(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truetune.verification.verdict import Check, Verdict

    asked = []

    def verdict(state: Any) -> Any:
        def verify(source: str, **_: Any) -> Verdict:
            asked.append(source)
            return Verdict(source, (Check("logits", state, "2 nats apart"),))

        return verify

    tampered = finished(tmp_path / "tampered")
    (tampered / "model" / "model.safetensors").write_text("other")
    never = finished(tmp_path / "never", verified=None)
    monkeypatch.setattr("truetune.run.push.verify", verdict("failed"))
    for folder in (finished(tmp_path / "failed", verified=False), tampered, never):
        told = command("push", folder, "me/first")
        assert told.code == 1
        assert "what was saved is not what was trained; nothing was pushed" in told.err
    assert len(asked) == 3
    assert hub.repos == {}
    # A run that was never verified is verified now.
    monkeypatch.setattr("truetune.run.push.verify", verdict("passed"))
    assert command("push", never, "me/first").code == 0
    assert hub.repos


def test_what_cannot_be_pushed(hub: Hub, tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    for repo in ("first", "a/b/c", "me/fi rst", "-x", "me/.."):
        told = command("push", run, "--", repo) if repo[0] == "-" else command("push", run, repo)
        assert told.code == 2, repo
        assert "error[hub-name]" in told.err
    (run / "manifest.json").unlink()
    told = command("push", run, "me/first")
    assert (told.code, "error[push-unfinished]" in told.err) == (2, True)
    empty = tmp_path / "empty"
    empty.mkdir()
    told = command("push", empty, "me/first")
    assert (told.code, "error[push-nothing]" in told.err) == (2, True)
    assert hub.requests == []


def test_a_repository_that_is_public_already_or_holds_other_files(hub: Hub, tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    hub.add("me/open", False)
    told = command("push", run, "me/open")
    assert (told.code, "error[hub-is-public]" in told.err) == (2, True)
    hub.add("me/full", True, "pytorch_model.bin", ".gitattributes", CARD, "config.json")
    told = command("push", run, "me/full")
    assert (told.code, "error[hub-not-empty]" in told.err) == (2, True)
    assert "pytorch_model.bin" in told.err
    assert hub.repos["me/full"]["config.json"] == b"old"
    assert command("push", run, "me/full", "--overwrite").code == 0
    assert sorted(hub.repos["me/full"]) == sorted(
        [".gitattributes", CARD, "config.json", "model.safetensors"]
    )
    # A second push of the same files needs nothing.
    assert command("push", run, "me/full").code == 0


def test_an_adapter_on_a_local_base_is_warned_of(hub: Hub, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", adapter=True)
    base = tmp_path / "base"
    base.mkdir()
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(base)}))
    told = command("push", run, "me/first", "--unverified")
    assert told.code == 0, told.err
    assert "warning[push-base-local]" in told.out
    assert str(tmp_path) not in hub.repos["me/first"][CARD].decode()


def test_nobody_is_logged_in(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    told = command("push", finished(tmp_path / "run"), "me/first")
    assert (told.code, "error[hub-no-token]" in told.err) == (2, True)
    assert "hf auth login" in told.err
    assert hub.requests == []


@pytest.mark.parametrize(("path", "status"), [("/repos/create", 403), ("/commit/", 400)])
def test_the_hub_refuses(hub: Hub, tmp_path: Path, path: str, status: int) -> None:
    hub.refuse = (path, status)
    told = command("push", finished(tmp_path / "run"), "me/first")
    assert told.code == 1
    assert "error[hub-refused]: the Hub refused the request: " in told.err
    assert "not today" in told.err
    assert f"status {status}" in told.err
    assert "Traceback" not in told.err
    assert not any(hub.repos.values())


def test_no_hub_at_all(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_secret"}
    words = [sys.executable, "-m", "truetune", "push", str(run), "me/first"]
    for more, code in (
        ({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}, "hub-unreachable"),
        ({"HF_HUB_OFFLINE": "1"}, "hub-offline"),
    ):
        env = {**os.environ, **quiet, **more}
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        assert f"error[{code}]" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_endpoint_of_the_environment(hub: Hub, tmp_path: Path) -> None:
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    words = [sys.executable, "-m", "truetune", "push", str(finished(tmp_path / "run")), "me/first"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(hub.repos["me/first"]) == [CARD, "config.json", "model.safetensors"]
