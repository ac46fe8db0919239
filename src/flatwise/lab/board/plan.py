"""What the board trains: the tasks, and three radii for every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import flatwise
from flatwise.errors import UnknownNameError
from flatwise.lab.config import CompareConfig

BASE = "sgd"
LONGER = "sgd-2x-epochs"
"""The base for twice the epochs: as many gradients as SAM, without SAM."""
SEEDS = 5

Radii = tuple[float, float, float]

# Three radii for each task: digits with wrong labels, Fashion-MNIST with wrong labels, Fashion-MNIST. Under noise the
# middle one was the best or near it in a first run from one or two seeds, and the others bracket it. With right labels
# a short training underfits long before these. A method whose perturbation is as long as SAM's has SAM's radii.
LIKE_SAM: tuple[Radii, ...] = ((0.5, 1.0, 2.0), (0.2, 0.5, 1.0), (0.02, 0.05, 0.2))
OTHERS: dict[str, tuple[Radii, ...]] = {
    "asam": ((2.0, 5.0, 10.0), (2.0, 5.0, 10.0), (0.2, 0.5, 2.0)),
    # One step of p = inf moves all n weights by rho, which is a length of rho sqrt(n), here 270 to 450 rho.
    "lp": ((2e-3, 5e-3, 1.5e-2), (5e-4, 1.5e-3, 5e-3), (1e-4, 2e-4, 5e-4)),
    "usam": ((0.5, 1.0, 2.0), (0.2, 0.5, 1.0), (0.02, 0.1, 0.5)),
    "sam-on": ((1.5, 5.0, 10.0), (1.0, 3.0, 10.0), (0.2, 0.5, 2.0)),
    # Eleven tensors: together about 3.3 rho.
    "layerwise": ((0.1, 0.3, 1.0), (0.05, 0.1, 0.3), (0.005, 0.015, 0.05)),
    "msam": ((1.0, 3.0, 6.0), (1.0, 3.0, 6.0), (0.3, 1.0, 3.0)),
    "adaptive-msam": ((0.3, 1.0, 3.0), (1.0, 3.0, 10.0), (0.3, 1.0, 3.0)),
    "random": ((0.05, 0.1, 0.2), (0.03, 0.1, 0.2), (0.002, 0.005, 0.015)),
    # The radius falls with the learning rate, to a sixth as in the recipe of its authors.
    "gsam": ((0.3, 0.6, 1.0), (0.1, 0.3, 0.6), (0.04, 0.1, 0.3)),
    # Fewer steps of SAM bear, and need, a larger radius.
    "every-k": ((1.0, 2.0, 4.0), (0.5, 1.0, 2.0), (0.05, 0.1, 0.2)),
    "looksam": ((1.0, 2.0, 4.0), (0.5, 1.0, 2.0), (0.05, 0.1, 0.3)),
    "late": ((1.0, 2.0, 4.0), (0.5, 1.0, 2.0), (0.05, 0.1, 0.2)),
    "ae-sam": ((1.0, 2.0, 4.0), (0.5, 1.0, 2.0), (0.05, 0.1, 0.2)),
    # The gradient of a few samples points further away from that of the others.
    "m-sam": ((0.2, 0.5, 1.0), (0.1, 0.2, 0.5), (0.02, 0.05, 0.2)),
    "k-sam": ((0.2, 0.5, 1.0), (0.1, 0.2, 0.5), (0.02, 0.05, 0.2)),
    "bsam": ((0.1, 0.3, 1.0), (0.03, 0.1, 0.3), (0.003, 0.01, 0.03)),
}


@dataclass(frozen=True)
class Task:
    """A task of the board.

    Attributes:
        name: on the command line and in the files.
        title: on the page.
        config: the settings; methods and seeds are filled in.
        column: of the table of radii.
    """

    name: str
    title: str
    config: CompareConfig
    column: int


def _fashion(**settings: object) -> CompareConfig:
    return replace(CompareConfig(), dataset="fashion-mnist", quiet=True, **settings)  # type: ignore[arg-type]


TASKS = (
    Task("digits-noise", "digits, 40 % wrong labels", CompareConfig(quiet=True), 0),
    Task("fashion-noise", "Fashion-MNIST, 5,000 images, 40 % wrong labels", _fashion(train_size=5000, epochs=20), 1),
    Task("fashion-clean", "Fashion-MNIST, 10,000 images", _fashion(train_size=10000, epochs=10, label_noise=0.0), 2),
)


@dataclass(frozen=True)
class Entry:
    """A method at one radius.

    Attributes:
        method: the method's name.
        text: what ``--methods`` takes, and what the training is called.
        rho: the radius; None for the base.
    """

    method: str
    text: str
    rho: float | None


def all_methods() -> list[str]:
    """List what the board compares.

    Returns:
        The base, the longer base, and every method of the registry that has a radius to choose.
    """
    set_themselves = [name for name in flatwise.list_variants() if "rho" in flatwise.variant_info(name).options]
    return [BASE, LONGER, *(name for name in flatwise.list_variants() if name not in set_themselves)]


def chosen(names: str | None, known: Sequence[str], kind: str) -> list[str]:
    """Read a list of names.

    Args:
        names: separated by commas; None is all.
        known: what there is.
        kind: what is named, for the error.

    Returns:
        The names, in the order of ``known``.

    Raises:
        UnknownNameError: a name that does not exist.
    """
    if names is None:
        return list(known)
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise UnknownNameError(kind, name, known)
    return [name for name in known if name in wanted]


def radii(task: Task, method: str) -> Radii:
    """Look up what is tried.

    Args:
        task: decides between the three.
        method: a method of the registry.

    Returns:
        Three radii, rising.
    """
    return OTHERS.get(method, LIKE_SAM)[task.column]


def entries(task: Task, method: str) -> list[Entry]:
    """List the trainings of a method on a task, each of which runs from every seed.

    Args:
        task: the task.
        method: one of :func:`all_methods`.

    Returns:
        One entry for the base and for the longer base, three for a method.
    """
    if method in (BASE, LONGER):
        return [Entry(method, method, None)]
    extra = {"gsam": ":rho_min={:g}"}.get(method, "")
    return [Entry(method, f"{method}:rho={rho:g}" + extra.format(rho / 6), rho) for rho in radii(task, method)]


def config_for(task: Task, methods: Sequence[Entry], seeds: int) -> CompareConfig:
    """Fill in what is trained.

    Args:
        task: the task.
        methods: the trainings.
        seeds: how many seeds.

    Returns:
        The settings, as the lab's runs take them.
    """
    texts = [entry.text for entry in methods if entry.method != LONGER]
    longer = any(entry.method == LONGER for entry in methods)
    return replace(task.config, methods=",".join(texts), seeds=seeds, equal_compute=longer)


def settings_of(task: Task, entry: Entry) -> str:
    """Compress everything that decides the numbers of a training, but its seed, into one word.

    Args:
        task: the task.
        entry: the training.

    Returns:
        Ten hexadecimal digits.
    """
    base = Entry(BASE, BASE, None)
    return config_for(task, [base, entry] if entry.method == LONGER else [entry], 1).identity()
