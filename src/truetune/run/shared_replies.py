"""Replies by all processes of a run, each a share of them: the others would only wait.

input   prompts that process 0 asks, and the same weights in every process
does    each process generates every n-th reply; process 0 puts them together
output  Replies in the order of the prompts

Whoever writes a reply, its random numbers depend on the seed and on the place of its prompt among
all. With fewer prompts in a batch, logits are those of one process up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.engine.parallel import Group
from truetune.generate import Reply, replies_to_ids
from truetune.model.draw import Sampling
from truetune.model.load import LoadedModel


class SharedReplies:
    """`replies_to_ids` of process 0, with the help of the others."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(
        self,
        loaded: LoadedModel,
        contract: PromptContract,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> list[Reply]:
        """Return the replies; in process 0, while the others `help`.

        Raises:
            RuntimeError: another process failed.
        """
        if self.group.size == 1:
            return replies_to_ids(loaded, contract, prompts, sampling, begun=begun)
        asked = [*map(tuple, prompts)], sampling, begun
        self.group.gather(asked)
        parts = self._parts(loaded, contract, *asked)
        written: list[Any] = [None] * len(prompts)
        for rank, part in enumerate(parts):
            if isinstance(part, str):
                raise RuntimeError(f"process {rank}: {part}")
            written[rank :: self.group.size] = part
        return written

    def help(self, loaded: LoadedModel, contract: PromptContract) -> None:
        """Generate this process's share, until process 0 calls `finish`."""
        while (asked := self.group.gather(None)[0]) is not None:
            self._parts(loaded, contract, *asked)

    def finish(self) -> None:
        """Let the other processes go on; in process 0."""
        if self.group.size > 1:
            self.group.gather(None)

    def _parts(
        self,
        loaded: LoadedModel,
        contract: PromptContract,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        begun: Sequence[Sequence[int]] | None,
    ) -> list[list[Reply] | str]:
        """Return each process's replies, or why it has none."""
        own = slice(self.group.rank, None, self.group.size)
        part: list[Reply] | str
        try:
            part = replies_to_ids(
                loaded,
                contract,
                prompts[own],
                sampling,
                begun=begun and begun[own],
                places=range(len(prompts))[own],
            )
        except Exception as error:  # whatever a model's generation raises: the others wait
            part = f"{type(error).__name__}: {error}"
        return self.group.gather(part)
