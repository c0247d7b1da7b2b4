"""Several processes, one run: each computes its share of a step's rows with weights of its own.

input   the environment that torchrun (or `accelerate launch`) gives each process
does    sums gradients and losses over the processes, once a step, after all micro-batches; lets
        them agree on whether to go on
output  Group; of one process where no launcher started us, and then every call is free

Every process makes the same step plan from the step's number and takes its share, so that no row
travels. A step divides by the supervised tokens of all processes: two processes give the step that
one gives, in another order of sums. gloo on CPU, nccl on CUDA.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.errors import ToldElsewhere, UsageError
from truetune.system.lazy import torch

# Numbers that travel at once: few calls, and a copy that is small beside the gradients.
_BUCKET = 2**24
# A process may wait for another one that saves and verifies; one that dies is noticed at once.
_PATIENCE = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank: of this process, from 0; process 0 writes the run directory.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank; they must be small."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with _others_alive():
            dist.all_gather_object(values, value)
        return values

    def first(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values of process 0, inside of `together`.

        Raises:
            ToldElsewhere: another process failed in the block.
        """
        gathered = self.gather(values)
        # What a process that failed says at the end of the block.
        codes = [other for other in gathered if not isinstance(other, dict)]
        if codes:
            raise ToldElsewhere(codes[0])
        found: dict[str, Any] = gathered[0]
        return found

    def any(self, value: bool) -> bool:
        """Whether it holds in some process."""
        return value if self.size == 1 else any(self.gather(value))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run the block in all processes, and continue only if none of them failed.

        Raises:
            ToldElsewhere: another process failed.
        """
        if self.size == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except ToldElsewhere:
            # All processes know: none waits.
            raise
        except BaseException as caught:
            error = caught
        told = self.gather(error and getattr(error, "exit_code", 1))
        # Those that did not fail may have got as far as `first`.
        codes = [code if isinstance(code, int) else None for code in told]
        # An error that all processes raise is reported by process 0.
        if error and (self.leads or codes[0] is None):
            raise error
        if code := next((code for code in codes if code is not None), None):
            raise ToldElsewhere(code)

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add up over the processes, in place and in float32, bucket by bucket."""
        import torch.distributed as dist

        bucket: list[torch.Tensor] = []
        for index, tensor in enumerate(tensors):
            bucket.append(tensor)
            last = index == len(tensors) - 1
            if not last and sum(t.numel() for t in bucket) < _BUCKET:
                continue
            flat = torch.cat([t.detach().reshape(-1).float() for t in bucket])
            with _others_alive():
                dist.all_reduce(flat)
            parts = flat.split([t.numel() for t in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
            bucket = []

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum `.grad` over the processes; a gradient that only some of them have counts as 0 in
        the others, one that none has stays None."""
        if self.size == 1:
            return
        has = torch.tensor([float(p.grad is not None) for p in parameters])
        has = has.to(parameters[0].device)
        self.sum_([has])
        present = [p for p, count in zip(parameters, has.tolist(), strict=True) if count]
        for parameter in present:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum_([p.grad for p in present if p.grad is not None])

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Sums of plain numbers, in float64."""
        return [sum(values) for values in zip(*self.gather(numbers), strict=True)]

    def same_start_(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Give all processes the trained weights of process 0."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for parameter in parameters:
            dist.broadcast(parameter.data, 0)


@contextlib.contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo raises where a connection is closed
        raise ToldElsewhere(1) from error


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """This process's group, left at the end; one that the program has made is taken as it is.

    Raises:
        UsageError: sharding was asked of the launcher, or it did not say who meets where.
    """
    size = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if size == 1:
        yield Group()
        return
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UsageError(
                f"{name} was requested but would not take effect: each process holds all weights",
                why=f"ACCELERATE_USE_{name} is set, as by `accelerate launch`",
                fix="start it with torchrun, or with accelerate launch --multi_gpu",
                code="sharding",
            )
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours and missing:
        raise UsageError(
            f"this was started as {size} processes, but they cannot find each other: "
            f"{', '.join(missing)} "
            "is not set",
            why="WORLD_SIZE is set, which a launcher normally does",
            fix="start with torchrun --nproc-per-node N -m truetune train ..., or unset WORLD_SIZE",
            code="no-launcher",
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ours:
        both = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=_PATIENCE)
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        if ours:
            dist.destroy_process_group()
