"""What a step costs: the methods' steps alternate in one process, so that a busy machine slows all alike."""

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
from flatwise.seeds import stream

WARM_UP = 3
ROUNDS = 20
"""Timed steps of one block, in which a schedule runs through once: a tenth of them is two, every fifth is four."""
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
        The processor's seconds of each step, one entry a round.
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
            # The processor's time: what others do on the machine meanwhile is not this step's.
            start = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def relative(seconds: list[float], reference: list[float], work: list[int] | None = None) -> dict[str, Any]:
    """Compare two interleaved timings round by round.

    Steps of one method may differ in kind: one in five of ``every-k`` computes two gradients, the others one. A median
    over all would be that of the commoner kind; so each kind has a median of its own, and counts by its share.

    Args:
        seconds: of the step in question.
        reference: of the reference's step in the same rounds.
        work: samples differentiated in each step, which tells its kind; None says that all are alike.

    Returns:
        Median ratio, its quartiles, and the median step in seconds.
    """
    kinds: dict[int, list[int]] = {}
    for number, amount in enumerate(work or [0] * len(seconds)):
        kinds.setdefault(amount, []).append(number)
    sums = [0.0, 0.0, 0.0, 0.0]
    for members in kinds.values():
        share = len(members) / len(seconds)
        ratios = [seconds[number] / reference[number] for number in members]
        # One value has no quartiles but itself.
        quartiles = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4, method="inclusive")
        values = [*quartiles, statistics.median(seconds[number] for number in members)]
        sums = [total + share * value for total, value in zip(sums, values, strict=True)]
    lower, median, upper, step = sums
    return {"ratio": median, "quartiles": [lower, upper], "step_seconds": step}


def time_methods(config: CompareConfig, budget: float | None = None) -> dict[str, Any]:
    """Time a step of every method against a step of the base optimizer.

    Args:
        config: the settings; the base is timed whether or not it is among the methods.
        budget: seconds after which no block of rounds is begun (default: a few).

    Returns:
        The number of rounds, and for each method its time relative to the base, and the gradients of the timed steps.
    """
    budget = BUDGET_SECONDS if budget is None else budget
    methods = [Method(config.optimizer, None)]
    methods += [method for method in trained_methods(config) if method.variant is not None]
    data = load_data(config.dataset, config.data_root)
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    work: dict[str, list[int]] = {method.name: [] for method in methods}
    begun = time.perf_counter()
    # Blocks, each with new optimizers whose whole training is the block: otherwise the last tenth of a long training,
    # or its warm-up, would never be met here.
    while True:
        steps = {
            method.name: _stepper(
                Trainer(config, method, 0, data, total_steps=WARM_UP + ROUNDS), work[method.name].append
            )
            for method in methods
        }
        for name, values in interleave(steps, fewest=ROUNDS, most=ROUNDS).items():
            seconds[name] += values
            del work[name][-WARM_UP - ROUNDS : -ROUNDS]
        count = len(seconds[config.optimizer])
        if count >= MOST_ROUNDS or time.perf_counter() - begun > budget:
            break
    reference = seconds[config.optimizer]
    batch_size = work[config.optimizer][0]
    return {
        "rounds": count,
        "methods": {
            name: {**relative(values, reference, work[name]), "gradients": statistics.fmean(work[name]) / batch_size}
            for name, values in seconds.items()
        },
    }


def in_training(step: Mapping[str, Any], gradients: float) -> tuple[float, list[float]]:
    """Carry a timing over to a training.

    A schedule that looks at the gradients, or a warm-up of a few steps, meets another share of steps with two gradients
    in a training than in a timing. Time goes with the gradients.

    Args:
        step: what :func:`time_methods` says about a method; without ``gradients`` it stands as it is.
        gradients: gradient evaluations per step, as counted in the trainings.

    Returns:
        Time relative to the base, and its quartiles.
    """
    share = gradients / step.get("gradients", gradients)
    return step["ratio"] * share, [bound * share for bound in step["quartiles"]]


def _stepper(trainer: Trainer, on_work: Callable[[int], object]) -> Callable[[], object]:
    shifts = stream(0, "timing")
    count = len(trainer.split.labels)
    position = 0

    def step() -> None:
        nonlocal position
        before = trainer.samples_differentiated
        # Through the data in order, as one step of the training loop: gather, learning rate, step.
        indices = torch.arange(position, position + trainer.batch_size) % count
        trainer.set_learning_rate(position // trainer.batch_size % trainer.total_steps)
        trainer.step(trainer.batch(indices, shifts))
        position += trainer.batch_size
        on_work(trainer.samples_differentiated - before)

    trainer.model.train()
    return step
