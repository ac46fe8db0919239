"""``flatwise compare``: the same network from the same seeds with several methods, and which is better."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from flatwise.files import read_json, write_json
from flatwise.lab.config import CompareConfig, flag
from flatwise.lab.curves import draw
from flatwise.lab.data import ImageData, load_data
from flatwise.lab.environment import cores, describe
from flatwise.lab.folder import RunFolder
from flatwise.lab.job import Job, all_jobs, finished, identity
from flatwise.lab.methods import Method, trained_methods
from flatwise.lab.pool import Pool
from flatwise.lab.progress import Bars
from flatwise.lab.reporting import write_report
from flatwise.lab.results import assemble
from flatwise.lab.split import make_split
from flatwise.lab.tasks import TIMING
from flatwise.lab.verdict import verdict

Result = dict[str, Any]


def compare(config: CompareConfig) -> tuple[Result, RunFolder, bool]:
    """Train what is not trained yet, and put the numbers together.

    A :class:`~flatwise.errors.UserError` says in one line why settings, data or folder are of no use.

    The page ``report.html`` is written at the end.

    Args:
        config: the settings.

    Returns:
        The content of ``results.json``, the run folder, and whether everything was there already.
    """
    config = config.resolved()
    methods = trained_methods(config)
    data = load_data(config.dataset, config.data_root)
    # Sizes that do not fit should be said before anything is written.
    make_split(
        data,
        0,
        train_size=config.train_size,
        validation_share=config.val_fraction,
        label_noise=config.label_noise,
    )
    folder = RunFolder(Path(config.out) / config.folder_name())
    with folder.locked():
        if config.fresh:
            folder.clear()
            folder.create()
        known = read_json(folder.results)
        was_there = isinstance(known, dict) and known.get("identity") == identity(config)
        results: Result = known if was_there else _train(config, methods, data, folder)
        # Also where all was there: what was measured since then is put on the page.
        write_report([folder.path])
        return results, folder, was_there


def _train(config: CompareConfig, methods: list[Method], data: ImageData, folder: RunFolder) -> Result:
    jobs = all_jobs(config)
    pending = _pending(config, jobs, folder)
    # Of the whole comparison, not of what an interruption left: it says what each training had beside it.
    workers = min(config.workers or cores(), len(jobs))
    environment = describe(workers)
    write_json(folder.config, _settings(config, methods))
    write_json(folder.environment, environment)
    bars = Bars(
        plan={method.name: config.seeds * config.epochs * method.longer for method in methods},
        owners={number: job.method.name for number, job in enumerate(jobs)},
        weights={method.name: _passes(method) for method in methods},
        shown=not config.quiet,
    )
    with bars, Pool(config, folder, min(workers, max(1, len(pending))), bars) as pool:
        for number, job in enumerate(jobs):
            if number not in pending:
                bars({"event": "epoch", "task": number, "epoch": config.epochs * job.method.longer})
        pool.run(pending)
        timing = read_json(folder.timing)
        if not isinstance(timing, dict) or timing.get("identity") != identity(config):
            # After the training, so that nothing of this comparison runs beside it.
            pool.run([TIMING])
            timing = read_json(folder.timing)
    runs = _runs(config, jobs, folder)
    results = {"identity": identity(config), **assemble(config, data, runs, timing, environment)}
    results["verdict"] = verdict(results)
    draw(results, runs, folder.curves)
    # Last: results.json says that everything else is there.
    write_json(folder.results, results)
    return results


def _pending(config: CompareConfig, jobs: Sequence[Job], folder: RunFolder) -> list[int]:
    unfinished = [number for number, job in enumerate(jobs) if finished(config, job, folder) is None]
    # The long ones first: otherwise one of them runs alone at the end.
    return sorted(unfinished, key=lambda number: -_passes(jobs[number].method) * jobs[number].method.longer)


def _passes(method: Method) -> float:
    # For the order of the runs and the time left only; what the table shows is counted and timed.
    return 1.0 if method.variant is None else 2.0


def _runs(config: CompareConfig, jobs: Sequence[Job], folder: RunFolder) -> Mapping[str, list[Result]]:
    runs: dict[str, list[Result]] = {}
    for job in jobs:
        result = finished(config, job, folder)
        assert result is not None
        runs.setdefault(job.method.name, []).append(result)
    return runs


def _settings(config: CompareConfig, methods: Sequence[Method]) -> Result:
    return {
        "command": command(config),
        "config": asdict(config),
        "methods": [asdict(method) for method in methods],
    }


def command(config: CompareConfig) -> str:
    """Write the command that runs this configuration again.

    Args:
        config: the settings.

    Returns:
        The command with every flag that differs from its default.
    """
    words = ["flatwise", "compare"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name == "fresh":
            continue
        words.append(flag(field.name))
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def protocol(config: CompareConfig, results: Result) -> str:
    """Say in one sentence what was trained on what.

    Args:
        config: the settings.
        results: the content of ``results.json``.

    Returns:
        The sentence above the table.
    """
    data = results["data"]
    noise = (
        f"{data['wrong_training_labels']} of them ({100 * config.label_noise:g} %) with a label made wrong, "
        "a uniformly drawn other class; validation and test labels are right"
        if config.label_noise
        else "all labels as they are"
    )
    seeds = f"seeds 0 to {config.seeds - 1}, each with" if config.seeds > 1 else "seed 0, with"
    return (
        f"{config.model} on {config.dataset}: {data['train']} training images, {noise}; {data['validation']} "
        f"validation and {data['test']} test images. {config.epochs} epochs, {seeds} the same weights, "
        "split, wrong labels and sample order for every method."
    )
