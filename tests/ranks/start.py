"""Start a function in several processes that talk over gloo on this machine."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch

SECONDS = 120


def _rank(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from datetime import timedelta

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = (pathlib.Path(folder) / "meeting").as_uri()
    limit = timedelta(seconds=SECONDS)  # a rank that waits for one that has left raises, it does not hang
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=limit)
    result = work(rank, *arguments)
    torch.save(result, pathlib.Path(folder) / str(rank))
    torch.distributed.barrier()  # neither leaves while the other may still talk to it
    torch.distributed.destroy_process_group()


def on_ranks(work: Callable[..., Any], folder: pathlib.Path, *arguments: Any, world: int = 2) -> list[Any]:
    """Run ``work(rank, *arguments)`` in every process.

    Args:
        work: a function that can be imported.
        folder: an empty folder.
        *arguments: more arguments.
        world: the number of processes.

    Returns:
        What each returned.
    """
    torch.multiprocessing.spawn(_rank, (world, str(folder), work, arguments), nprocs=world)
    return [torch.load(folder / str(rank)) for rank in range(world)]


class Sums:
    """Counts how often a wrapper sums gradients."""

    def __init__(self, ddp: Any) -> None:
        self.count = 0
        ddp.register_comm_hook(None, self.hook)

    def hook(self, state, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations, and wants no strings
        self.count += 1
        work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0] / torch.distributed.get_world_size())
