"""Every method of the registry and every option of it, with the oracle that it stands beside."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.family_cases import ranks
from tests.family_paths import Path, Rule, run_fast, run_oracle
from tests.family_world import DECAY, LR, STEPS

from flatwise import AutoRadius, variant_info
from oracles import family_ascent as ascent
from oracles import family_batching as batching
from oracles import family_descent as descent
from oracles import family_radius as radius_rule
from oracles import family_schedule as schedule

DEFAULT = "default"
"""Instead of a radius: that of the registry, which is then not given."""
Radius = float | str


@dataclass(frozen=True)
class Case:
    """A method with options, and what both are to its oracle."""

    name: str
    oracle: Callable[..., Rule]
    radii: tuple[Radius, ...]
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    before: Callable[[], Callable[[int, Any], None]] | None = None
    """Makes what sets the learning rate before each step, where the method looks at it."""


def same(name: str, oracle: Callable[..., Rule], radii: tuple[Radius, ...], **options: Any) -> Case:
    """A case whose options have the same names in the oracle."""
    return Case(name, oracle, radii, options, options)


def cosine(t: int) -> float:
    """A learning rate that falls from LR to LR / 10."""
    return LR / 10 + (LR - LR / 10) * (1 + math.cos(math.pi * t / STEPS)) / 2


class Cosine:
    """torch's scheduler of the same, on the wrapper; steps before every step but the first."""

    def __call__(self, step: int, opt: Any) -> None:
        if step == 0:
            self._it = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS, eta_min=LR / 10)
        else:
            self._it.step()


def line(t: int) -> float:
    """A learning rate that falls from LR to LR / 2."""
    return LR * (1 - t / (2 * STEPS))


class Line:
    """The same, set in the group."""

    def __call__(self, step: int, opt: Any) -> None:
        opt.param_groups[0]["lr"] = line(step)


MODEL = {"model": True}
MIDDLE = {"start": 0.1, "stop": 0.58, "total": STEPS}
OTHERS = {"delta": 0.5, "lambda_1": -0.5, "lambda_2": 0.3}
BSAM = {"N": 600, "lr": LR, "beta1": 0.9, "beta2": 0.999, "delta": DECAY, "gamma": 0.1, "s_0": 1.0}

