"""``flatwise variants``: the methods in a table, or some of them in full."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flatwise.commands.flags import asks_for_help
from flatwise.errors import UnknownNameError, UserError
from flatwise.variants import list_variants, variant_info

CONTINUES = False


def parse(words: Sequence[str]) -> tuple[str, ...] | None:
    """Read the command line.

    Args:
        words: what follows ``variants``.

    Returns:
        Names of methods, or None where help was printed.

    Raises:
        UserError: an option.
        UnknownNameError: a name that is no method's.
    """
    if asks_for_help(words):
        print("usage: flatwise variants [NAME ...]\n\nList the methods, or say everything about some of them.")
        return None
    for word in words:
        if word.startswith("-"):
            raise UserError(f"flatwise variants takes names of methods, not {word!r}")
        if word not in list_variants(adapters=True):
            raise UnknownNameError("method", word, list_variants(adapters=True))
    return tuple(words)


def run(names: tuple[str, ...]) -> int:
    """Print the methods.

    Args:
        names: which; none: all, in a table.

    Returns:
        The exit code.
    """
    from flatwise.lab.table import console_for
    from flatwise.lab.variants import print_variant, print_variants

    console = console_for(sys.stdout)
    if not names:
        print_variants([variant_info(name) for name in list_variants(adapters=True)], console)
    for name in names:
        print_variant(variant_info(name), console)
    return 0
