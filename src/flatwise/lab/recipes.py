"""Recipes: settings of a training under a name, such as ``cifar10-wrn28-10-sam``; the files are in ``recipes/``.

One file holds a family of recipes that differ in a few words of their name:

    names = "{cifar10,cifar100}-wrn28-10{,-cutout}-{sam,sgd}"

is 2 · 2 · 2 recipes; a list may hold several such patterns. A section holds for the recipes whose name chose all of its
words (``[cifar10]``, ``["cifar10 sam"]``), ``[all]`` for each; a later section overrides an earlier one. ``paper`` says
where in the paper the training stands; the sections' texts are joined. The comment at the top of a file is shown with
its recipes.

A user's own file holds fields at its top level, and may begin with ``recipe = "…"``, to change some fields of another.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flatwise.errors import UnknownNameError, UserError, nearest
from flatwise.lab.toml import read_toml
from flatwise.lab.train.config import TrainConfig, train_config_from

FOLDER = Path(__file__).parent / "recipes"
CHOICE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Recipe:
    """Settings under a name.

    Attributes:
        name: what ``--recipe`` takes.
        fields: the fields of ``TrainConfig`` that it states; the others have their defaults.
        paper: table and row of the paper, or empty.
        comment: what is to be known about it: what the paper leaves open, and what was chosen.
    """

    name: str
    fields: Mapping[str, Any]
    paper: str = ""
    comment: str = ""


def recipe_names() -> tuple[str, ...]:
    """List the recipes.

    Returns:
        Their names, those of a file together.
    """
    return tuple(_all())


def load_recipe(name: str) -> dict[str, Any]:
    """Read a recipe as fields of ``TrainConfig``, of which a flag may override each.

    Args:
        name: one of ``recipe_names()``, or the path of a file that ends in .toml.

    Returns:
        The fields that it states, checked.
    """
    return dict(find_recipe(name).fields)


def find_recipe(name: str) -> Recipe:
    """Read a recipe.

    Args:
        name: one of ``recipe_names()``, or the path of a file that ends in .toml.

    Returns:
        The recipe, its fields checked.

    Raises:
        UserError: no such recipe, with the nearest that there is.
    """
    if name.endswith(".toml"):
        return _own(Path(name).expanduser())
    if name not in _all():
        raise UserError(
            f"unknown recipe {name!r}{nearest(name, _all())} (flatwise recipes lists all; the path of a file of your "
            "own ends in .toml)"
        )
    return _all()[name]


@cache
def _all() -> dict[str, Recipe]:
    return {recipe.name: recipe for path in sorted(FOLDER.glob("*.toml")) for recipe in read_family(path)}


def read_family(path: Path) -> list[Recipe]:
    """Read the recipes of a file.

    Args:
        path: a file with ``names`` and sections.

    Returns:
        The recipes, in the order of their names' choices.

    Raises:
        UnknownNameError: a section for a word that no name can choose.
    """
    content = read_toml(path)
    comment = _comment(path)
    names, paper = content.pop("names"), content.pop("paper", "")
    named = [pair for pattern in ([names] if isinstance(names, str) else names) for pair in expand(pattern)]
    words = set().union(*(chosen for _, chosen in named))
    for section in content:
        for word in section.split():
            if word not in words | {"all"}:
                raise UnknownNameError(f"word of a section in {path.name}", word, sorted(words))
    recipes = []
    for name, chosen in named:
        stated: dict[str, Any] = {}
        places = [paper]
        for section, values in content.items():
            if set(section.split()) <= chosen | {"all"}:
                places.append(values.get("paper", ""))
                stated.update({field: value for field, value in values.items() if field != "paper"})
        recipes.append(Recipe(name, _checked(stated, name), ", ".join(filter(None, places)), comment))
    return recipes


def expand(pattern: str) -> Iterable[tuple[str, set[str]]]:
    """List the names that a pattern stands for, as a shell does.

    Args:
        pattern: text with choices in braces, such as "a{,-b}-{c,d}".

    Yields:
        A name, and the words that it chose, without the hyphens around them.
    """
    literals = CHOICE.split(pattern)[::2]
    for chosen in itertools.product(*(choices.split(",") for choices in CHOICE.findall(pattern))):
        pieces = itertools.zip_longest(literals, chosen, fillvalue="")
        yield "".join(itertools.chain.from_iterable(pieces)), _words(chosen)


def _words(choices: Iterable[str]) -> set[str]:
    return {word for choice in choices if (word := choice.strip("-"))}


def _comment(path: Path) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def _own(path: Path, seen: tuple[Path, ...] = ()) -> Recipe:
    """Read a user's file, and what it begins with."""
    if path.resolve() in seen:
        raise UserError(f"{path} begins with itself: its recipe must be another one")
    content = read_toml(path)
    start = content.pop("recipe", None)
    stated: dict[str, Any] = {}
    if isinstance(start, str) and start.endswith(".toml"):
        stated.update(_own(path.parent / Path(start).expanduser(), (*seen, path.resolve())).fields)
    elif start is not None:
        stated.update(find_recipe(str(start)).fields)
    stated.update(_checked(content, str(path)))
    return Recipe(str(path), _checked(stated, str(path)), comment=_comment(path))


def _checked(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Let through what ``TrainConfig`` takes, with whole numbers made floats where it has floats."""
    hints = get_type_hints(TrainConfig)
    known = [field.name for field in fields(TrainConfig)]
    values = {}
    for name, value in stated.items():
        if name not in known:
            raise UserError(f"recipe {where}: unknown field {name!r}{nearest(name, known)}")
        values[name] = _typed(hints[name], value, name, where)
    try:
        train_config_from(values)
    except UserError as error:
        raise UserError(f"recipe {where}: {error}") from error
    return values


def _typed(hint: Any, value: Any, name: str, where: str) -> Any:
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        words = [str(word) for word in get_args(hint)]
        raise UserError(
            f"recipe {where}: {name} is one of {', '.join(words)}, not {value!r}{nearest(str(value), words)}"
        )
    kinds = tuple(kind for kind in (get_args(hint) or (hint,)) if kind is not type(None))
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"recipe {where}: {name} must be of type {wanted}, not {value!r}")
    return value
