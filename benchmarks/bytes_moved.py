"""What a step of each method launches, reads and writes beyond its gradients and one step of the base optimizer.

    python benchmarks/bytes_moved.py                              # every method, and the contestants of step_cost.py
    python benchmarks/bytes_moved.py --models mlp --methods sam msam
    python benchmarks/bytes_moved.py --out record.json            # keep the record; what it held stays in it
    python benchmarks/bytes_moved.py --page record.json           # the table of docs/speed.md

Counted, not timed, so a busy machine changes nothing: each operation with the bytes of the tensors that it reads and
writes, whether they come from memory or a cache. A foreach call counts as one launch. Pages are those that the system
had to hand out during steps after a warm-up: memory that no step before had left behind.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flatwise
from allocations import live_bytes
from family_cost import BEFORE, KNOWN, PATTERN, method_step
from step_cost import Counter
from step_cost_contestants import BASES, CONTESTANTS, RHO, TwoPasses
from step_cost_models import Task, make_task

PEERS = [name for name in CONTESTANTS if name != "limit"]
HALF = "sam, first half of the tensors at rho 0"
Row = dict[str, float]
ROUND = 32
"""Steps of ``frugal`` of which one looks at its radius."""


def counted(work: Callable[[], Any]) -> tuple[float, float]:
    """Return launches and bytes of some work."""
    with Counter() as counter:
        work()
    return counter.launches, counter.bytes


def pages(work: Callable[[], Any]) -> float:
    """Return the pages touched first in one piece of work, in the mean of a few."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(PATTERN):
        work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / PATTERN


def peak(step: Callable[[], Any], params: Sequence[Tensor], count: int) -> int:
    """Return the peak of live bytes in some steps, above the state between two of them, without gradients."""
    for param in params:
        param.grad = None  # what is alive now and freed later might not be seen

    def steps() -> None:
        for _ in range(count):
            step()

    return live_bytes(steps)[0]


def half_step(task: Task) -> tuple[Callable[[], Any], Any]:
    """Return a step of SAM that moves the second half of the tensors, and its optimizer."""
    half = len(task.params) // 2
    groups = [{"params": task.params[:half], "rho": 0.0}, {"params": task.params[half:]}]
    kind, options = BASES["sgd"]
    opt = flatwise.SAM(groups, kind, RHO, **options)
    return lambda: opt.step(task.loss, task.batch), opt


def measure(model: str, names: list[str], say: Callable[[str], None] = print) -> dict[str, Row]:
    """Count on one model.

    Args:
        model: a key of ``KNOWN``.
        names: methods, or contestants of ``step_cost.py``.
        say: takes a line for each.

    Returns:
        For each the gradients of a step, and beyond them and the base's step: launches, bytes for each parameter; the
        peak of memory beyond that of plain training; and the pages touched first in a whole step. The last two are in
        multiples of the parameters.
    """
    task = make_task(model)
    plain = TwoPasses(task, "sgd")
    for _ in range(3):
        plain.step()
    gradient, update = counted(plain.closure), counted(plain.optimizer.step)
    numbers = sum(p.numel() for p in task.params)
    size = sum(p.nbytes for p in task.params)

    def training() -> None:
        plain.closure()
        plain.optimizer.step()

    least = peak(training, task.params, PATTERN)
    rows: dict[str, Row] = {}
    for name in names:
        own = make_task(model)
        opt = None
        try:
            if name in CONTESTANTS:
                step = CONTESTANTS[name](own, "sgd")
            elif name == HALF:
                step, opt = half_step(own)
            else:
                step, opt = method_step(name, own)
            step()
        except (ValueError, ImportError, RuntimeError) as error:  # such as what torch cannot differentiate twice
            say(f"{model:10} {name:26} left out: {error}")
            continue
        for _ in range(BEFORE if name == "frugal" else PATTERN):
            step()
        launches = moved = passes = 0.0
        for _ in range(PATTERN):
            here = counted(step)
            launches, moved = launches + here[0], moved + here[1]
            passes += 2.0 if opt is None else opt.last.passes
        passes /= PATTERN
        rows[name] = {
            "passes": passes,
            "peak": (peak(step, own.params, ROUND if name == "frugal" else PATTERN) - least) / size,
            "launches": launches / PATTERN - passes * gradient[0] - update[0],
            "bytes": (moved / PATTERN - passes * gradient[1] - update[1]) / numbers,
            "fresh": pages(step) * resource.getpagesize() / size,
        }
        say(
            f"{model:10} {name:26} {passes:5.2f} gradients {rows[name]['launches']:+8.1f} launches "
            f"{rows[name]['bytes']:8.1f} bytes per parameter {rows[name]['fresh']:6.2f} fresh"
        )
    return rows


def page(record: dict[str, Any]) -> str:
    """Write the record as a table.

    Args:
        record: what ``--out`` keeps.

    Returns:
        Markdown: bytes per parameter, in brackets launches, and the peak of memory, for each model.
    """
    models = record["models"]
    lines = ["| method | " + " | ".join(models) + " |", "|---" * (1 + len(models)) + "|"]
    for name in dict.fromkeys(name for rows in models.values() for name in rows):
        cells = [
            f"{r[name]['bytes']:.0f} ({r[name]['launches']:+.0f}), {r[name]['peak']:.2f}" if name in r else ""
            for r in models.values()
        ]
        shown = name if name in CONTESTANTS or name == HALF else f"`{name}`"
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse, count, write."""
    names = [*flatwise.list_variants(), HALF, *PEERS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(KNOWN), default=["mlp", "deep", "resnet18"])
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    parser.add_argument("--page", type=Path, help="count nothing; print the table of this record")
    arguments = parser.parse_args()
    if arguments.page:
        print(page(json.loads(arguments.page.read_text())))
        return
    torch.set_num_threads(1)
    known = arguments.out is not None and arguments.out.exists()
    record: dict[str, Any] = json.loads(arguments.out.read_text()) if known else {"models": {}}
    record |= {"torch": torch.__version__, "rho": RHO}
    for model in arguments.models:
        found = measure(model, arguments.methods, lambda line: print(line, flush=True))
        record["models"].setdefault(model, {}).update(found)
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
