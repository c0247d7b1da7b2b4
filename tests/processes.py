"""A function in several processes that know each other, as torchrun starts them; forked, so that
nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any


def in_processes(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What each process returns, by rank; an exception comes back as it is."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ends = [context.Pipe(duplex=False) for _ in range(size)]
    started = [
        context.Process(target=_run, args=(rank, size, port, ends[rank][1], function, arguments))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    try:
        return [
            # Bytes: torch would hand tensors over in memory that ends with their process.
            pickle.loads(receiver.recv_bytes()) if receiver.poll(100) else "no answer"
            for receiver, _ in ends
        ]
    finally:
        for process in started:
            process.join(10)
            process.kill()


def _run(
    rank: int, size: int, port: int, answer: Any, function: Callable[..., Any], arguments: Any
) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        answer.send_bytes(pickle.dumps(function(*arguments)))
    except BaseException as error:
        traceback.print_exc()
        answer.send_bytes(pickle.dumps(error))
