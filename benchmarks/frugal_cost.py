"""What the contestants of ``frugal.py`` cost: processor time in turns, and the peak of memory."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from allocations import live_bytes
from frugal_contestants import CONTESTANTS, Contestant
from frugal_tasks import Task, Training

TURN = 10
"""Steps of one contestant before the next one's turn: whole rounds of what happens every second or fifth step."""
TURNS = 40
PARTS = 10
"""Parts of a training, of which each counts alike: SAM in the last tenth is one of them."""
PROFILED = 20


def relative(turns: Sequence[float], base: Sequence[float]) -> float:
    """Compare two trainings turn by turn.

    A median over all turns would not see SAM in the last tenth of a training; so each tenth has a median of its own.

    Args:
        turns: seconds of each turn.
        base: of the base's turns.

    Returns:
        The mean over the parts of the median ratio.
    """
    size = len(turns) // PARTS
    ratios = [ours / theirs for ours, theirs in zip(turns, base, strict=True)]
    return statistics.fmean(statistics.median(ratios[i * size : (i + 1) * size]) for i in range(PARTS))


def times(task: Task, contestants: Sequence[Contestant]) -> dict[str, dict[str, Any]]:
    """Let the contestants train in turns, a training of 400 steps each, whose schedules run through once.

    Args:
        task: what is trained.
        contestants: the base first.

    Returns:
        For each: relative time, the quotient of the sums over the whole training, and seconds of a step.
    """
    running = {who.name: Training(task, who, 0, TURN * TURNS) for who in contestants}
    turns: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    for turn in range(TURNS):
        gc.collect()
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.process_time()
            for _ in range(TURN):
                running[name].step()
            turns[name].append(time.process_time() - started)
    base = turns["base"]
    return {
        name: {
            "time": round(relative(seconds, base), 4),
            "time_of_all": round(sum(seconds) / sum(base), 4),
            "step_seconds": round(statistics.median(seconds) / TURN, 6),
        }
        for name, seconds in turns.items()
    }


def peak(task: Task, contestant: Contestant) -> int:
    """Return the peak of live bytes in a training of 20 steps, above the state before the first one."""
    training = Training(task, contestant, 0, PROFILED)
    gc.collect()

    def train() -> None:
        for _ in range(PROFILED):
            training.step()

    return live_bytes(train)[0]


def measure(task: Task, contestants: Sequence[Contestant]) -> dict[str, dict[str, Any]]:
    """Measure time and memory of some contestants and of the base, with one thread.

    Args:
        task: what is trained.
        contestants: in any order.

    Returns:
        For each the times, and "memory": the peak beyond the base's, in multiples of the weights.
    """
    torch.set_num_threads(1)
    # Training longer does not change a step: it costs what it trains longer.
    wanted = [CONTESTANTS["base"], *(who for who in contestants if who.name != "base" and who.longer == 1)]
    print(f"{task.name}: {len(wanted)} contestants in turns", file=sys.stderr, flush=True)
    found = times(task, wanted)
    weights = sum(p.nbytes for p in task.build(0).model.parameters())
    peaks = {who.name: peak(task, who) for who in wanted}
    for name, row in found.items():
        row["memory"] = round((peaks[name] - peaks["base"]) / weights, 3)
    for who in contestants:
        if who.longer > 1:
            found[who.name] = {"time": float(who.longer), "time_of_all": float(who.longer), "memory": 0.0}
    return found
