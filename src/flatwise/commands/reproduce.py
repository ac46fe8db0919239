"""``flatwise reproduce``: the experiments of the SAM paper, at a small size or at their own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flatwise.commands.flags import parse_flags

if TYPE_CHECKING:
    from flatwise.lab.paper.reproduce import ReproduceConfig

CONTINUES = True
DESCRIPTION = "Run an experiment of the SAM paper by its own protocol, and say which of its claims hold."


def parse(words: Sequence[str]) -> ReproduceConfig | None:
    """Read the command line.

    Args:
        words: what follows ``reproduce``.

    Returns:
        The settings, or None where help was printed.
    """
    from flatwise.lab.paper.reproduce import ReproduceConfig

    return parse_flags(ReproduceConfig, words, "reproduce", DESCRIPTION)


def run(config: ReproduceConfig) -> int:
    """Train what is missing, and print the tables and the verdicts.

    Args:
        config: the settings.

    Returns:
        The exit code.
    """
    from flatwise.lab.environment import cores
    from flatwise.lab.paper.reproduce import SPECTRA_NAME, listing, reproduce, reproduce_full, studies_of, write_page
    from flatwise.lab.paper.show import print_grid, show, show_spectra
    from flatwise.lab.paper.spectra import run_spectra
    from flatwise.lab.table import console_for, print_sentences

    console = console_for(sys.stdout)
    if config.page:
        console.print(f"Written: {write_page(config)}", markup=False)
        return 0
    if config.list:
        console.print(listing(config), markup=False, soft_wrap=True)
        return 0
    if config.scale == "full":
        grid, said = reproduce_full(config)
        print_grid(grid, console)
        print_sentences(said, console)
        return 0
    if config.table == SPECTRA_NAME:
        show_spectra(run_spectra(config.workers or cores()), console)
        return 0
    for study in studies_of(config):
        stored = reproduce(study, config)
        show(stored, console)
        console.print(f"Record: {config.folder / f'{study.name}.json'}", markup=False)
    return 0
