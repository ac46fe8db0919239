"""One task of a comparison, done with one thread: a run, or the timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from flatwise.files import write_json
from flatwise.lab.child import Event
from flatwise.lab.config import CompareConfig
from flatwise.lab.folder import RunFolder
from flatwise.lab.job import all_jobs, identity, run_job
from flatwise.lab.timing import time_methods

TIMING = "timing"


@contextmanager
def one_thread() -> Iterator[None]:
    """Work with one thread, and leave the caller's threads and random state as they were.

    Yields:
        Nothing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def perform(config: CompareConfig, folder: RunFolder, task: int | str, send: Callable[[Event], None]) -> None:
    """Do one task with one thread and leave the caller's threads and random state as they were.

    Args:
        config: the settings.
        folder: the run folder.
        task: the number of a run in the list of all runs, or ``"timing"``.
        send: takes the events ``epoch`` and ``notice``.
    """
    with one_thread():
        if task == TIMING:
            write_json(folder.timing, {"identity": identity(config), **time_methods(config)})
        else:
            run_job(
                config,
                all_jobs(config)[int(task)],
                folder,
                on_epoch=lambda epoch: send({"event": "epoch", "task": task, "epoch": epoch}),
                on_notice=lambda text: send({"event": "notice", "text": text}),
            )
