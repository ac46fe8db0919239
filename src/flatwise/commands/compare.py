"""``flatwise compare``: train with several methods and say which is better."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flatwise.commands.flags import parse_flags

if TYPE_CHECKING:
    from flatwise.lab.config import CompareConfig

CONTINUES = True
DESCRIPTION = "Train one network from the same seeds with several methods, and say which is better."


def parse(words: Sequence[str]) -> CompareConfig | None:
    """Read the command line.

    Args:
        words: what follows ``compare``.

    Returns:
        The settings, or None where help was printed.
    """
    from flatwise.lab.config import CompareConfig

    return parse_flags(CompareConfig, words, "compare", DESCRIPTION)


def run(config: CompareConfig) -> int:
    """Train, and print the table, what follows from it, and where the rest is.

    Args:
        config: the settings.

    Returns:
        The exit code.
    """
    from flatwise.lab.compare import compare, protocol
    from flatwise.lab.table import console_for, print_sentences, print_table

    results, folder, was_there = compare(config)
    console = console_for(sys.stdout)
    if was_there:
        console.print(f"Already finished; read from {folder.results} (--fresh trains again).", markup=False)
    if not config.quiet:
        print_sentences([protocol(config, results)], console)
    print_table(results, console)
    print_sentences(results["verdict"], console)
    if not config.quiet:
        console.print(f"Curves, epochs and every number: {folder.path}", markup=False)
    console.print(f"Report: {folder.report}", markup=False)
    return 0
