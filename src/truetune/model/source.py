"""Locate a model's files: in a folder, or in the Hub's cache.

input   what the user wrote: a folder or a Hub id, and a revision
does    finds the folder (a Hub model is fetched into the cache: safetensors only), and says what
        is wrong with a name that leads nowhere
output  ModelFiles: everything after this reads plain files in one folder
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.data.read import READERS, extension
from truetune.errors import ModelError
from truetune.findings import gib, near

ADAPTER_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
# Names, not "*.safetensors": some repositories hold the weights a second time (consolidated.*).
_WEIGHTS = ["model*.safetensors", "adapter_model*.safetensors"]


@dataclass(frozen=True)
class ModelFiles:
    """A model's files on this machine.

    Attributes:
        source: as the user wrote it.
        folder: where the files are.
        revision: the commit of a Hub model, None for a folder.
    """

    source: str
    folder: Path
    revision: str | None

    @property
    def is_hub(self) -> bool:
        return self.revision is not None

    @property
    def is_adapter(self) -> bool:
        return (self.folder / ADAPTER_CONFIG).is_file()

    @property
    def address(self) -> str:
        """What finds the model again from any working directory: a Hub id or an absolute path."""
        return self.source if self.is_hub else str(self.folder.resolve())


# The name of the base model that comes with truetune, and where it lies.
EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "lab" / "base"


def locate(source: str | Path, revision: str | None = None, *, weights: bool) -> ModelFiles:
    """Find a model's files.

    Args:
        source: a folder, a Hub id such as `Qwen/Qwen2.5-0.5B`, or `embedded` for the base model
            that comes with truetune; an existing folder wins.
        revision: branch, tag or commit of a Hub model.
        weights: also fetch the weights of a Hub model that are not in the cache.

    Raises:
        ModelError: the model does not exist, or cannot be reached.
    """
    return locate_here(source) or _from_hub(str(source), revision, weights=weights)


def locate_here(source: str | Path) -> ModelFiles | None:
    """Locate a local folder; return None if the name may be a Hub id.

    Raises:
        ModelError: neither, or a small file of the folder is a link that leads out of it.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.is_dir():
        _refuse_links(path)
        return ModelFiles(text, path, None)
    if text == EMBEDDED:
        return ModelFiles(text, EMBEDDED_FOLDER, None)
    if path.is_file():
        gguf = path.suffix.lower() == ".gguf"
        raise ModelError(
            f"{text} is a file, not a model folder",
            why=NO_GGUF[0]
            if gguf
            else "a model is a folder with config.json, weights and tokenizer",
            fix=NO_GGUF[1]
            if gguf
            else f"put the model first, then the data: MODEL {text}"
            if extension(path) in READERS and path.name not in ("config.json", ADAPTER_CONFIG)
            else f"pass the folder: {path.parent}",
            code="model-is-file",
        )
    if extension(path) in READERS and text.count("/") < 2:
        raise ModelError(
            f"{text} is a data file, where a model is expected",
            why="there is no such folder, and no Hub model has this name",
            fix=f"put the model first, then the data: MODEL {text}",
            code="model-is-file",
        )
    if not _HUB_ID.fullmatch(text):
        raise _no_such_folder(text, path)
    return None


# (why, fix) for a model that is only there as GGUF.
NO_GGUF = (
    "a GGUF file is a copy for llama.cpp, mostly in fewer bits, and is not trained",
    "pass the folder or the Hub id of the model that it was made from",
)

