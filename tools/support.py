"""The table of what works where, made from the tests.

    python tools/support.py             # run the marked tests, keep the record, write the page
    python tools/support.py --render    # only write the page, from the record
    python tools/support.py --name oldest -k ddp    # a name for this run; further arguments are for pytest

A test says what it shows by ``@pytest.mark.supports("framework", "feature")``. Every run of this program adds or
replaces the run of its name in ``docs/results/support.json``; the page has the newest run, and the others below.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORD, PAGE = ROOT / "docs" / "results" / "support.json", ROOT / "docs" / "support.md"
PACKAGES = ("torch", "lightning", "transformers", "accelerate", "timm", "skorch", "peft")
FIRST_COLUMNS = ("plain loop", "DDP", "FSDP2", "tensor parallel", "torch.compile")
FIRST_ROWS = ("equal to hand-written SAM", "rho = 0 is the plain run, bit for bit")
Cells = dict[str, dict[str, dict[str, int]]]


def marked(root: Path = ROOT / "tests") -> set[tuple[str, str]]:
    """Return every (framework, feature) that a test claims, read from the sources."""
    found = set()
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.supports":
                framework, feature = (ast.literal_eval(argument) for argument in node.args)
                found.add((framework, feature))
    return found


class Collector:
    """A pytest plugin that counts the outcomes of marked tests."""

    def __init__(self) -> None:
        self.cells: Cells = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test when it has run, or failed before that."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            for framework, feature in dict(report.user_properties).get("supports", ()):
                features = self.cells.setdefault(framework, {})
                features.setdefault(feature, {"passed": 0, "failed": 0, "skipped": 0})[report.outcome] += 1


def versions() -> dict[str, str]:
    """Return the versions of what is installed."""
    installed = [name for name in PACKAGES if importlib.util.find_spec(name) is not None]
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in installed}}


def run(name: str, arguments: list[str]) -> int:
    """Run the marked tests and keep what came of them."""
    import pytest

    collector = Collector()
    status = pytest.main(["-m", "supports", "-p", "no:cacheprovider", *arguments, str(ROOT / "tests")], [collector])
    runs = json.loads(RECORD.read_text())["runs"] if RECORD.exists() else {}
    runs[name] = {"versions": versions(), "cells": collector.cells}
    RECORD.write_text(json.dumps({"runs": runs}, indent=1, sort_keys=True) + "\n")
    return int(status)


def _ordered(names: set[str], first: tuple[str, ...]) -> list[str]:
    return [name for name in first if name in names] + sorted(names - set(first))


def _cell(counts: dict[str, int] | None) -> str:
    if counts is None:
        return ""
    if counts["failed"]:
        return f"**{counts['failed']} fail**"
    return f"{counts['passed']}" if counts["passed"] else "not run"


def _table(cells: Cells) -> list[str]:
    columns = _ordered(set(cells), FIRST_COLUMNS)
    rows = _ordered({feature for features in cells.values() for feature in features}, FIRST_ROWS)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| {row} | " + " | ".join(_cell(cells[name].get(row)) for name in columns) + " |" for row in rows]


def _named(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {found[name]}" for name in (*PACKAGES, "python") if name in found)


def render(record: dict[str, Any]) -> str:
    """Return the page."""
    runs = record["runs"]
    newest, *others = sorted(runs, key=lambda name: name != "newest")
    lines = [
        "# What works where",
        "",
        "Made by `python tools/support.py` from the tests themselves: a number is how many tests show it, all of which",
        "passed in that run. An empty cell is not tested, which may mean that it has no meaning. Nothing ran on a GPU.",
        "",
        f"With {_named(runs[newest]['versions'])}:",
        "",
        *_table(runs[newest]["cells"]),
    ]
    for name in others:
        passed, failed, skipped = (
            sum(cell[kind] for features in runs[name]["cells"].values() for cell in features.values())
            for kind in ("passed", "failed", "skipped")
        )
        lines += [
            "",
            f"With {_named(runs[name]['versions'])} ({name}): {passed} passed, {failed} failed, {skipped} skipped.",
            "",
            *_table(runs[name]["cells"]),
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, record and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only write the page")
    parser.add_argument("--name", default="newest", help="of this run in the record")
    options, rest = parser.parse_known_args()
    if options.name == "newest" and {"-k", "-m"} & set(rest):
        parser.error("a part of the tests is no run to replace the newest one: give it a --name")
    status = 0 if options.render else run(options.name, rest)
    PAGE.write_text(render(json.loads(RECORD.read_text())))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
