"""What a step of each method costs: its limit is the gradients it computes, and the base's step.

    python benchmarks/family_cost.py                                   # every method, on mlp and resnet18
    python benchmarks/family_cost.py --models resnet18-224 --methods msam stale random --turns 5
    python benchmarks/family_cost.py --out record.json                 # keep the record; what it held stays in it
    python benchmarks/family_cost.py --page record.json                # the table of docs/speed.md

Turns alternate in one process, on one thread, and processor time is taken, which other work on the machine disturbs
least. A ratio compares a method's step with the gradients it counts and one base step of the same turn; the median over
the turns is reported with its quartiles. Steps that a schedule leaves out count as they come: the method runs as many
steps in a turn as make its pattern whole.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import flatwise
from step_cost_models import LARGE, MODELS, Task, make_task

PATTERN = 5
"""Steps in a turn: the period of ``every-k`` and ``looksam``."""
BEFORE = 25
"""Steps of ``frugal`` before the clock: it looks at its radius on every second of the first 24."""
KNOWN = {**MODELS, **LARGE}
Rows = dict[str, dict[str, float]]


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
    """Return the mean processor time of a call."""
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def measure(model: str, names: list[str], turns: int) -> Rows:
    """Measure methods on one model.

    Args:
        model: a key of ``KNOWN``.
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

    rows: Rows = {}
    for name in names:  # one after the other, each beside the limit, so that memory holds two models
        try:
            step, opt = method_step(name, make_task(model))
            step()
        except (ValueError, RuntimeError) as error:  # such as what torch cannot differentiate twice
            print(f"{model:12} {name:14} left out: {error}", flush=True)
            continue
        for _ in range(BEFORE if name == "frugal" else PATTERN):
            step()
        for _ in range(PATTERN):
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
            f"{model:12} {name:14} {rows[name]['passes']:5.2f} gradients   {middle:.3f} of its limit "
            f"({low:.3f}-{high:.3f})   {rows[name]['relative']:.2f} of plain training",
            flush=True,
        )
    return rows


def page(record: dict[str, Any]) -> str:
    """Write the record as a table.

    Args:
        record: what ``--out`` keeps.

    Returns:
        Markdown: for each method and model the ratio to the limit, and in brackets that to plain training.
    """
    models: dict[str, Rows] = record["models"]
    lines = ["| method | gradients | " + " | ".join(models) + " |", "|---" * (2 + len(models)) + "|"]
    for name in flatwise.list_variants():
        found = [rows[name] for rows in models.values() if name in rows]
        if not found:
            continue
        cells = [f"{r[name]['ratio']:.2f} ({r[name]['relative']:.2f})" if name in r else "" for r in models.values()]
        lines.append(f"| `{name}` | {found[0]['passes']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(KNOWN), default=["mlp", "resnet18"])
    parser.add_argument("--methods", nargs="+", choices=flatwise.list_variants(), default=flatwise.list_variants())
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    parser.add_argument("--page", type=Path, help="measure nothing; print the table of this record")
    arguments = parser.parse_args()
    if arguments.page:
        print(page(json.loads(arguments.page.read_text())))
        return
    torch.set_num_threads(1)
    known = arguments.out is not None and arguments.out.exists()
    record: dict[str, Any] = json.loads(arguments.out.read_text()) if known else {"models": {}}
    record |= {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    for model in arguments.models:
        record["models"].setdefault(model, {}).update(measure(model, arguments.methods, arguments.turns))
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
