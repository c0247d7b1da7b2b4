"""Push a model folder to the Hub in one commit, private by default."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from truetune.errors import TruetuneError, UsageError

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
# What the Hub makes by itself, and what everybody may write on.
_NOT_OURS = (".gitattributes", "README.md", "LICENSE", ".gitignore")


@dataclass(frozen=True)
class Place:
    """The state of a repository before a push.

    Attributes:
        repo: OWNER/NAME.
        exists: whether it is there.
        private: whether it is, or will be.
        stale: existing files that a push would leave in place.
    """

    repo: str
    exists: bool
    private: bool
    stale: tuple[str, ...]


def find_place(repo: str, names: Sequence[str], *, public: bool, overwrite: bool) -> Place:
    """Ask the Hub whether a repository can be written; change nothing.

    Args:
        names: of the files that will be pushed.
        public: the repository is meant to be public.
        overwrite: files of an earlier push may be deleted.

    Raises:
        UsageError: there is no token, the name is invalid, or the repository is already public or
            contains other files.
        TruetuneError: the Hub does not answer.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise _no_name(repo, str(error).splitlines()[0]) from error
    if not _REPO.fullmatch(repo):
        raise _no_name(repo, "a model on the Hub is named by its owner and its own name")
    if not get_token():
        raise UsageError(
            "you are not logged in to the Hub",
            fix="run hf auth login, or set HF_TOKEN to a token with write access",
            code="hub-no-token",
        )
    with _as_ours(repo):
        try:
            info = HfApi().model_info(repo)
        except RepositoryNotFoundError:
            return Place(repo, False, not public, ())
    if not info.private and not public:
        raise UsageError(
            f"{repo} is public: everyone can read what is pushed there",
            fix="add --public, or choose another repository",
            code="hub-is-public",
        )
    there = [file.rfilename for file in info.siblings or ()]
    stale = tuple(name for name in there if name not in names and name not in _NOT_OURS)
    if stale and not overwrite:
        raise UsageError(
            f"{repo} contains {len(stale)} other files: {', '.join(stale[:5])}",
            why="programs may load them together with the pushed files, or instead of them",
            fix="remove them in the same commit with --overwrite, or choose another repository",
            code="hub-not-empty",
        )
    return Place(repo, True, bool(info.private), stale)


def upload(place: Place, files: Mapping[str, Path | bytes]) -> str:
    """Write all files in one commit and remove stale ones; create the repository if there is none.

    Args:
        files: name in the repository -> local path, or content.

    Returns:
        the address of the repository.

    Raises:
        TruetuneError: the Hub refuses it, or does not answer; no partial commit is left.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _as_ours(place.repo):
        if not place.exists:
            api.create_repo(place.repo, private=place.private, exist_ok=True)
        adds = [
            CommitOperationAdd(name, path if isinstance(path, bytes) else str(path))
            for name, path in sorted(files.items())
        ]
        deletes = [CommitOperationDelete(name) for name in place.stale]
        api.create_commit(place.repo, [*adds, *deletes], commit_message="Pushed by truetune")
    return f"{api.endpoint}/{place.repo}"


@contextlib.contextmanager
def _as_ours(repo: str) -> Iterator[None]:
    """Raise errors of huggingface_hub as TruetuneError."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        yield
    except RepositoryNotFoundError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        denied = status in (401, 403)
        raise TruetuneError(
            f"the Hub refused the request: {str(error.server_message or error).splitlines()[0]}",
            where=repo,
            why=f"status {status}" if status else "",
            fix="log in with a token that has write access: hf auth login"
            if denied
            else "try again; the repository is unchanged",
            code="hub-refused",
        ) from error
    except OfflineModeIsEnabled as error:
        raise UsageError(
            "the Hub is disabled: HF_HUB_OFFLINE is set",
            where=repo,
            fix="unset HF_HUB_OFFLINE",
            code="hub-offline",
        ) from error
    except Exception as error:  # whatever the library's connection raises
        said = (str(error).splitlines() or [""])[0]
        raise TruetuneError(
            f"the Hub could not be reached: {said or type(error).__name__}",
            where=repo,
            why=type(error).__name__,
            fix="try again; the repository is unchanged",
            code="hub-unreachable",
        ) from error


def _no_name(repo: str, why: str) -> UsageError:
    return UsageError(
        f"{repo!r} is not a valid repository name",
        why=why,
        fix="use OWNER/NAME, such as me/first",
        code="hub-name",
    )
