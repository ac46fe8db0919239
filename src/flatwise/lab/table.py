"""The comparison as a table: drawn on a terminal, Markdown elsewhere."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

Result = dict[str, Any]
PLAIN_WIDTH = 120


def console_for(stream: TextIO) -> Console:
    """Make a console that writes colours and frames to a terminal, and plain text to everything else.

    Args:
        stream: where to write.

    Returns:
        The console.
    """
    from rich.console import Console

    terminal = stream.isatty()
    # Stated, not guessed: rich also looks at variables such as FORCE_COLOR, which would colour a file.
    return Console(file=stream, force_terminal=terminal, width=None if terminal else PLAIN_WIDTH, highlight=False)


def print_table(results: Result, console: Console) -> None:
    """Print the table.

    Args:
        results: the content of ``results.json``.
        console: where to.
    """
    from rich import box
    from rich.table import Table

    sign = "±" if _can_write("±", console.file) else "+-"
    terminal = console.is_terminal
    narrow = terminal and console.width < PLAIN_WIDTH
    table = Table(box=box.SIMPLE_HEAD if narrow else box.ROUNDED if terminal else box.MARKDOWN)
    # On a narrow terminal the headings take two lines: the methods' names must stay.
    table.add_column("method", overflow="fold", min_width=8)
    for heading in (
        "test|accuracy, %",
        f"minus {results['reference']},|points",
        "gradients|/step",
        "wall|time, s",
        f"time|/ {results['base']}",
    ):
        table.add_column(heading.replace("|", "\n") if narrow else _one_line(heading), justify="right", no_wrap=True)
    for name, record in results["methods"].items():
        table.add_row(
            _label(name, record, results),
            _with_interval(record["test_accuracy"], sign, signed=False),
            "" if name == results["reference"] else _with_interval(results["paired"][name]["difference"], sign),
            f"{record['gradient_evaluations_per_step']:.2f}",
            f"{record['wall_time']['mean']:.1f}",
            _relative(record).replace(" (", "\n(") if narrow else _relative(record),
        )
    console.print(table)


def _one_line(heading: str) -> str:
    return heading.replace("|/step", "/step").replace("|", " ")


def print_sentences(sentences: list[str], console: Console) -> None:
    """Print sentences, each folded to the width of the console.

    Args:
        sentences: what to say.
        console: where to.
    """
    for sentence in sentences:
        for line in textwrap.wrap(sentence, min(console.width, PLAIN_WIDTH), break_on_hyphens=False):
            console.print(line, markup=False)


def _label(name: str, record: Result, results: Result) -> str:
    rho = record["options"].get("rho")
    unsaid = isinstance(rho, float | int) and "rho=" not in name  # not "auto", which the method's name means
    shown = f"{name} (rho {rho:g})" if unsaid else name
    equal = results["equal_compute"]
    if equal is not None and name == results["base"] and equal["chosen"] != name:
        return f"{shown} (2x epochs)"
    return shown


def _with_interval(estimate: Result, sign: str, signed: bool = True) -> str:
    mean = f"{100 * estimate['mean']:+.1f}" if signed else f"{100 * estimate['mean']:.1f}"
    return mean if estimate["ci95"] is None else f"{mean} {sign} {100 * estimate['ci95']:.1f}"


def _relative(record: Result) -> str:
    low, high = record["relative_time_quartiles"]
    spread = f" ({low:.2f}-{high:.2f})" if high > low else ""
    return f"{record['relative_time']:.2f}{spread}"


def _can_write(text: str, stream: Any) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
