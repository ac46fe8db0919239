"""The experiments: which rows each has, and the settings of each training, made of the recipes.

Beside the paper's own there are two claims of later ones: SAM late in training suffices (Zhou et al., ICLR 2025), and
the momentum can stand in for the first gradient (Becker et al., arXiv 2401.12033).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from flatwise.errors import UnknownNameError
from flatwise.lab.paper.tables import settings, table
from flatwise.lab.recipes import load_recipe
from flatwise.lab.train.config import TrainConfig, train_config_from

SEEDS = tuple(range(5))
WRN_28_10_SIZE = 36_479_194
"""Weights of WRN-28-10 for ten classes, which turn the length of a Gaussian direction into a deviation per weight."""
FIGURE_6_RHOS = tuple(10.0**power for power in range(-6, 4))
FIGURE_3_RHOS = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15)
FIGURE_4_EPOCHS = "1,25,50,75,100,125,150,175"
"""Epochs, beside the last, after which the cosine between the two updates is measured."""
Roles = dict[str, TrainConfig]


@dataclass(frozen=True)
class Experiment:
    """How a table's trainings are made.

    Attributes:
        rows: the rows that can be run.
        cells: what each row is run for.
        roles: (row, cell) to the settings of each role; one with ``labels_from`` learns from the role "first".
        seeds: the seeds of the reported runs.
        same_runs: columns of the table that are read off the same runs, where these are not the cells.
    """

    rows: tuple[str, ...]
    cells: tuple[str, ...]
    roles: Callable[[str, str], Roles]
    seeds: tuple[int, ...] = SEEDS
    same_runs: tuple[str, ...] = ()


def experiment_names() -> tuple[str, ...]:
    """List what can be reproduced.

    Returns:
        Tables by number, figures and appendices by a word.
    """
    return tuple(EXPERIMENTS)


def experiment(name: str) -> Experiment:
    """Look an experiment up.

    Args:
        name: one of ``experiment_names()``.

    Returns:
        The experiment.

    Raises:
        UnknownNameError: no such experiment.
    """
    if name not in EXPERIMENTS:
        raise UnknownNameError("table", name, EXPERIMENTS)
    return EXPERIMENTS[name]


def recipe_config(name: str, **changes: object) -> TrainConfig:
    """Turn a recipe into settings.

    Args:
        name: the recipe.
        **changes: fields that differ from it.

    Returns:
        The settings.
    """
    return train_config_from({**load_recipe(name), **changes})


def twice_as_long(config: TrainConfig) -> TrainConfig:
    """Double the length, as the paper does for the base.

    Args:
        config: the settings.

    Returns:
        The same with twice the epochs, and steps where they are stated.
    """
    return replace(config, epochs=2 * config.epochs, steps=None if config.steps is None else 2 * config.steps)


def _pair(stem: str, *, doubled: bool = True, rho: float | None = None) -> Roles:
    sam, base = recipe_config(f"{stem}-sam"), recipe_config(f"{stem}-sgd")
    roles = {"sam": sam if rho is None else replace(sam, rho=rho), "base": base}
    return {**roles, "base-2x": twice_as_long(base)} if doubled else roles


def _cifar(row: str, cell: str, rho: float | None = None) -> Roles:
    return _pair(f"{cell}-{row.removesuffix('-basic')}", rho=rho)


def _small_images(row: str, cell: str) -> Roles:
    # What the paper calls auto augment on Fashion-MNIST is cutout.
    return _cifar(row.replace("autoaugment", "cutout") if cell == "fashion-mnist" else row, cell)


def _noise(row: str, cell: str) -> Roles:
    stem = f"cifar10-resnet32-noise{cell}"
    if row.startswith("bootstrap-"):
        return {"first": recipe_config(f"{stem}-{row.removeprefix('bootstrap-')}"), row: recipe_config(f"{stem}-{row}")}
    if row == "mixup":
        alphas = settings()["noise"]["mixup"]
        return {f"mixup-{alpha:g}": recipe_config(f"{stem}-mixup", mixup=alpha) for alpha in alphas}
    return {"base" if row == "sgd" else row: recipe_config(f"{stem}-{row}")}


def _noise_by_rho(row: str, cell: str) -> Roles:
    held = settings()["search"]["held_out"]
    stem, changes = f"cifar10-resnet32-noise{cell}", {"rho": float(row), "val_fraction": held}
    return {
        "first": recipe_config(f"{stem}-sam", **changes),
        "bootstrap-sam": recipe_config(f"{stem}-bootstrap-sam", **changes),
    }


def _one(name: str, role: str, **changes: object) -> Roles:
    return {role: recipe_config(name, **changes)}


def _norms(row: str, cell: str) -> Roles:
    rho = float(cell)
    return _one(f"cifar10-wrn28-10-{row}", row, rho=rho / math.sqrt(WRN_28_10_SIZE) if row == "random" else rho)


def _m(row: str, cell: str) -> Roles:
    if row == "sgd":
        return _one("cifar10-resnet20-sgd", "base")
    return _one(f"cifar10-resnet20-m{row}-sam", "sam", rho=float(cell))


def _method(methods: Mapping[str, tuple[str, str]]) -> Callable[[str, str], Roles]:
    # A later paper's method in the place of SAM, on the WRN-28-10 of Table 1.
    def roles(row: str, cell: str) -> Roles:
        end, method = methods[row]
        changes = {"method": method} if method else {}
        if method.startswith("msam"):
            changes["rho"] = None  # type: ignore[assignment]  # its own, which is no radius of SAM
        return _one(f"{cell}-wrn28-10-{end}", row, **changes)

    return roles


_CIFAR = ("cifar10", "cifar100")
_SHARES = ("20", "40", "60", "80")
_BASE_AND_SAM = {"sgd": ("sgd", ""), "sam": ("sam", "")}
_LATE = {**_BASE_AND_SAM, "late": ("sam", "sam:window=(0.9,1.0)"), "early": ("sam", "sam:window=(0.0,0.9)")}
_MSAM = {**_BASE_AND_SAM, "msam": ("sam", "msam")}
_NOISE_ROWS = ("sgd", "mixup", "bootstrap-mixup", "sam", "bootstrap-sam")  # the others are quoted from other papers

EXPERIMENTS: dict[str, Experiment] = {
    "1": Experiment(table("1").rows, _CIFAR, _cifar),
    "2": Experiment(
        table("2").rows, ("imagenet",), lambda row, cell: _pair(f"imagenet-{row}", doubled=False),
        same_runs=("top1", "top5"),
    ),
    "3": Experiment(table("3").rows, ("b7", "l2"), lambda row, cell: _pair(f"{row}-efficientnet-{cell}")),
    "4": Experiment(_NOISE_ROWS, _SHARES, _noise),
    "5": Experiment(table("5").rows, ("svhn", "fashion-mnist"), _small_images),
    "8": Experiment(table("8").rows, _SHARES, _noise_by_rho),
    "9": Experiment(table("9").rows, _CIFAR, lambda row, cell: _cifar(row, cell, rho=0.05)),
    "10": Experiment(table("10").rows, ("b7",), lambda row, cell: _pair(f"{row}-efficientnet-{cell}", rho=0.05)),
    "11": Experiment(
        table("11").rows, _CIFAR, lambda row, cell: _one(f"{cell}-wrn28-10-inner{row}-sam", "sam"),
        seeds=tuple(range(settings()["table-11"]["runs"])),
    ),
    "spectra": Experiment(
        ("sgd", "sam"), ("cifar10",),
        lambda row, cell: _one(f"{cell}-wrn40-10-nobn-{row}", "base" if row == "sgd" else row),
        same_runs=("1", "50", "300"),
    ),
    "m": Experiment(("1", "4", "16", "64", "256", "sgd"), tuple(f"{rho:g}" for rho in FIGURE_3_RHOS), _m),
    "c4": Experiment(
        ("sam", "second-order", "sgd"), ("cifar10",),
        lambda row, cell: _one(
            f"{cell}-wrn40-2-{row}", "base" if row == "sgd" else row, keep_epochs=FIGURE_4_EPOCHS
        ),
    ),
    "c5": Experiment(("p2", "pinf", "random"), tuple(f"{rho:g}" for rho in FIGURE_6_RHOS), _norms),
    "late": Experiment(tuple(_LATE), _CIFAR, _method(_LATE)),
    "msam": Experiment(tuple(_MSAM), _CIFAR, _method(_MSAM)),
}  # fmt: skip
