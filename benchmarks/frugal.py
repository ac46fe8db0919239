"""Does a method without a radius, at the base optimizer's price, keep SAM's gain, and is it ever worse than the base?

Fifteen tasks (``frugal_tasks.py``), of which five are set aside; every contestant (``frugal_contestants.py``) trains
from the same seeds. Each training is written at once, so that an interrupted run goes on where it was.

    python benchmarks/frugal.py                                 # train what is missing of the ten of development
    python benchmarks/frugal.py --half held-out                 # of the five others; scores are not shown
    python benchmarks/frugal.py --contestants base,frugal       # some contestants; --tasks, --seeds likewise
    python benchmarks/frugal.py --time                          # relative time and memory
    python benchmarks/frugal.py --table                         # the tables of the ten
    python benchmarks/frugal.py --page --half all               # into docs/frugal.md, with the picture
    python benchmarks/frugal.py --forget frugal                 # before another rule is tried
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from flatwise.errors import UserError
from flatwise.measure.progress import Bar
from frugal_contestants import CONTESTANTS, USUAL
from frugal_cost import measure
from frugal_page import draw, fill, show
from frugal_records import FOLDER, ROOT, Record
from frugal_tasks import HALVES, TASKS, of_half

Job = tuple[str, str, int]
PAGE = ROOT / "docs" / "frugal.md"
FIRST = 2
"""Seeds that are trained for all tasks before the further ones begin."""


def missing(tasks: list[str], contestants: list[str], seeds: int, folder: Path) -> Iterator[Job]:
    """Yield what is not trained yet: the first seeds of everything, then each further one of everything."""
    known = {task: {name: Record(TASKS[task], folder).scores(name) for name in contestants} for task in tasks}
    rounds = [range(min(FIRST, seeds)), *(range(seed, seed + 1) for seed in range(FIRST, seeds))]
    for part in rounds:
        for task in tasks:
            for seed in part:
                yield from ((task, name, seed) for name in contestants if seed not in known[task][name])


def work(job: Job) -> dict[str, Any]:
    """Make one training."""
    task, contestant, seed = job
    return TASKS[task].train(CONTESTANTS[contestant], seed)


def train(jobs: list[Job], workers: int, folder: Path) -> int:
    """Train, and write each result at once; no score is shown, since some of the tasks are set aside.

    Returns:
        How many trainings broke; they are said, and the others go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cost = {job: CONTESTANTS[job[1]].cost for job in jobs}
    total, done, begun = sum(cost.values()), 0.0, time.monotonic()
    bar, broken = Bar("trainings", total), 0
    with bar, ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(work, job): job for job in jobs}
        for number, future in enumerate(as_completed(futures), start=1):
            job = futures[future]
            task, contestant, seed = job
            done += cost[job]
            bar.advance(cost[job])
            left = (time.monotonic() - begun) * (total - done) / done / 60
            try:
                result = future.result()
                Record(TASKS[task], folder).add(CONTESTANTS[contestant], seed, result)
                text = f"{result['seconds']:.1f} s of processor time"
            except Exception as error:  # a method may break on one task; the rest is still wanted
                broken += 1
                text = f"broke: {type(error).__name__}: {error}"
            if "broke" in text or not sys.stderr.isatty():
                print(f"{number} of {len(jobs)}: {task}, {contestant}, seed {seed}: {text}, "
                      f"about {left:.0f} min left", flush=True)  # fmt: skip
    return broken


def _listed(text: str | None, known: dict[str, Any], default: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Read a list of names with commas."""
    names = default if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            parser.error(f"unknown {name!r} (known: {', '.join(known)})")
    return names


def _present(names: list[str]) -> list[str]:
    """Leave out who cannot take part, and say why."""
    reasons = {name: CONTESTANTS[name].missing() for name in names}
    for name, reason in reasons.items():
        if reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)
    return [name for name, reason in reasons.items() if not reason]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", help="default: those of the half")
    parser.add_argument("--contestants", help="default: all but the ablations")
    parser.add_argument("--half", choices=(*HALVES, "all"), default="development")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--records", type=Path, default=FOLDER, help="folder of the records")
    parser.add_argument("--table", action="store_true", help="train nothing: show the tables of the half")
    parser.add_argument("--page", action="store_true", help="train nothing: write docs/frugal.md and the picture")
    parser.add_argument("--time", action="store_true", help="train nothing: measure time and memory")
    parser.add_argument("--forget", help="take these contestants out of the records of the half")
    options = parser.parse_args()
    tasks = _listed(options.tasks, TASKS, of_half(options.half), parser)
    contestants = _listed(options.contestants, CONTESTANTS, USUAL, parser)
    records = [Record(TASKS[task], options.records) for task in tasks]
    try:
        if options.forget:
            names = _listed(options.forget, CONTESTANTS, [], parser)
            print(sum(record.forget(names) for record in records), "trainings forgotten")
        elif options.table:
            show(records, contestants)
        elif options.page:
            fill(PAGE, records, contestants)
            draw(options.records / "gains.png", records)
        elif options.time:
            present = _present(contestants)
            for record in records:
                record.add_cost(measure(record.task, [CONTESTANTS[name] for name in present]))
        else:
            jobs = list(missing(tasks, _present(contestants), options.seeds, options.records))
            if train(jobs, options.workers, options.records):
                parser.exit(1)
    except UserError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
