"""What a step of each method costs: its limit is the gradients it computes, and the base's step.

    python benchmarks/family_cost.py                                   # every method, on mlp and resnet18
    python benchmarks/family_cost.py --models mlp --methods msam gsam --turns 21
    python benchmarks/family_cost.py --out record.json                 # keep the record

Turns alternate in one process. A ratio compares a method's step with ``passes`` gradients and one base step of the same
turn; the median over the turns is reported with its quartiles. Steps that a schedule leaves out count as they come: the
method runs as many steps in a turn as make its pattern whole.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import flatwise
from step_cost_models import MODELS, Task, make_task

PATTERN = 5
"""Steps in a turn: the period of ``every-k`` and ``looksam``."""


def method_step(name: str, task: Task) -> tuple[Callable[[], Any], Any]:
    """Return a step of a method, and its optimizer."""
    samples = len(task.batch[1])
    given = {
        "p": math.inf, "model": task.model, "train_size": 1000, "total_steps": 100, "warmup_steps": 0,
        "micro_batch_size": samples // 2,
    }  # fmt: skip
    options = {option: given[option] for option in flatwise.variant_info(name).needs}
    if name == "late":
        options["window"] = (0.0, 1.0)
    opt = flatwise.create(name, torch.optim.SGD(task.params, lr=0.01, momentum=0.9), **options)
    reduction = "none" if opt.wants_sample_losses else "mean"

    def loss_fn(batch: Any) -> torch.Tensor:
        return functional.cross_entropy(task.model(batch[0]), batch[1], reduction=reduction)

    return lambda: opt.step(loss_fn, task.batch), opt


def seconds(work: Callable[[], Any], times: int = PATTERN) -> float:
    """Return the mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def measure(model: str, names: list[str], turns: int) -> dict[str, dict[str, float]]:
    """Measure methods on one model.

    Args:
        model: a key of ``MODELS``.
        names: the methods.
        turns: how often each takes its turn.

    Returns:
        For each method the passes of a step, the median ratio to its limit and to plain training, and the quartiles.
    """
    plain = make_task(model)
    base = torch.optim.SGD(plain.params, lr=0.01, momentum=0.9)

    def gradient() -> None:
        base.zero_grad()
        plain.loss_again().backward()

    rows: dict[str, dict[str, float]] = {}
    for name in names:  # one after the other, each beside the limit, so that memory holds two models
        try:
            step, opt = method_step(name, make_task(model))
        except ValueError as error:
            print(f"{model:10} {name:14} left out: {error}", flush=True)
            continue
        for _ in range(PATTERN):
            step()
            gradient()
            base.step()
        ratios, relative, passes = [], [], []
        for _ in range(turns):
            cost, update = seconds(gradient), seconds(base.step)
            own, counted = 0.0, 0.0
            for _ in range(PATTERN):
                own += seconds(step, 1)
                counted += opt.last.passes
            limit = counted / PATTERN * cost + update
            passes.append(counted / PATTERN)
            ratios.append(own / PATTERN / limit)
            relative.append(own / PATTERN / (cost + update))
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "passes": statistics.mean(passes), "ratio": middle, "low": low, "high": high,
            "relative": statistics.median(relative),
        }  # fmt: skip
        print(
            f"{model:10} {name:14} {rows[name]['passes']:5.2f} gradients   {middle:.3f} of its limit "
            f"({low:.3f}-{high:.3f})   {rows[name]['relative']:.2f} of plain training",
            flush=True,
        )
    return rows


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["mlp", "resnet18"])
    parser.add_argument("--methods", nargs="+", choices=flatwise.list_variants(), default=flatwise.list_variants())
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = {model: measure(model, arguments.methods, arguments.turns) for model in arguments.models}
    if arguments.out:
        arguments.out.write_text(json.dumps({"torch": torch.__version__, "models": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
