"""From ``0.01:1:log`` to what is searched, for each method in the scale of its own radius."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flatwise
from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.config import flag

if TYPE_CHECKING:
    from optuna.trial import Trial


@dataclass(frozen=True)
class Domain:
    """The values that one setting can take: a range, or a few numbers.

    Attributes:
        low: smallest value of a range.
        high: largest value of a range.
        log: whether the logarithm is searched evenly.
        choices: the numbers; empty for a range.
    """

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[float, ...] = ()

    def __str__(self) -> str:
        """Write it as the flag takes it."""
        if self.choices:
            return ",".join(f"{value:g}" for value in self.choices)
        return f"{self.low:g}:{self.high:g}{':log' * self.log}"

    def scaled(self, factor: float) -> Domain:
        """Multiply every value.

        Args:
            factor: by what.

        Returns:
            The new domain, rounded to six digits, so that 0.1 times 3 is 0.3.
        """
        low, high, *choices = (float(f"{value * factor:.6g}") for value in (self.low, self.high, *self.choices))
        return Domain(low, high, self.log, tuple(choices))

    @property
    def fixed(self) -> bool:
        """Whether there is one value only."""
        return len(self.choices) == 1

    def suggest(self, trial: Trial, name: str) -> float:
        """Let a trial choose.

        Args:
            trial: asks the sampler.
            name: of the parameter.

        Returns:
            The value.
        """
        if self.fixed:
            return self.choices[0]
        if self.choices:
            return float(trial.suggest_categorical(name, list(self.choices)))
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        methods: the methods to choose from.
        radii: for each method that has a radius to search, its domain, in the method's own scale.
        lr: learning rates.
        weight_decay: weight decays.
    """

    methods: tuple[str, ...]
    radii: Mapping[str, Domain]
    lr: Domain
    weight_decay: Domain

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Let a trial choose its settings.

        Each method's radius is a parameter of its own, since radii of different methods do not compare.

        Args:
            trial: asks the sampler.

        Returns:
            Fields of a training: ``method``, ``rho``, ``lr`` and ``weight_decay``.
        """
        method = self.methods[0] if len(self.methods) == 1 else trial.suggest_categorical("method", list(self.methods))
        radius = self.radii.get(method)
        return {
            "method": method,
            "rho": None if radius is None else radius.suggest(trial, f"rho:{method}"),
            "lr": self.lr.suggest(trial, "lr"),
            "weight_decay": self.weight_decay.suggest(trial, "weight_decay"),
        }

    def written(self) -> dict[str, str]:
        """Write it down, alike for two ways to say the same.

        Returns:
            Text by the name of the flag.
        """
        radii = ",".join(f"{method}={radius}" for method, radius in self.radii.items())
        return {
            "methods": ",".join(self.methods),
            "rho": radii,
            "lr": str(self.lr),
            "weight_decay": str(self.weight_decay),
        }


def read_space(methods: str, *, rho: str, lr: str, weight_decay: str) -> Space:
    """Read what is searched.

    Args:
        methods: names, separated by commas.
        rho: SAM's radii, and those of single methods after ``name=``.
        lr: learning rates.
        weight_decay: weight decays.

    Returns:
        The space.

    Raises:
        UserError: no method, one listed twice, or a range that cannot be meant.
        UnknownNameError: a method that does not exist.
    """
    names = tuple(_methods(methods))
    if not names:
        raise UserError("--methods names no method; for example --methods sam,asam")
    known = list(flatwise.list_variants())
    for name in names:
        if name.partition(":")[0] not in ("base", *known):
            raise UnknownNameError("method", name.partition(":")[0], ["base", *known])
        if names.count(name) > 1:
            raise UserError(f"--methods has {name!r} twice")
    shared, own = _radii(rho, names)
    radii = {}
    for name in names:
        variant, *options = name.split(":")
        if variant == "base" or any(option.startswith("rho=") for option in options):
            continue
        if "rho" in flatwise.variant_info(variant).options and name not in own:
            continue  # its radius sets itself
        ratio = flatwise.variant_info(variant).rho / flatwise.variant_info("sam").rho
        radii[name] = own[name] if name in own else read_domain("rho", shared).scaled(ratio)
    return Space(names, radii, read_domain("lr", lr), read_domain("weight_decay", weight_decay))


def _methods(text: str) -> list[str]:
    # As in a comparison, a comma may stand before an option: no method's name has an equals sign.
    names: list[str] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if names and "=" in word.partition(":")[0]:
            names[-1] += f":{word}"
        else:
            names.append(word)
    return names


def _radii(text: str, methods: tuple[str, ...]) -> tuple[str, dict[str, Domain]]:
    """Split into what holds for all, and what single methods have of their own."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for word in text.split(","):
        name, equals, value = word.rpartition("=")
        if equals:
            groups.append((name.strip(), [value]))
        else:
            groups[-1][1].append(word)
    (_, shared), *rest = groups
    for name, _ in rest:
        if name not in methods:
            raise UnknownNameError("method in --rho", name, methods)
    own = {name: read_domain("rho", ",".join(words)) for name, words in rest}
    # Where every method has its own, nothing need hold for all; where one lacks it, the empty text is refused.
    return ",".join(shared), own


def read_domain(name: str, text: str) -> Domain:
    """Read a range or a list of numbers.

    Args:
        name: the field, for the message.
        text: ``low:high``, ``low:high:log``, or numbers separated by commas.

    Returns:
        The domain.

    Raises:
        UserError: it is none of these, or cannot be meant.
    """
    domain = _domain(text)
    wrong = "must be low:high, low:high:log, or numbers" if domain is None else _wrong(domain)
    if domain is None or wrong:
        raise UserError(f"{flag(name)} {wrong}, not {text!r}; for example 0.01:1:log, 0.1:0.5, or 0.05,0.1,0.2")
    return domain


def _domain(text: str) -> Domain | None:
    low, *rest = text.split(":")
    try:
        if rest:
            return Domain(float(low), float(rest[0]), log=len(rest) == 2) if rest[1:] in ([], ["log"]) else None
        return Domain(choices=tuple(float(word) for word in text.split(",")))
    except ValueError:
        return None


def _wrong(domain: Domain) -> str:
    if not all(math.isfinite(value) and value >= 0 for value in (domain.low, domain.high, *domain.choices)):
        return "must have numbers of at least 0"
    if len(set(domain.choices)) < len(domain.choices):
        return "must have different numbers"
    if not domain.choices and domain.low >= domain.high:
        return "must have its smaller number first"
    return "must begin above 0 where the logarithm is searched" if domain.log and domain.low == 0 else ""