# What is read of a model beside its weights, by transformers, by peft and here.
_READ = (
    *(
        "*config.json",
        "base_fingerprint.json",
        "tokenizer*",
        "vocab.*",
        "merges.txt",
        "tekken.json",
    ),
    *("special_tokens_map.json", "added_tokens.json", "*.jinja", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates"),
)
# The Hub cache names a file by a hash of what it holds: a link there names its own contents.
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path of a model's folder is, or lies behind, a link to what is not the model's.

    A link may lead to a place within the folder, which may itself be a link, or to a file of a Hub
    cache. Within the folder, what git keeps for itself (addresses with passwords in them) is not
    the model's; the files that git-annex keeps there are.
    """
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if target.is_relative_to(root):
        inside = target.relative_to(root).parts
        return inside[:1] == (".git",) and inside[1:3] != ("annex", "objects")
    # Some installers put links in place of a package's files.
    if root == Path(os.path.realpath(EMBEDDED_FOLDER)):
        return False
    blobs = target.parent
    cached = blobs.name == "blobs" and (blobs.parent / "snapshots").is_dir()
    return not (cached and _HASH.fullmatch(target.name))


def _refuse_links(folder: Path) -> None:
    """Raise where a small file that is read of a model leads out of its folder: what it holds would
    be read, and passed on with the trained or exported model. Weights may lie on another disk.

    Raises:
        ModelError: `model-link-outside`.
    """
    with os.scandir(folder) as entries:
        links = [folder / entry.name for entry in entries if entry.is_symlink()]
    links = [path for path in links if any(fnmatch.fnmatchcase(path.name, one) for one in _READ)]
    links += (folder / "additional_chat_templates").glob("*.jinja")
    for path in links:
        if path.is_symlink() and leads_out(path, folder):
            raise ModelError(
                f"{path.name} is a link that leads out of the model's folder: to "
                f"{os.path.realpath(path)}",
                where=str(path),
                why="the file it points to would be read, and passed on with the model; a folder "
                "from somebody else could point to any file on this machine",
                fix="if the link is your own, put a copy of the file in its place",
                code="model-link-outside",
            )


def _no_such_folder(text: str, path: Path) -> ModelError:
    return ModelError(
        f"no such model folder: {text}",
        why="the path does not exist",
        fix=_did_you_mean(path) or "check the path",
        code="model-not-found",
    )


def _did_you_mean(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return ""
    folders = [item.name for item in parent.iterdir() if item.is_dir()]
    # A bare word may also be meant as the model that comes with the package.
    own = [EMBEDDED] if len(path.parts) == 1 and not path.is_absolute() else []
    close = near(path.name, [*folders, *own])
    return f"did you mean {parent / close[0]}?" if close else ""


def _from_hub(text: str, revision: str | None, *, weights: bool) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def failed(why: str, fix: str, code: str = "model-not-found") -> ModelError:
        path = Path(text)
        if not revision and len(path.parts) > 1 and path.parent.is_dir():
            # runs/first may be a Hub id as well, but its folder is here.
            return _no_such_folder(text, path)
        hint = _did_you_mean(path)
        return ModelError(
            f"{text} is neither a folder nor a reachable Hub model",
            where=f"revision {revision}" if revision else "",
            why=why,
            fix=f"{hint} Or {fix}" if hint else fix,
            code=code,
        )

    patterns = _SMALL_FILES + (_WEIGHTS if weights else [])
    try:
        folder = Path(snapshot_download(text, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise failed(
            "the Hub shares this model only with people who accepted its terms",
            fix="accept them on its page and log in with `hf auth login`",
            code="model-gated",
        ) from error
    except RevisionNotFoundError as error:
        raise failed("the model has no such revision", "check the revision") from error
    except RepositoryNotFoundError as error:
        raise failed(
            "the Hub has no such model, or it is private",
            "check the spelling, or log in with `hf auth login`",
        ) from error
    except LocalEntryNotFoundError as error:
        raise failed(
            "no folder has this name, it is not in the local Hub cache, and the Hub cannot be "
            "reached (offline)",
            fix="pass the path of a local folder, or go online",
            code="model-offline",
        ) from error
    except (OSError, ValueError) as error:
        raise failed(first_line(error), "pass the path of a local folder, or try again") from error
    return ModelFiles(text, folder, folder.name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: not readable, too long, not JSON, not an object, or one key has two values.
    """
    refuse_pointer(path)
    require_bounded(path)

    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            _require_one_value(pairs, path)
        return made

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=whole)
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        cause = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ModelError(
            f"{path.name} cannot be read: {cause}",
            where=str(path),
            why="the file is damaged or was copied in part",
            fix="copy the file again from the source of the model",
            code="model-config-unreadable",
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{path.name} does not contain a JSON object",
            where=str(path),
            fix="copy the file again from the source of the model",
            code="model-config-unreadable",
        )
    return value


# The list of a model's shards and the settings of its tokenizer are the longest: 13 MB and 2 MB of
# published ones. A byte of JSON may become twenty in memory.
_MOST_INDEX, _MOST_JSON = 64 * 2**20, 16 * 2**20
# The longest published chat template has 30 kB.
_MOST_TEMPLATE = 2**20


def require_bounded(path: Path) -> None:
    """Raise if a file is too long to be what its name says.

    Raises:
        ModelError: `model-file-hostile`.
    """
    try:
        size = path.stat().st_size
    except OSError:
        return  # reported by the code that reads it
    most = _MOST_INDEX if path.name.endswith(".index.json") else _MOST_JSON
    if path.suffix == ".jinja":
        most = _MOST_TEMPLATE
    if size <= most:
        return
    raise ModelError(
        f"{path.name} is {gib(size)} large; in a model it never exceeds {gib(most)}",
        where=str(path),
        why="the folder is damaged or malicious",
        fix="copy the file again from the source of the model",
        code="model-file-hostile",
    )


def _require_one_value(pairs: list[tuple[str, Any]], path: Path) -> None:
    """Equal keys with equal values do no harm."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if seen.setdefault(key, value) != value:
            raise ModelError(
                f"{path.name} has the key {json.dumps(key[:80])} twice, with two values",
                where=str(path),
                why="most programs keep the last value and some the first, so they would load "
                "different models",
                fix="keep one of the two lines, or copy the file again from the source of the "
                "model",
                code="model-key-twice",
            )


def refuse_pointer(path: Path) -> None:
    """Raise if a file of a model is a pointer of Git LFS.

    Raises:
        ModelError: `git-lfs-pointer`.
    """
    try:
        with path.open("rb") as file:
            if not file.read(64).startswith(b"version https://git-lfs.github.com/spec/"):
                return
    except OSError:
        return  # reported by the code that reads it
    raise ModelError(
        f"{path.name} is a Git LFS pointer: it points to the file but does not contain it",
        where=str(path),
        why="the repository was cloned without Git LFS",
        fix=f"fetch the files: git -C {shlex.quote(str(path.parent))} lfs pull",
        code="git-lfs-pointer",
    )


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of a library's message, cut to `limit` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]
