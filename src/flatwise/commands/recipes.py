"""``flatwise recipes``: the recipes in a table, or some of them in full."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flatwise.commands.flags import asks_for_help
from flatwise.errors import UserError

CONTINUES = False
HELP = """usage: flatwise recipes [NAME ...]

List the settings of the paper's trainings; or print some as TOML, with what the paper leaves open. Printed into a file
that ends in .toml, a recipe can be changed and trained: flatwise train --recipe FILE."""


def parse(words: Sequence[str]) -> tuple[str, ...] | None:
    """Read the command line.

    Args:
        words: what follows ``recipes``.

    Returns:
        Names of recipes, or paths of files; None where help was printed.

    Raises:
        UserError: an option, or no such recipe.
    """
    from flatwise.lab.recipes import find_recipe

    if asks_for_help(words):
        print(HELP)
        return None
    for word in words:
        if word.startswith("-"):
            raise UserError(f"flatwise recipes takes names of recipes, not {word!r}")
        find_recipe(word)
    return tuple(words)


def run(names: tuple[str, ...]) -> int:
    """Print the recipes.

    Args:
        names: which; none: all, in a table.

    Returns:
        The exit code.
    """
    from flatwise.lab.recipe_text import as_toml, print_recipes
    from flatwise.lab.recipes import find_recipe, recipe_names
    from flatwise.lab.table import console_for

    if not names:
        print_recipes([find_recipe(name) for name in recipe_names()], console_for(sys.stdout))
    print("\n".join(as_toml(find_recipe(name)) for name in names), end="")
    return 0
