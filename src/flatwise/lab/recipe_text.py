"""Recipes to read: all in a table, one as a TOML file that can be changed and trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from flatwise.lab.recipes import Recipe
from flatwise.lab.train.config import NOT_PART_OF_THE_RESULT, TrainConfig, train_config_from

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 240
"""Columns of a table that goes to a file: a recipe is one line, which can be searched."""
FULL_WIDTH = 190
"""Columns of a terminal from which on what the name says already has columns of its own."""
HINT = "flatwise recipes NAME prints one with what the paper leaves open; flatwise train --recipe NAME trains it."


def as_toml(recipe: Recipe) -> str:
    """Write a recipe out, its comment first and the defaults that it leaves as they are last.

    Args:
        recipe: the recipe.

    Returns:
        A TOML file that ``--recipe`` takes.
    """
    stated = sorted(recipe.fields, key=[field.name for field in fields(TrainConfig)].index)
    lines = [f"# {recipe.name}" + f": {recipe.paper}" * bool(recipe.paper)]
    lines += [f"# {line}".rstrip() for line in recipe.comment.splitlines()]
    lines += ["", *(f"{name} = {_value(recipe.fields[name])}" for name in stated), "", "# Left at their defaults:"]
    lines += [
        f"# {field.name} = {_value(field.default)}"
        for field in fields(TrainConfig)
        if field.name not in recipe.fields
        and field.name not in NOT_PART_OF_THE_RESULT
        and field.default not in (None, "")
    ]
    return "\n".join(lines) + "\n"


def print_recipes(recipes: Sequence[Recipe], console: Console) -> None:
    """Print a line for each recipe.

    Args:
        recipes: the recipes.
        console: where to; on a terminal the table has its width, elsewhere a recipe is one line.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = console.is_terminal
    narrow = terminal and console.width < FULL_WIDTH
    table = Table(box=box.SIMPLE_HEAD if terminal else box.MARKDOWN, padding=(0, 1, 0, 0) if terminal else (0, 1))
    # The name says data set, network and method; it must stay in one piece, to be copied.
    whole = max((len(recipe.name) for recipe in recipes), default=0)
    for heading in ("recipe", "in the paper", *(() if narrow else ("data", "model", "length", "method"))):
        table.add_column(
            heading,
            overflow="ellipsis",
            no_wrap=True,
            min_width=whole if heading == "recipe" else None,
            justify="right" if heading == "length" else "left",
        )
    for recipe in recipes:
        config = train_config_from(dict(recipe.fields))
        length = f"{config.epochs} epochs" if config.steps is None else f"{config.steps} steps"
        radius = "" if config.rho is None else f", rho {config.rho:g}"
        what = () if narrow else (config.dataset, config.model, length, config.method + radius)
        table.add_row(recipe.name, recipe.paper, *what)
    if not terminal:
        console = Console(file=console.file, force_terminal=False, width=PLAIN_WIDTH, highlight=False)
    console.print(table)
    console.print(HINT, markup=False)


def _value(value: Any) -> str:
    # JSON writes strings, whole and decimal numbers, true and false as TOML does.
    return json.dumps(value, ensure_ascii=False)
