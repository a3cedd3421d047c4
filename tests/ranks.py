"""Run a function on several gloo ranks of this machine, each in a fresh process, under plain pytest.

Processes are forked from a server that has torch and megatron-core loaded, so that starting them takes milliseconds.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# torch._dynamo: every optimizer loads it when it is made.
_CONTEXT.set_forkserver_preload(["parallelism.run", "parallelism.engines.megatron", "torch._dynamo", "deepspeed"])


class RankFailed(AssertionError):
    """A rank raised; the message is its traceback."""


@dataclass(frozen=True)
class Died:
    """What stands in the results for a rank that ended without returning."""

    exit_code: int | None


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0, deaths: bool = False
) -> list[Any]:
    """``function(*args)`` on every rank after ``device.connect``; the results by rank.

    ``deaths=True`` accepts ranks that are killed: they appear as :class:`Died`, and ranks still running half a
    second after the first death are killed as a gang would be.
    """
    from parallelism.device import host_store

    store = host_store()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        _CONTEXT.Process(target=_rank, args=(sender, rank, world_size, store.port, function, args), daemon=False)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    try:
        return _collect(processes, [receiver for receiver, _ in pipes], timeout, deaths)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _collect(processes: list[Any], receivers: list[Connection], timeout: float, deaths: bool) -> list[Any]:
    results: dict[int, Any] = {}
    deadline, first_death = time.monotonic() + timeout, None
    while len(results) < len(processes):
        for rank, (process, receiver) in enumerate(zip(processes, receivers, strict=True)):
            if rank in results:
                continue
            if receiver.poll(0.01):
                results[rank] = _receive(receiver, process)
            elif not process.is_alive() and not receiver.poll(0.01):
                results[rank] = Died(process.exitcode)
            if isinstance(results.get(rank), Died):
                if not deaths:
                    raise RankFailed(f"rank {rank} ended with exit code {results[rank].exit_code}")
                first_death = first_death or time.monotonic()
        if first_death and time.monotonic() > first_death + 0.5:
            for process in processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            missing = sorted(set(range(len(processes))) - set(results))
            raise TimeoutError(f"ranks {missing} did not end within {timeout:g} s")
    return [results[rank] for rank in range(len(processes))]


def _receive(receiver: Connection, process: Any) -> Any:
    try:
        failed, value = receiver.recv()
    except EOFError:
        process.join(5)
        return Died(process.exitcode)
    if failed:
        raise RankFailed(value)
    return value


def _rank(sender: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple) -> None:
    from torch.distributed import TCPStore

    from parallelism import device

    try:
        store = TCPStore("127.0.0.1", port, is_master=False)
        device.connect(rank, world_size, "127.0.0.1", port, timeout_seconds=120, store=store)
        result = function(*args)
        device.disconnect()
        sender.send((False, result))
    except BaseException:
        sender.send((True, traceback.format_exc()))
        raise
