"""Processes as torchrun starts them, forked: what is imported is there already."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable

from accelerate.state import AcceleratorState


def run_processes(count: int, task: Callable[[], object]) -> None:
    """`task` in so many processes at once, which find torchrun's variables in their environment. Raises AssertionError if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")

    def child(rank: int) -> None:
        os.environ |= {"WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}", "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            task()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    children = [context.Process(target=child, args=(rank,)) for rank in range(count)]
    for process in children:
        process.start()
    for process in children:
        process.join(600)
        process.kill()
    assert [process.exitcode for process in children] == [0] * count
