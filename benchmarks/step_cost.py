"""What a SAM step costs beyond two gradients and one step of the base optimizer.

Run ``python benchmarks/step_cost.py``. All contestants share one model in one process and take turns, a few steps each;
a ratio compares a contestant with the limit in the same turn, and the median over the turns is reported with its
quartiles. Before that, each contestant must make the step that a literal SAM step makes, both in float64; after
it, launches, bytes and memory are counted in one step each, without a clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from allocations import live_bytes
from step_cost_contestants import BASES, CONTESTANTS, RHO, Step
from step_cost_models import MODELS, Task, make_task

GOALS = {"mlp": 1.08, "deep": 1.08, "resnet18": 1.03, "vit": 1.03, "embedding": 1.20}
TURN_SECONDS = 0.05
"""A contestant's turn lasts at least about this long."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Is it a SAM step?


def _weights(params: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


def literal_step(task: Task, base: str, rho: float) -> Tensor:
    """Return the weights after one SAM step from the paper's equations; ``rho=0`` is the base's step."""
    kind, arguments = BASES[base]
    params = task.params
    optimizer = kind(params, **arguments)
    first = torch.autograd.grad(task.loss_again(), params)
    norm = sum((g.double() ** 2).sum() for g in first).sqrt()
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, first, strict=True):
            p.copy_(p.double() + rho * g.double() / norm)
    second = torch.autograd.grad(task.loss_again(), params)
    with torch.no_grad():
        for p, w, g in zip(params, before, second, strict=True):
            p.copy_(w)
            p.grad = g
    optimizer.step()
    return _weights(params)


def check_contestants(name: str, base: str, contestants: list[str]) -> None:
    """Let each contestant take one step from fresh weights, in float64.

    Args:
        name: of the model.
        base: of the base optimizer.
        contestants: their names.

    Raises:
        AssertionError: if the step is not SAM's.
    """
    task = make_task(name).double()
    wanted, plain = literal_step(deepcopy(task), base, RHO), literal_step(deepcopy(task), base, 0.0)
    for contestant in contestants:
        fresh = deepcopy(task)
        CONTESTANTS[contestant](fresh, base)()
        made = _weights(fresh.params)
        target, other = (plain, wanted) if contestant == "limit" else (wanted, plain)
        error, gap = float((made - target).norm()), float((made - other).norm())
        largest = float((made - target).abs().max())
        assert error < 1e-3 * gap, f"{contestant} on {name}: {error=} is not small beside {gap=}"
        assert largest < 1e-5, f"{contestant} on {name}: off by {largest}"


# Time


