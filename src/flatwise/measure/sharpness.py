"""How sharp is this minimum? One call, one table: worst cases, averages, m-sharpness and curvature, with errors.

Each row answers another question about the same loss at the same weights on the same samples; none of them is *the*
sharpness. What a row shares with another, such as the gradient at w, is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.ascent import Ball
from flatwise.errors import UnknownNameError, UserError
from flatwise.measure.average import noise_scale, under_noise
from flatwise.measure.cautions import cautions
from flatwise.measure.micro import gaps, micro_batches, spread_out
from flatwise.measure.problem import LossFn, Mode, Problem
from flatwise.measure.progress import Bar
from flatwise.measure.result import Cost
from flatwise.measure.rows import Row, Sharpness
from flatwise.measure.select import Parameters
from flatwise.measure.spread import Estimate, over_clusters, over_draws_and_parts, over_parts
from flatwise.measure.worst import climb

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


class Measuring:
    """The rows as they come: what they share, and what each of them cost."""

    def __init__(self, problem: Problem, settings: Settings, micro_batch_size: int | None, bar: Bar) -> None:
        self.problem, self.settings, self._size, self._bar = problem, settings, micro_batch_size, bar
        self.rows: list[Row] = []
        self.cautions: list[str] = []
        self._gradient: Tensor | None = None
        self.base = problem.losses()
        estimate = over_parts(problem, self.base)
        self.loss = estimate.value
        self.add("loss", estimate, {}, "The loss at the weights as they are.")

    def add(self, name: str, estimate: Estimate, settings: dict[str, Any], meaning: str, *costs: Cost) -> None:
        """Add a row, which cost what was spent since the last one.

        Args:
            name: of the row.
            estimate: its value.
            settings: what it depends on.
            meaning: a sentence.
            *costs: of this row, where they are known already.
        """
        costs = costs or (self.problem.cost(),)
        spent, seconds = sum(c.gradient_evaluations for c in costs), sum(c.seconds for c in costs)
        value, error, over = estimate.value, estimate.standard_error, estimate.over
        self.rows.append(Row(name, value, error, over, settings, spent, seconds, meaning))

    def gradient(self) -> Tensor:
        """Return the gradient at w; a row of its own says its norm, and what it cost.

        Returns:
            Shape (weights,).
        """
        if self._gradient is None:
            _, self._gradient = self.problem.gradient()
            norm = float(torch.linalg.vector_norm(self._gradient, dtype=torch.float64))
            meaning = "How steep the loss is at w (L2 norm of its gradient); at a minimum it is 0."
            self.add("gradient_norm", Estimate(norm, None, ""), {}, meaning)
        return self._gradient

    def worst(self, suffix: str, wanted: Sequence[str]) -> None:
        """Add the worst cases of one ball.

        Args:
            suffix: of the names of its rows.
            wanted: names of rows.
        """
        one, several = f"one_step{suffix}" in wanted, f"n_steps{suffix}" in wanted
        if not (one or several):
            return
        p, adaptive = WORST[suffix]
        ball, rho = self.settings.ball(p, adaptive)
        steps = self.settings.steps if several else 1
        found = climb(self.problem, ball, rho, steps, self.gradient(), self.base, self._bar.advance)
        place = _described(p, adaptive, rho)
        settings: dict[str, Any] = {"rho": rho, "p": p} | ({"adaptive": True, "eta": ball.eta} if adaptive else {})
        if one:
            self.add(
                f"one_step{suffix}",
                over_parts(self.problem, found[0].losses - self.base),
                settings | {"steps": 1},
                f"How much the loss rises by SAM's own step uphill {place}.",
                found[0].cost,
            )
        if several:
            self.add(
                f"n_steps{suffix}",
                over_parts(self.problem, found[-1].losses - self.base),
                settings | {"steps": steps, "highest_after": found[-1].steps},
                f"How much the loss rises at the highest point that {steps} steps uphill found {place}.",
                *(entry.cost for entry in (found[-1:] if one else found)),
            )

    def average(self, name: str) -> None:
        """Add an average case.

        Args:
            name: of the row.
        """
        ball, rho = self.settings.ball(2.0, AVERAGE[name])
        pairs = (self.settings.draws + 1) // 2
        scale = noise_scale(self.problem, ball, rho)
        losses = under_noise(self.problem, ball, scale, pairs, self._bar.advance)
        estimate, draws, parts = over_draws_and_parts(self.problem, losses - self.base, "pairs of draws")
        settings: dict[str, Any] = {"rho": rho, "sigma": scale, "draws": 2 * pairs}
        if ball.adaptive:
            settings |= {"adaptive": True, "eta": ball.eta}
        settings |= {"error_of_draws": draws, "error_of_parts": parts}
        how = " in proportion to each weight's size," if ball.adaptive else ""
        meaning = f"How much the loss rises on average under Gaussian noise{how} of root mean square length {rho:g}."
        self.add(name, estimate, settings, meaning)

    def m_sharpness(self, m: int) -> None:
        """Add the m-sharpness of one m.

        Args:
            m: how many samples share a perturbation.
        """
        ball, rho = self.settings.ball(2.0, False)
        everything = micro_batches(self.problem, m, self._size)
        entries = spread_out(everything, self.settings.micro_batches)
        rises = gaps(self.problem, ball, rho, entries, self._bar.advance)
        sizes = torch.tensor([entry.samples for entry in entries])
        estimate = over_clusters(self.problem, rises, sizes, "micro-batches")
        settings = {"rho": rho, "p": 2.0, "m": m, "steps": 1, "micro_batches": f"{len(entries)} of {len(everything)}"}
        samples = (
            "each sample is given the step uphill that is worst for it"
            if m == 1
            else f"each {m} samples are given the step uphill that is worst for them"
        )
        meaning = f"How much the loss rises when {samples} alone."
        self.add(f"m_sharpness_{m}", estimate, settings, meaning)

    def all_m(self) -> None:
        """Add the m-sharpness of every m that the samples allow."""
        try:
            for m in self.settings.m:
                if m <= self.problem.samples:
                    self.m_sharpness(m)
                else:
                    self.cautions.append(
                        f"m-sharpness for m={m} was left out: there are {self.problem.samples} samples"
                    )
        except ValueError as error:
            self.cautions.append(f"m-sharpness was left out: {error}")

    def result(self) -> Sharpness:
        """Return the table.

        Returns:
            All rows, with what to be careful about.
        """
        rows, problem = tuple(self.rows), self.problem
        cost = Cost(sum(row.gradient_evaluations for row in rows), sum(row.seconds for row in rows))
        sentences = (*cautions(rows, problem), *self.cautions)
        return Sharpness(rows, self.loss, sentences, problem.conditions(), cost)


def _described(p: float, adaptive: bool, rho: float) -> str:
    if math.isinf(p):
        return f"while each weight moves by at most {f'{rho:g} of itself' if adaptive else f'{rho:g}'}"
    return (
        f"while the {'relative moves' if adaptive else 'moves'} of all weights together are at most {rho:g} (L2 norm)"
    )


def sharpness(
    model: Module,
    loss_fn: LossFn,
    data: Any,
    *,
    measures: str | Sequence[str] | None = None,
    rho: float = 0.05,
    adaptive_rho: float = 0.5,
    rho_inf: float = 0.001,
    adaptive_rho_inf: float = 0.01,
    eta: float = 0.0,
    steps: int = 5,
    draws: int = 20,
    m: Sequence[int] = (1, 16, 128),
    micro_batches: int | None = 128,
    parameters: Parameters = None,
    mode: Mode = "eval",
    micro_batch_size: int | None = None,
    seed: int = 0,
    process_group: Any = None,
    progress: bool = True,
) -> Sharpness:
    """Measure how sharp a minimum is, by several measures at once.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch as one number.
        data: one batch, or an iterable of batches, read once.
        measures: names of measures, or of groups of them (``"worst"``, ``"averages"``, ``"curvature"``,
            ``"first_order"``); None: all.
        rho: radius of the plain L2 ball; also the size of the plain noise, and the radius for m-sharpness.
        adaptive_rho: radius of the adaptive L2 ball (T = |w| + eta); also the size of the adaptive noise.
        rho_inf: radius of the plain L-infinity ball.
        adaptive_rho_inf: radius of the adaptive L-infinity ball: the largest relative change of a weight.
        eta: offset in T. At 0 the adaptive measures do not change under rescaling of a network.
        steps: of the ascent of the rows ``n_steps``.
        draws: of noise for the averages, in antithetic pairs; an odd number is rounded up.
        m: sizes of micro-batches for m-sharpness.
        micro_batches: at most so many micro-batches for each m and process, evenly spaced; None: all.
        parameters: which parameters are moved: a regular expression, a module, names, tensors or a rule; None: all.
        mode: ``"eval"``, ``"train"`` or ``"as is"``.
        micro_batch_size: evaluate at most so many samples at once; None: a batch at once. The parts so made are what
            standard errors are over.
        seed: of the noise, and of what the loss draws.
        process_group: processes that each bring their own share of the data.
        progress: show a bar where it takes long.

    Returns:
        The rows, with what they cost and what to be careful about.
    """
    wanted = chosen(measures)
    settings = Settings(
        rho, adaptive_rho, rho_inf, adaptive_rho_inf, eta, steps, draws, tuple(dict.fromkeys(m)), micro_batches
    )
    problem = Problem(
        model,
        loss_fn,
        data,
        parameters=parameters,
        mode=mode,
        micro_batch_size=micro_batch_size,
        seed=seed,
        process_group=process_group,
    )
    total = sum(
        {"one_step": 1, "n_steps": steps, "average": draws / 2}.get(name.split("_adap")[0], 1) for name in wanted
    )
    with problem.open(), Bar("sharpness", total, shown=progress) as bar:
        measuring = Measuring(problem, settings, micro_batch_size, bar)
        if "gradient_norm" in wanted:
            measuring.gradient()
        for ball in WORST:
            measuring.worst(ball, wanted)
        for name in AVERAGE:
            if name in wanted:
                measuring.average(name)
        if "m_sharpness" in wanted:
            measuring.all_m()
    return measuring.result()
