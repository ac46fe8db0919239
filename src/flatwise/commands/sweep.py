"""``flatwise sweep``: search radius, learning rate, weight decay and method by held-out accuracy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from flatwise.commands.flags import field_helps, parse_given

if TYPE_CHECKING:
    from rich.console import Console

    from flatwise.lab.sweep import SweepConfig
    from flatwise.lab.sweep.results import Row

CONTINUES = True
DESCRIPTION = (
    "Search the method, its radius, the learning rate and the weight decay by the accuracy on held-out training "
    "images. All options below --quiet are those of flatwise train, and fixed for all trials. What is true or "
    "false has --name and --no-name."
)
MORE = {"recipe": "fix a recipe's settings (flatwise recipes lists them) and search its radius; flags override them"}
SHOWN = 10
"""Trials in the table."""


def parse(words: Sequence[str]) -> SweepConfig | None:
    """Read the command line.

    Args:
        words: what follows ``sweep``.

    Returns:
        The settings, or None where help was printed.
    """
    from flatwise.lab.sweep.config import DEFAULTS, SET_BY_TRIAL, SweepConfig
    from flatwise.lab.train.config import TrainConfig

    own = [entry.name for entry in fields(SweepConfig) if entry.name != "fixed"]
    fixed = [entry.name for entry in fields(TrainConfig) if entry.name not in SET_BY_TRIAL]
    both = make_dataclass(
        "Flags",
        [
            (name, get_type_hints(kind)[name], field(default=changed.get(name, getattr(kind, name))))
            for kind, names, changed in ((SweepConfig, own, {}), (TrainConfig, fixed, DEFAULTS))
            for name in names
        ],
        namespace={"__doc__": _document({**field_helps(TrainConfig), **field_helps(SweepConfig)})},
    )
    given = parse_given(both, words, "sweep", DESCRIPTION, MORE)
    if given is None:
        return None
    name = given.pop("recipe", None)
    settings = {**({} if name is None else _from_recipe(name)), **given}
    return SweepConfig(
        **{name: settings[name] for name in own if name in settings},
        fixed={name: settings[name] for name in fixed if name in settings},
    )


def _from_recipe(name: str) -> dict[str, Any]:
    """Fix what a recipe states: only its radius is searched, as in the paper, where no flag says otherwise."""
    from flatwise.lab.recipes import load_recipe
    from flatwise.lab.sweep.config import DEFAULTS, SET_BY_TRIAL
    from flatwise.lab.train.config import train_config_from

    recipe = load_recipe(name)
    one = train_config_from(recipe)
    stated = {field: value for field, value in recipe.items() if field not in SET_BY_TRIAL and field not in DEFAULTS}
    return {**stated, "methods": one.method, "lr": repr(one.lr), "weight_decay": repr(one.weight_decay)}


def _document(helps: dict[str, str]) -> str:
    return "Flags.\n\n    Attributes:\n" + "".join(f"        {name}: {text}\n" for name, text in helps.items())


def run(config: SweepConfig) -> int:
    """Search, and print the best trials and how to train the best again.

    Args:
        config: the settings.

    Returns:
        The exit code.
    """
    from flatwise.lab.sweep import sweep
    from flatwise.lab.sweep.results import finished
    from flatwise.lab.table import console_for, print_sentences

    found = sweep(config)
    console = console_for(sys.stdout)
    ended = finished(found.rows)
    if ended:
        _print_table(ended[:SHOWN], console)
    print_sentences(sentences(config, found.rows), console)
    if ended:
        # Not folded: it is there to be copied.
        print(found.results["again"])
    console.print(f"Every trial: {found.folder / 'results.json'}", markup=False, soft_wrap=True)
    return 0


def _print_table(rows: Sequence[Row], console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.ROUNDED if console.is_terminal else box.MARKDOWN)
    table.add_column("trial", justify="right")
    table.add_column("method", overflow="fold", min_width=4)
    for heading in ("rho", "lr", "weight decay", "validation accuracy, %"):
        table.add_column(heading, justify="right")
    for row in rows:
        spread = "" if row.ci95 is None else f" ± {100 * row.ci95:.1f}"
        table.add_row(
            str(row.number),
            row.method,
            "" if row.rho is None else f"{row.rho:.3g}",
            f"{row.lr:.3g}",
            f"{row.weight_decay:.3g}",
            f"{100 * (row.accuracy or 0.0):.1f}{spread}",
        )
    console.print(table)


def sentences(config: SweepConfig, rows: Sequence[Row]) -> list[str]:
    """Say how far the table can be trusted.

    Args:
        config: the settings.
        rows: of all trials.

    Returns:
        Sentences.
    """
    from flatwise.lab.sweep.results import finished

    ended, diverged = finished(rows), sum(row.failed is not None for row in rows)
    stopped = len(rows) - len(ended) - diverged
    parts = [f"{len(rows)} trials: {len(ended)} to the end, {stopped} stopped early, {diverged} failed."]
    if not ended:
        return [*parts, "Nothing was trained to the end: raise --trials, or use --pruner none in another --study."]
    if config.seeds == 1:
        parts.append(
            "Each trial is one training, so neighbours in the table may differ by chance: --seeds 3 shows by how much."
        )
    else:
        parts.append(f"± is half the 95 % interval over {config.seeds} seeds.")
    unused = config.seed + config.seeds
    parts.append(
        f"The first row is the best of {len(ended)}, so its accuracy is flattered by the choice, and the test set has "
        f"not been looked at. Before you quote it, train it on seeds from {unused} on, which nothing was chosen by:"
    )
    return parts
