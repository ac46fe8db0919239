"""From run folders to the page: what is there is read, and what is not is named with the command that makes it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flatwise.errors import UserError
from flatwise.files import make_folder, read_json, write_atomically
from flatwise.lab.config import CompareConfig, config_from
from flatwise.lab.curves import panels
from flatwise.lab.folder import RunFolder
from flatwise.measure import Landscape
from flatwise.report.content import Comparison, Missing
from flatwise.report.page import Entry, make_page
from flatwise.report.planes import Plane, plane_of

MEASURES = "flatwise.measures/1"
"""The schema of measures.json."""
Result = dict[str, Any]


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page, and each of its figures as a file beside it.

    Args:
        paths: run folders, at least one.
        out: the page; None: ``report.html`` in the first folder.

    Returns:
        The page.
    """
    entries = [read_entry(path) for path in paths]
    page_path = RunFolder(paths[0]).report if out is None else out
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = make_page(entries, made=f"Made by flatwise {version('flatwise')} on {now}.")
    figures = page_path.parent / "figures"
    make_folder(figures)
    for name, content in page.figures.items():
        _write(figures / name, content)
    _write(page_path, page.html)
    return page_path


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def read_run(path: Path) -> tuple[CompareConfig, RunFolder, Result]:
    """Read a finished run folder.

    Args:
        path: the folder.

    Returns:
        Its settings, the folder, and the content of ``results.json``.

    Raises:
        UserError: there is no finished comparison.
    """
    folder = RunFolder(path)
    results = read_json(folder.results)
    if isinstance(results, dict) and "config" in results:
        return config_from(results["config"]), folder, results
    config = read_json(folder.config)
    if isinstance(config, dict) and "command" in config:
        raise UserError(f"the comparison in {path} is not finished; this continues it: {config['command']}")
    raise UserError(f"{path} is no run folder (it has no results.json); flatwise compare makes one and prints its path")


def read_entry(path: Path) -> Entry:
    """Read everything that a page can show about a comparison.

    Args:
        path: the run folder.

    Returns:
        What the page is made from.
    """
    from flatwise.lab.compare import command, protocol

    config, folder, results = read_run(path)
    measures, cautions = read_measures(folder, results["identity"])
    plane, trouble = _plane(folder)
    missing = [
        Missing(what, command_)
        for what, command_, there in (
            ("sharpness and spectrum", f"flatwise measure {path}", measures),
            (f"loss surfaces{trouble}", f"flatwise landscape {path}{' --fresh' if trouble else ''}", plane),
        )
        if not there
    ]
    runs = {name: _runs(folder, name, config.seeds) for name in _trained(folder, results)}
    comparison = Comparison(
        name=path.resolve().name,
        results=results,
        trained=list(runs),
        protocol=protocol(config, results),
        command=command(config),
        measures={name: measures[name] for name in runs if name in measures},
        cautions=cautions,
        missing=missing,
    )
    return Entry(comparison, panels(runs), plane)


def _plane(folder: RunFolder) -> tuple[Plane | None, str]:
    """Read the losses, or say why they cannot be read, which must not keep the page from being made."""
    if not folder.landscape.exists():
        return None, ""
    try:
        return plane_of(Landscape.load(folder.landscape)), ""
    except UserError as error:
        return None, f" ({error})"


def _trained(folder: RunFolder, results: Result) -> list[str]:
    equal = results["equal_compute"]
    names = list(results["methods"])
    longer = [name for name in equal["candidates"] if name not in names] if equal else []
    return [name for name in [*names, *longer] if folder.job(name, 0).exists()]


def _runs(folder: RunFolder, name: str, seeds: int) -> list[Result]:
    runs = [read_json(folder.job(name, seed)) for seed in range(seeds)]
    if not all(isinstance(run, dict) for run in runs):
        raise UserError(f"{folder.path / 'jobs'} lacks a finished run of {name}; the comparison's command completes it")
    return runs


def read_measures(folder: RunFolder, identity: str) -> tuple[Result, list[str]]:
    """Read what was measured.

    Args:
        folder: holds measures.json.
        identity: of the networks; what was measured of others is left out.

    Returns:
        An entry for each method, and the cautions about all methods together.
    """
    content = read_json(folder.measures)
    if not isinstance(content, dict) or (content.get("schema"), content.get("identity")) != (MEASURES, identity):
        return {}, []
    methods = content.get("methods")
    if not isinstance(methods, dict):
        return {}, []
    # The table of sharpness is written first: what has none is damaged.
    whole = {name: entry for name, entry in methods.items() if isinstance(entry, dict) and entry.get("sharpness")}
    return whole, content.get("cautions", [])
