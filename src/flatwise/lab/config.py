"""What can be set: one dataclass is the flags, ``config.json`` and the Python call."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from flatwise.errors import UserError

# These change where and how fast a comparison runs, never a number in it, so the folder's name ignores them.
NOT_PART_OF_THE_RESULT = frozenset({"out", "workers", "fresh", "quiet"})
LEARNING_RATES = {"sgd": 0.05, "adamw": 0.001}


@dataclass(frozen=True)
class CompareConfig:
    """The settings of one comparison.

    Attributes:
        methods: names to compare, separated by commas; the first is the reference. The base optimizer's own
            name (or "base") trains without SAM. Options follow a name: "sam:rho=0.5:m=32".
        rho: radius for every method that states none itself (default: the lab's, see docs/compare.md).
        optimizer: the base optimizer, which all methods share.
        dataset: the images; "digits" comes with scikit-learn.
        model: the network, sized to its data set.
        epochs: passes over the training data.
        seeds: number of runs of each method, numbered from 0; seed i is the same for every method.
        batch_size: images in a step; the last, smaller batch of an epoch is dropped.
        lr: first learning rate, from which a cosine falls to 0 (default: 0.05 for sgd, 0.001 for adamw).
        weight_decay: of the base optimizer.
        momentum: of sgd.
        label_noise: exact share of the training labels that are made wrong, each by a uniformly drawn other
            class; validation and test labels stay right.
        train_size: training images to use, validation included (default: all).
        val_fraction: part of them held out for validation.
        augment: "basic" shifts images at random, and mirrors them where that keeps the class.
        equal_compute: train the base for twice the epochs too, and report the better by validation accuracy.
        workers: processes that train side by side, one thread each (default: the number of cores).
        out: folder in which the run's own folder is made, under a name derived from the settings.
        data_root: folder in which to look for fashion-mnist, in the torchvision layout.
        fresh: forget what the folder holds and train again.
        quiet: no progress, only the table.
    """

    methods: str = "base,sam,asam"
    rho: float | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    dataset: Literal["digits", "fashion-mnist"] = "digits"
    model: Literal["mlp", "cnn-small", "cnn-plain", "resnet8", "resnet20"] = "cnn-small"
    epochs: int = 40
    seeds: int = 5
    batch_size: int = 64
    lr: float | None = None
    weight_decay: float = 0.0005
    momentum: float = 0.9
    label_noise: float = 0.4
    train_size: int | None = None
    val_fraction: float = 0.1
    augment: Literal["none", "basic"] = "none"
    equal_compute: bool = False
    workers: int | None = None
    out: str = "runs"
    data_root: str | None = None
    fresh: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant.

        Raises:
            UserError: a number outside its range.
        """
        for name in ("epochs", "seeds", "batch_size", "train_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{flag(name)} must be at least 1, not {value}")
        for name in ("rho", "lr", "weight_decay", "momentum"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{flag(name)} must be a number of at least 0, not {value}")
        if not 0 <= self.label_noise < 1:
            raise UserError(f"--label-noise must be a share from 0 up to, not including, 1, not {self.label_noise}")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val-fraction must be a share between 0 and 1, not {self.val_fraction}")

    @property
    def learning_rate(self) -> float:
        """The learning rate that is used: the one given, or the optimizer's default."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    def resolved(self) -> CompareConfig:
        """Fill in what the defaults left open, so that two ways to say the same are one configuration.

        Returns:
            The configuration with the learning rate filled in and "base" replaced by the optimizer's name.
        """
        given = [name.strip() for name in self.methods.split(",") if name.strip()]
        names = [self.optimizer if name == "base" else name for name in given]
        return replace(self, lr=self.learning_rate, methods=",".join(names))

    def identity(self) -> str:
        """Compress everything that decides the numbers into one short word.

        Returns:
            Ten hexadecimal digits, the same for the same settings.
        """
        kept = {name: value for name, value in asdict(self.resolved()).items() if name not in NOT_PART_OF_THE_RESULT}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:10]

    def folder_name(self) -> str:
        """Name the run's folder.

        Returns:
            Data set, model, optimizer, noise and the identity.
        """
        noise = f"-noise{self.label_noise:g}" if self.label_noise else ""
        return f"{self.dataset}-{self.model}-{self.optimizer}{noise}-{self.identity()}"


def flag(field: str) -> str:
    """Write a field's name as its flag.

    Args:
        field: such as ``"batch_size"``.

    Returns:
        Such as ``"--batch-size"``.
    """
    return "--" + field.replace("_", "-")


def config_from(values: dict[str, Any]) -> CompareConfig:
    """Build a configuration from names and values, as ``config.json`` holds them.

    Args:
        values: fields by name; the others take their defaults.

    Returns:
        The configuration.
    """
    names = {field.name for field in fields(CompareConfig)}
    return CompareConfig(**{name: value for name, value in values.items() if name in names})
