"""Push a run's artifact or a model folder to the Hub, only if it was verified and has not changed
since."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.errors import CheckFailed, UsageError
from truetune.exporting.hub import find_place, upload
from truetune.findings import Finding, counted
from truetune.listener import Listener
from truetune.reporting.card import CARD, read_card, use_block, with_use_block
from truetune.reporting.facts import RunFacts
from truetune.run_dir import VERDICT, RunDir, opened, parsed, sha256
from truetune.verification.artifact import run_of, verify
from truetune.verification.files import check_files


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        url: the address of the repository.
        private: whether the repository is private.
        files: names of the files that were pushed.
        verified: whether what was pushed is known to be what was trained.
        findings: notes and warnings.
    """

    url: str
    private: bool
    files: tuple[str, ...]
    verified: bool
    findings: tuple[Finding, ...]


def push(
    source: str,
    repo: str,
    *,
    public: bool = False,
    unverified: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Pushed:
    """Push a run's artifact, or a model or adapter folder.

    Args:
        source: a run, or a folder.
        repo: OWNER/NAME on the Hub.
        public: everybody may read it.
        unverified: push what no verification has passed, too.
        overwrite: take other files of the repository away.

    Raises:
        UsageError: there is nothing to push, or the repository may not be written.
        CheckFailed: it is not what was trained.
        TruetuneError: the Hub refuses it.
    """
    listener = listener or Listener()
    folder, run = _folder(source)
    files = _files(folder)
    # What the Hub says is known in a second; verification may take a minute.
    place = find_place(repo, list(files), public=public, overwrite=overwrite)
    verified = _verified(source, folder, run, listener, unverified=unverified)
    findings = [] if verified else [_unverified(folder)]
    facts = RunFacts.read(run or RunDir(folder))
    config = facts.adapter if run else RunFacts.read_adapter(folder)
    base = str(config.get("base_model_name_or_path") or "") or None
    if base and Path(base).exists():
        findings.append(_local_base(base))
        base = Path(base).name
    contents: dict[str, Path | bytes] = dict(files)
    if text := read_card(folder):
        block = use_block(facts, repo.partition("/")[2], base, repo)
        contents[CARD] = with_use_block(text, block).encode()
    for finding in findings:
        listener.finding(finding)
    listener.stage(f"pushing {counted(len(contents), 'file')}")
    url = upload(place, contents)
    return Pushed(url, place.private, tuple(sorted(contents)), verified, tuple(findings))


def _folder(source: str) -> tuple[Path, RunDir | None]:
    """The folder to push, and the run that it is the artifact of."""
    run = RunDir(source)
    if run.looks_like_one() and not run.finished:
        raise UsageError(
            "the run is unfinished: there is nothing to push yet",
            where=source,
            fix=f"finish it with truetune train --resume {shlex.quote(source)}",
            code="push-unfinished",
        )
    folder = Path(opened(source))
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"{source} is neither a run nor a model",
            where=str(folder),
            why="it contains neither config.json nor adapter_config.json",
            fix="pass a run, or the folder of a model or an adapter",
            code="push-nothing",
        )
    owner = run_of(str(folder))
    artifact = owner.artifact() if owner else None
    ours = artifact is not None and artifact.resolve() == folder.resolve()
    return folder, owner if ours else None


# What lies beside a model for truetune alone.
_KEPT = (VERDICT, "trainer_state.json", "trainer_state.safetensors")


def _files(folder: Path) -> dict[str, Path]:
    """Name -> path of what is pushed; hidden files are the system's or a tool's."""
    named = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in named.items()
        if not any(part.startswith(".") for part in name.parts) and name.as_posix() not in _KEPT
    }


def _verified(
    source: str, folder: Path, run: RunDir | None, listener: Listener, *, unverified: bool
) -> bool:
    """Whether it is what was trained, as far as files and a fresh process say.

    Raises:
        CheckFailed: it is not, or nobody knows.
    """
    if run is not None and run.finished:
        files = check_files(run)
        recorded = _json(run.file("manifest.json")).get("verified") is True
        if recorded and files.state == "passed":
            return True
        if unverified:
            return False
        listener.stage("verifying in a fresh process")
        verdict = verify(str(run.path))
        if verdict.passed:
            return True
        raise CheckFailed(
            "what was saved is not what was trained; nothing was pushed", [*verdict.findings()]
        )
    record = _json(folder / VERDICT)
    hashes = record.get("files")
    if record.get("passed") is True and isinstance(hashes, dict) and _same(folder, hashes):
        return True
    if unverified:
        return False
    raise UsageError(
        "there is no proof that this folder is what was trained; nothing was pushed",
        where=source,
        why="its files were changed since they were verified"
        if hashes
        else "it is neither a run nor a merged model that truetune compared with its adapter",
        fix="push the run or the model that `truetune export --merge` writes, or add --unverified",
        code="push-unverified",
    )


def _same(folder: Path, hashes: dict[str, Any]) -> bool:
    """Whether all files are those that were verified; the card is its owner's."""
    names = {name for name in _files(folder) if name != CARD}
    known = {name for name in hashes if name != CARD}
    return names == known and all(sha256(folder / name) == hashes[name] for name in names)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _unverified(folder: Path) -> Finding:
    return Finding(
        "pushed-unverified",
        "warning",
        "there is no proof that what is pushed is what was trained",
        str(folder),
        why="--unverified was given",
    )


def _local_base(base: str) -> Finding:
    return Finding(
        "push-base-local",
        "warning",
        "the adapter's base is a folder on this machine: no one else can load the adapter",
        base,
        why="adapter_config.json names it as the base",
        fix="push a merged model: truetune export RUN --merge -o DIR",
    )
