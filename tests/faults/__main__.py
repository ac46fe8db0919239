"""Inject the fault of every seed, record what was survived, and write the table: ``python -m tests.faults``."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from tests.faults.kinds import KINDS, carry_out, kind_of

ROOT = Path(__file__).parents[2]
RECORD, PAGE = ROOT / "docs" / "results" / "faults.json", ROOT / "docs" / "faults.md"
MARK = "<!-- The rest is written by `python -m tests.faults`: do not edit it. -->\n"
SEEDS = range(200)


def run(seeds: range) -> dict[str, Any]:
    """Carry out the faults of some seeds.

    Args:
        seeds: which.

    Returns:
        The record.
    """
    kinds = {kind: {"injected": 0, "survived": 0} for kind in KINDS}
    failed: dict[str, str] = {}
    for number, seed in enumerate(seeds, 1):
        kind = kind_of(seed)
        kinds[kind]["injected"] += 1
        try:
            with tempfile.TemporaryDirectory() as folder:
                carry_out(seed, Path(folder))
            kinds[kind]["survived"] += 1
        except BaseException as error:  # also what pytest raises for a fault that raised nothing
            if isinstance(error, KeyboardInterrupt) and str(error) != "injected":
                raise
            failed[str(seed)] = f"{kind}: {error}"[:300]
        print(f"\r{number} of {len(seeds)} seeds, {len(failed)} not survived", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {"seeds": len(seeds), "torch": torch.__version__, "kinds": kinds, "failed": failed}


def table(record: dict[str, Any]) -> str:
    """Write the table of a record, in Markdown."""
    lines = ["| fault | injected | survived |", "|---|---|---|"]
    lines += [f"| {kind} | {row['injected']} | {row['survived']} |" for kind, row in record["kinds"].items()]
    injected, survived = (sum(row[key] for row in record["kinds"].values()) for key in ("injected", "survived"))
    return "\n".join([*lines, f"| all | {injected} | {survived} |"]) + "\n"


def page(text: str, record: dict[str, Any]) -> str:
    """Put the table of a record into the page."""
    return (
        text.partition(MARK)[0]
        + MARK
        + f"\nSeeds 0 to {record['seeds'] - 1}, torch {record['torch']}.\n\n"
        + table(record)
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="only .* of the perturbation arrives")
    torch.set_num_threads(1)
    record = run(SEEDS)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), record))
    print(table(record))
    print("\n".join(f"seed {seed}: {text}" for seed, text in record["failed"].items()))
    sys.exit(bool(record["failed"]))