def time_contestants(
    name: str, base: str, contestants: list[str], rounds: int
) -> dict[str, dict[str, float | list[float]]]:
    """Let contestants take turns.

    Args:
        name: of the model.
        base: of the base optimizer.
        contestants: their names, the limit first.
        rounds: turns of each.

    Returns:
        Per contestant: seconds per step, the ratio to the limit in the same turn (median, quartiles), and "quiet": the
        first decile of the processor time of single steps, which a busy machine disturbs least, and its ratio.
    """
    task = make_task(name)
    steps = {c: CONTESTANTS[c](task, base) for c in contestants}
    for step in steps.values():
        for _ in range(3):
            step()
    started = time.perf_counter()
    steps["limit"]()
    count = max(3, round(TURN_SECONDS / (time.perf_counter() - started)))
    clock: dict[str, list[float]] = {c: [] for c in contestants}
    busy: dict[str, list[float]] = {c: [] for c in contestants}
    gc.collect()
    gc.disable()
    said = time.perf_counter()
    for turn in range(rounds):
        shift = turn % len(contestants)
        for contestant in contestants[shift:] + contestants[:shift]:
            times = _turn(steps[contestant], count)
            clock[contestant].append(statistics.median(wall for wall, _ in times))
            busy[contestant] += [processor for _, processor in times]
        gc.collect()
        if time.perf_counter() - said > 2:
            said = time.perf_counter()
            say(f"  {name}: turn {turn + 1} of {rounds}")
    gc.enable()
    quiet = {c: sorted(values)[len(values) // 10] for c, values in busy.items()}
    result: dict[str, dict[str, float | list[float]]] = {}
    for contestant, values in clock.items():
        ratios = [t / limit for t, limit in zip(values, clock["limit"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        result[contestant] = {
            "seconds": statistics.median(values),
            "seconds_quiet": quiet[contestant],
            "ratio": statistics.median(ratios),
            "quartiles": [quartiles[0], quartiles[2]],
            "ratio_quiet": quiet[contestant] / quiet["limit"],
        }
    return result


def _turn(step: Step, count: int) -> list[tuple[float, float]]:
    """Return wall and processor seconds of each of some steps."""
    step()  # brings its own state back into the caches
    times = []
    for _ in range(count):
        wall, processor = time.perf_counter(), time.process_time()
        step()
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    return times


# Launches and bytes


class Counter(TorchDispatchMode):
    """Counts operations, and the bytes of tensors that they read and write. Views count as nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = func._schema
        writes = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if not writes and any(r.alias_info is not None for r in schema.returns):
            return out
        self.launches += 1
        named = dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
        written = [named.get(a.name) for a in writes] if writes else [out]
        if "index_select" in schema.name or "index_copy" in schema.name:  # touches some rows only
            rows = named["source"] if writes else out
            self.bytes += 2 * rows.numel() * rows.element_size()
            return out
        overwrites = any(word in schema.name for word in ("copy_", "zero_", "fill_"))
        read = [v for k, v in named.items() if not (overwrites and any(k == a.name for a in writes))]
        touched = [t for t in tree_leaves([read, written]) if isinstance(t, Tensor)]
        self.bytes += sum(t.numel() * t.element_size() for t in touched if not t.is_sparse)
        return out


def count(step: Step) -> tuple[int, int]:
    """Return launches and bytes of one step, after two to reach the steady state."""
    step()
    step()
    with Counter() as counter:
        step()
    return counter.launches, counter.bytes


# Memory


def memory(name: str, base: str, contestant: str) -> tuple[int, int]:
    """Return the peak of live bytes in a step, and those kept between steps beside parameters and gradients.

    Both are above the state before the first step, and come from the allocator's own events.
    """
    task = make_task(name)
    step = CONTESTANTS[contestant](task, base)
    gc.collect()

    def clear() -> None:
        for p in task.params:
            p.grad = None

    before = sum(live_bytes(work)[1] for work in (step, clear))
    peak, left = live_bytes(step)
    return before + peak, before + left + live_bytes(clear)[1]


# All of it


def measure(name: str, base: str, contestants: list[str], rounds: int) -> dict[str, Any]:
    """Measure one model.

    Args:
        name: of the model.
        base: of the base optimizer.
        contestants: their names, the limit first.
        rounds: turns of each.

    Returns:
        The record of the model.
    """
    say(f"{name}: {MODELS[name][0]}")
    check_contestants(name, base, contestants)
    times = time_contestants(name, base, contestants, rounds)
    task = make_task(name)
    numbers = sum(p.numel() for p in task.params)
    size = sum(p.nbytes for p in task.params)
    rows: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        say(f"  {name}: counting {contestant}")
        launches, moved = count(CONTESTANTS[contestant](make_task(name), base))
        peak, kept = memory(name, base, contestant)
        rows[contestant] = dict(times[contestant], launches=launches, bytes=moved, peak=peak, kept=kept)
    limit = dict(rows["limit"])
    for row in rows.values():
        row["extra_launches"] = row.pop("launches") - limit["launches"]
        row["extra_bytes_per_parameter"] = (row.pop("bytes") - limit["bytes"]) / numbers
        row["extra_peak"] = (row.pop("peak") - limit["peak"]) / size
        row["extra_kept"] = (row.pop("kept") - limit["kept"]) / size
    return {"model": MODELS[name][0], "parameters": numbers, "tensors": len(task.params), "rows": rows}


def table(name: str, record: dict[str, Any]) -> str:
    """Return the record of one model as lines of a table."""
    rows = record["rows"]
    lines = [
        f"{record['model']}: {record['parameters']:,} parameters in {record['tensors']} tensors, "
        f"limit {rows['limit']['seconds'] * 1e3:.3g} ms "
        f"({rows['limit']['seconds_quiet'] * 1e3:.3g} quiet), goal {GOALS[name]:.2f}",
        f"  {'':27}{'ratio':>7}{'quartiles':>15}{'quiet':>8}{'launches':>10}{'bytes/param':>13}{'peak':>7}{'kept':>7}",
    ]
    for contestant, row in rows.items():
        low, high = row["quartiles"]
        spread = f"{low:.3f}-{high:.3f}"
        lines.append(
            f"  {contestant:27}{row['ratio']:7.3f}{spread:>15}{row['ratio_quiet']:8.3f}"
            f"{row['extra_launches']:+10d}{row['extra_bytes_per_parameter']:13.1f}"
            f"{row['extra_peak']:7.2f}{row['extra_kept']:7.2f}"
        )
    return "\n".join(lines)


def page_rows(record: dict[str, Any]) -> str:
    """Return a record as the tables of ``docs/speed.md``: time, then memory."""
    models = record["models"]
    names = list(dict.fromkeys(c for m in models.values() for c in m["rows"] if c != "limit"))
    head = ["| | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
    goals = "| goal | " + " | ".join(f"{GOALS[m]:.2f}" for m in models) + " |"
    times, sizes = [*head, goals], list(head)
    for c in names:
        rows = [m["rows"].get(c) for m in models.values()]
        quiet = ["" if r is None else f"{r['ratio_quiet']:.2f} ({r['ratio']:.2f})" for r in rows]
        memory = ["" if r is None else f"{r['extra_peak']:.2f}, {r['extra_kept']:.2f}" for r in rows]
        times.append(f"| {c} | " + " | ".join(quiet) + " |")
        sizes.append(f"| {c} | " + " | ".join(memory) + " |")
    return "\n".join([*times, "", *sizes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--base", choices=list(BASES), default="sgd")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    parser.add_argument("--page", type=Path, help="only print a record as the tables of docs/speed.md")
    options = parser.parse_args()
    if options.page:
        print(page_rows(json.loads(options.page.read_text())))
        return
    torch.set_num_threads(options.threads)
    contestants = ["limit", *(c for c in options.contestants if c != "limit")]
    packages = ("torch", "torchvision", "pytorch_optimizer", "temperon")
    record: dict[str, Any] = {
        "base": options.base,
        "rounds": options.rounds,
        "threads": options.threads,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "models": {},
    }
    for name in options.models:
        record["models"][name] = measure(name, options.base, contestants, options.rounds)
        print(table(name, record["models"][name]), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