ASCENTS = {
    "sam": Case("sam", ascent.sam, (DEFAULT, 0.1)),
    "usam": Case("usam", ascent.usam, (DEFAULT, 0.2)),
    "lp, 1": same("lp", ascent.lp, (DEFAULT, 0.1), p=1),
    "lp, 1.5": same("lp", ascent.lp, (DEFAULT, 0.1), p=1.5),
    "lp, inf": same("lp", ascent.lp, (DEFAULT, 0.01, 0.02), p=math.inf),
    "asam": Case("asam", ascent.asam, (DEFAULT, 0.5)),
    "asam, weights": Case("asam", ascent.asam, (DEFAULT, 0.5), {"scaled": "weights", **MODEL}, {"scaled": "weights"}),
    "sam-on": Case("sam-on", ascent.sam_on, (DEFAULT, 0.5), MODEL),
    "sam-on, adaptive": Case(
        "sam-on", ascent.sam_on, (DEFAULT, 0.5), {"adaptive": True, "eta": 0.01, **MODEL}, {"adaptive": True}
    ),
    "layerwise": Case("layerwise", ascent.layerwise, (DEFAULT, 0.05)),
    "filterwise": Case("filterwise", ascent.filterwise, (DEFAULT, 0.1)),
    "filterwise, eta": same("filterwise", ascent.filterwise, (DEFAULT, 0.1), eta=0.3),
    "fisher": Case("fisher", ascent.fisher, (DEFAULT, 0.1)),
    "fisher, eta": same("fisher", ascent.fisher, (DEFAULT, 0.1), eta=50.0),
    "vasso": Case("vasso", ascent.vasso, (DEFAULT, 0.2)),
    "vasso, 0.4": same("vasso", ascent.vasso, (DEFAULT, 0.2), theta=0.4),
    "fsam": Case("fsam", ascent.fsam, (DEFAULT, 0.2)),
    "fsam, script": same("fsam", ascent.fsam, (DEFAULT, 0.2), sigma=0.7, lmbda=0.6),
    "multi-step": Case("multi-step", ascent.multi_step, (DEFAULT, 0.1)),
    "multi-step, 4": Case("multi-step", ascent.multi_step, (DEFAULT, 0.1), {"ascent_steps": 4}, {"n": 4}),
    # Not with its radius of 3, which is as long as all weights here: rounding errors grow to 1e-10 in 50 steps.
    "msam": Case("msam", ascent.msam, (0.3,)),
    "msam, norm layers": Case("msam", ascent.msam, (DEFAULT, 0.3), {"only": "norm", **MODEL}, {"only_norm": True}),
    "adaptive-msam": Case("adaptive-msam", ascent.msam, (DEFAULT, 0.3), {}, {"adaptive": True}),
    "frugal": Case("frugal", radius_rule.frugal, (DEFAULT,)),
    # One look at the beginning, then soon the exponents of later; the radii are far from what is aimed at.
    "frugal, settled": Case(
        "frugal",
        radius_rule.frugal,
        (DEFAULT,),
        {"rho": AutoRadius(every=3, start=0.05, turn=0.8, down=0.3, memory=0.5), "total_steps": STEPS},
        {"first_looks": 1, "every": 3, "turn": 0.8, "down": 0.3, "memory": 0.5},
    ),
    "frugal, no drag": Case(
        "frugal",
        radius_rule.frugal,
        (DEFAULT,),
        {"rho": AutoRadius(drag=2.0, rise=0.1, every=5), "total_steps": STEPS},
        {"first_looks": 1, "every": 5, "drag": 2.0, "rise": 0.1},
    ),
    "sam, auto": Case("sam", radius_rule.sam, (DEFAULT,), {"rho": "auto"}),
    "sam, auto, no drag": Case(
        "sam",
        radius_rule.sam,
        (DEFAULT,),
        {"rho": AutoRadius(drag=2.0, rise=0.02, up=0.7)},
        {"drag": 2.0, "rise": 0.02, "up": 0.7},
    ),
    "stale": Case("stale", ascent.stale, (DEFAULT, 0.1)),
    "random": Case("random", ascent.random, (DEFAULT, 0.05)),
    "random, seed": same("random", ascent.random, (DEFAULT, 0.05), noise_seed=7),
    "random, plain": same("random", ascent.random, (DEFAULT, 0.02), filter_scaled=False),
}
DESCENTS = {
    "pgn": Case("pgn", descent.pgn, (DEFAULT, 0.1), {}, {"alpha": 0.8}),
    "pgn, beyond": same("pgn", descent.pgn, (DEFAULT, 0.1), alpha=1.7),
    "wsam": Case("wsam", descent.wsam, (DEFAULT, 0.05), {}, {"gamma": 0.9, "decoupled": True}),
    "wsam, 0.8": Case("wsam", descent.wsam, (DEFAULT, 0.1), {"gamma": 0.8}, {"gamma": 0.8, "decoupled": True}),
    "wsam, coupled": same("wsam", descent.wsam, (DEFAULT, 0.05), gamma=0.7, decoupled=False),
    "wsam, coupled, 0.8": same("wsam", descent.wsam, (DEFAULT, 0.05), gamma=0.8, decoupled=False),
    "stable": Case("stable", descent.stable, (DEFAULT, 0.2)),
    "gsam": Case(
        "gsam", descent.gsam, (DEFAULT, 0.3), {}, {"alpha": 0.6, "rho_min": 0.1, "lr_of": cosine, "lr_max": LR}, Cosine
    ),
    "gsam, line": Case(
        "gsam", descent.gsam, (DEFAULT, 0.3), {}, {"alpha": 0.6, "rho_min": 0.1, "lr_of": line, "lr_max": LR}, Line
    ),
    "gsam, given": Case(
        "gsam",
        descent.gsam,
        (DEFAULT, 0.3),
        {"alpha": 0.4, "rho_min": 0.02, "lr_max": 2 * LR, "lr_min": LR / 10},
        {"alpha": 0.4, "rho_min": 0.02, "lr_of": cosine, "lr_max": 2 * LR, "lr_min": LR / 10},
        Cosine,
    ),
    "second-order": Case("second-order", descent.second_order, (DEFAULT, 0.1)),
    "functional": Case("functional", descent.functional, (DEFAULT, 0.2), MODEL),
    "looksam": Case("looksam", descent.looksam, (DEFAULT, 0.1), {}, {"k": 5, "alpha": 0.1}),
    "looksam, 3": Case("looksam", descent.looksam, (DEFAULT, 0.1), {"every": 3, "alpha": 0.7}, {"k": 3, "alpha": 0.7}),
    "looksam, less": Case(
        "looksam", descent.looksam, (DEFAULT, 0.1), {"every": 3, "alpha": 0.3}, {"k": 3, "alpha": 0.3}
    ),
    "bsam": Case(
        "bsam",
        descent.bsam,
        (DEFAULT, 0.05),
        {"train_size": 600},
        {**BSAM, "draw": lambda L: ascent.standard_normal(L, 0)},
    ),
}
SCHEDULES = {
    "every-k": Case("every-k", schedule.every_k, (DEFAULT, 0.2), {}, {"k": 5}),
    "every-k, 3": Case("every-k", schedule.every_k, (DEFAULT, 0.2), {"every": 3}, {"k": 3}),
    "late": Case(
        "late",
        schedule.window,
        (DEFAULT, 0.2),
        {"total_steps": STEPS},
        {"start": 0.9, "stop": 1.0, "total": STEPS},
    ),
    "late, middle": Case(
        "late", schedule.window, (DEFAULT, 0.2), {"total_steps": STEPS, "window": (0.1, 0.58)}, MIDDLE
    ),
    "warmup-off": Case("warmup-off", schedule.warmup_off, (DEFAULT, 0.2), {"warmup_steps": 7}, {"warmup": 7}),
    "bernoulli": Case("bernoulli", schedule.bernoulli, (DEFAULT, 0.2), {}, {"probability": 0.5}),
    "bernoulli, seed": same("bernoulli", schedule.bernoulli, (DEFAULT, 0.2), probability=0.2, seed=3),
    "ae-sam": Case("ae-sam", schedule.ae_sam, (DEFAULT, 0.2), {"total_steps": STEPS}, {"total": STEPS}),
    "ae-sam, others": Case(
        "ae-sam", schedule.ae_sam, (DEFAULT, 0.2), {"total_steps": 2 * STEPS, **OTHERS}, {"total": 2 * STEPS, **OTHERS}
    ),
}
BATCHINGS = {
    "m-sam": Case("m-sam", batching.m_sam, (DEFAULT, 0.2), {"micro_batch_size": 4}, {"m": 4}),
    "m-sam, a smaller last part": Case("m-sam", batching.m_sam, (DEFAULT, 0.2), {"micro_batch_size": 5}, {"m": 5}),
    "quarter": Case("quarter", batching.sub_batch, (DEFAULT, 0.2), {}, {"count": 3}),
    "quarter, 0.6": Case("quarter", batching.sub_batch, (DEFAULT, 0.2), {"ascent_fraction": 0.6}, {"count": 8}),
    "k-sam": Case("k-sam", batching.k_sam, (DEFAULT, 0.2), {}, {"count": 6}),
    "k-sam, 0.3": Case("k-sam", batching.k_sam, (DEFAULT, 0.2), {"top_fraction": 0.3}, {"count": 4}),
    "esam-sds": Case("esam-sds", batching.esam_sds, (DEFAULT, 0.2), {}, {"count": 6}),
    "esam-sds, 0.7": Case("esam-sds", batching.esam_sds, (DEFAULT, 0.2), {"rising_fraction": 0.7}, {"count": 9}),
}
CASES = {**ASCENTS, **DESCENTS, **SCHEDULES, **BATCHINGS}


def fast(case: str, base: str = "sgd", rho: Radius | None = None, **loop: Any) -> Path:
    """Train with flatwise; unless told, with the last radius of the case."""
    row = CASES[case]
    rho = rho or row.radii[-1]
    options = row.options if rho == DEFAULT else {"rho": rho, **row.options}
    reduction = "none" if ranks(row.name) else "mean"
    return run_fast(row.name, options, base, reduction=reduction, before=row.before and row.before(), **loop)


def oracle(case: str, base: str = "sgd", rho: Radius | None = None, *, factor: float = 1.0, **loop: Any) -> Path:
    """Train with the oracle, with a radius that is ``factor`` times as large."""
    row = CASES[case]
    rho = rho or row.radii[-1]
    radius = factor * float(variant_info(row.name).rho if rho == DEFAULT else rho)
    return run_oracle(lambda: row.oracle(radius, **row.settings), base, **loop)
