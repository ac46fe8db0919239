"""What can be measured: the names of the measures, and the settings that their numbers depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flatwise.ascent import Ball
from flatwise.errors import UnknownNameError, UserError

WORST = {
    "": (2.0, False),
    "_adaptive": (2.0, True),
    "_inf": (math.inf, False),
    "_inf_adaptive": (math.inf, True),
}
"""The balls: what is appended to a row's name, p, and whether T = |w| + eta."""

AVERAGE = {"average": False, "average_adaptive": True}
CURVATURE = ("lambda_max", "lambda_ratio", "trace")
FIRST_ORDER = (
    "gradient_norm",
    *(f"{steps}{ball}" for ball in WORST for steps in ("one_step", "n_steps")),
    *AVERAGE,
    "m_sharpness",
)
GROUPS = {
    "worst": tuple(name for name in FIRST_ORDER if "step" in name),
    "averages": tuple(AVERAGE),
    "curvature": CURVATURE,
    "first_order": FIRST_ORDER,
}
"""Names that stand for several measures; ``first_order``: all that need no second derivative."""


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on.

    Attributes:
        rho: radius of the plain L2 ball, and size of the plain noise.
        adaptive_rho: of the adaptive L2 ball, and of the adaptive noise.
        rho_inf: of the plain L-infinity ball.
        adaptive_rho_inf: of the adaptive L-infinity ball.
        eta: in T = |w| + eta.
        steps: of the ascent.
        draws: of noise.
        m: sizes of micro-batches.
        micro_batches: at most so many of them for each m.
    """

    rho: float
    adaptive_rho: float
    rho_inf: float
    adaptive_rho_inf: float
    eta: float
    steps: int
    draws: int
    m: tuple[int, ...]
    micro_batches: int | None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: if one is out of its range.
        """
        for name in ("rho", "adaptive_rho", "rho_inf", "adaptive_rho_inf"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise UserError(f"{name} must be a finite number > 0, got {value!r}")
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise UserError(f"eta must be a finite number >= 0, got {self.eta!r}")
        counts = {"steps": self.steps, "draws": self.draws, "micro_batches": self.micro_batches}
        for name, value in [*counts.items(), *(("every m", m) for m in self.m)]:
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UserError(f"{name} must be a whole number >= 1, got {value!r}")

    def ball(self, p: float, adaptive: bool) -> tuple[Ball, float]:
        """Return a ball and its radius.

        Args:
            p: order of its norm.
            adaptive: whether T = |w| + eta.

        Returns:
            Both.
        """
        plain, scaled = (self.rho_inf, self.adaptive_rho_inf) if math.isinf(p) else (self.rho, self.adaptive_rho)
        return Ball(p, adaptive, self.eta if adaptive else 0.0), scaled if adaptive else plain


def chosen(measures: str | Sequence[str] | None) -> tuple[str, ...]:
    """Read which measures are wanted.

    Args:
        measures: names, or names of groups; None: all.

    Returns:
        Names, each once.

    Raises:
        UnknownNameError: if a name is neither.
    """
    everything = (*FIRST_ORDER, *CURVATURE)
    if measures is None:
        return everything
    names: list[str] = []
    for name in (measures,) if isinstance(measures, str) else measures:
        if name not in everything and name not in GROUPS:
            raise UnknownNameError("measure", name, [*GROUPS, *everything])
        names += GROUPS.get(name, (name,))
    return tuple(dict.fromkeys(names))


def work(wanted: Sequence[str], settings: Settings) -> float:
    """Return how many steps, pairs of draws and micro-batches there are at most, for a bar.

    Args:
        wanted: names of measures.
        settings: how many of each.

    Returns:
        Units of work.
    """
    several = sum(name.startswith("n_steps") for name in wanted) * (settings.steps - 1)
    averages = sum(name in AVERAGE for name in wanted) * settings.draws / 2
    micro = len(settings.m) * (settings.micro_batches or 0) if "m_sharpness" in wanted else 0
    return max(1.0, several + averages + micro)


def expected(wanted: Sequence[str], settings: Settings, samples: int, eigenvalues: int) -> float:
    """Return about how many gradient evaluations a table takes.

    Args:
        wanted: names of measures.
        settings: how much of each.
        samples: of this process.
        eigenvalues: how many are wanted.

    Returns:
        Their number: a product with the Hessian counts as two, and a top five usually takes twenty.
    """
    one = 4 / 3  # a step: a gradient, and the loss where it leads
    total = 1.0
    for ball in WORST:
        total += one * (f"one_step{ball}" in wanted) + one * (settings.steps - 1) * (f"n_steps{ball}" in wanted)
    total += sum(name in AVERAGE for name in wanted) * settings.draws / 3
    if "m_sharpness" in wanted:
        for m in settings.m:
            all_of_them = samples / m
            total += one * min(1.0, (settings.micro_batches or all_of_them) / all_of_them)
    if eigenvalues and ("lambda_max" in wanted or "lambda_ratio" in wanted):
        total += 2 * max(20, 4 * eigenvalues) + 6
    return total + 62 * ("trace" in wanted)
