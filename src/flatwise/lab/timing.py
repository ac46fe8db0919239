"""What a step costs: the methods' steps alternate in one process, so a busy machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flatwise.lab.config import CompareConfig
from flatwise.lab.data import load_data
from flatwise.lab.loop import Trainer
from flatwise.lab.methods import Method, trained_methods
from flatwise.lab.seeds import stream

WARM_UP = 3
FEWEST_ROUNDS = 9
MOST_ROUNDS = 300
BUDGET_SECONDS = 4.0


def interleave(
    steps: Mapping[str, Callable[[], object]],
    *,
    fewest: int = FEWEST_ROUNDS,
    most: int = MOST_ROUNDS,
    budget: float = BUDGET_SECONDS,
) -> dict[str, list[float]]:
    """Time several steps in turns.

    Args:
        steps: what to time, by name.
        fewest: rounds to run whatever they cost.
        most: rounds to stop at.
        budget: seconds after which no round beyond the fewest is begun.

    Returns:
        The seconds of each step, one entry a round.
    """
    for _ in range(WARM_UP):
        for step in steps.values():
            step()
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begun = time.perf_counter()
    for turn in range(most):
        if turn >= fewest and time.perf_counter() - begun > budget:
            break
        # Each round starts with another method: none always follows the same one into a warm cache.
        for position in range(len(names)):
            name = names[(turn + position) % len(names)]
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def relative(seconds: list[float], reference: list[float]) -> dict[str, Any]:
    """Compare two interleaved timings round by round.

    Args:
        seconds: of the step in question.
        reference: of the reference's step in the same rounds.

    Returns:
        Median ratio, its quartiles, and the median step in seconds.
    """
    ratios = [value / other for value, other in zip(seconds, reference, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": median, "quartiles": [lower, upper], "step_seconds": statistics.median(seconds)}


def time_methods(config: CompareConfig) -> dict[str, Any]:
    """Time a step of every method against a step of the base optimizer.

    Args:
        config: the settings; the base is timed whether or not it is among the methods.

    Returns:
        The number of rounds, and for each method its time relative to the base.
    """
    methods = [Method(config.optimizer, None)]
    methods += [method for method in trained_methods(config) if method.variant is not None]
    data = load_data(config.dataset, config.data_root)
    steps = {method.name: _stepper(Trainer(config, method, 0, data)) for method in methods}
    seconds = interleave(steps)
    reference = seconds[config.optimizer]
    return {
        "rounds": len(reference),
        "methods": {name: relative(values, reference) for name, values in seconds.items()},
    }


def _stepper(trainer: Trainer) -> Callable[[], object]:
    shifts = stream(0, "timing")
    count = len(trainer.split.labels)
    position = 0

    def step() -> None:
        nonlocal position
        # Through the data in order, as one step of the training loop: gather, learning rate, step.
        indices = torch.arange(position, position + trainer.batch_size) % count
        trainer.set_learning_rate(position // trainer.batch_size % trainer.total_steps)
        trainer.step(trainer.batch(indices, shifts))
        position += trainer.batch_size

    trainer.model.train()
    return step
