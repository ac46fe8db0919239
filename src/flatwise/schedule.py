"""When to look, and how far (the ``schedule`` slot).

A step that is not active is the base optimizer's own step: one gradient, no perturbation.
"""

from __future__ import annotations

import math
import random
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


def step_seed(seed: int, step: int) -> int:
    """Return the seed of one step's draws: a function of seed and step, so that ranks and resumed runs agree.

    Args:
        seed: of the training.
        step: index of the step. Consecutive seeds give unrelated streams; the factor keeps the steps of two apart.

    Returns:
        The seed.
    """
    return seed * 1_000_003 + step


class StepNoise:
    """Draws the noise of one step from generators of its own, one on each device.

    Args:
        seed: of the training.
        step: index of the step.
        part: index of the micro-batch, each of which has noise of its own.
        place: which part of tensors that are cut over processes is here.
    """

    def __init__(self, seed: int, step: int, part: int = 0, place: int = 0) -> None:
        first = step_seed(seed, step)
        if part:
            first = step_seed(first, part)
        self._seed = (step_seed(first, -place) if place else first) % 2**63
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator of a device, which goes on from its last draw."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


@dataclass(frozen=True)
class Schedule:
    """Active every ``every``-th step inside a window of training, after the warm-up.

    Attributes:
        every: 1 is every step, k is steps 0, k, 2k, ... (periodic SAM; cost 1 + 1/k gradients a step).
        window: start and stop as fractions of ``total_steps``, 0 <= start < stop <= 1. ``(0.9, 1.0)`` is the last
            tenth (late-phase SAM; Zhou et al., ICLR 2025). A stop of 1.0 has no end.
        total_steps: planned number of steps; needed where ``window`` is not the whole of training.
        warmup_steps: steps at the start without perturbation. Adaptive optimizers want none during the warm-up of
            the learning rate (Zhao et al., ICML 2024).
        probability: of a perturbation in a step that is active otherwise (SS-SAM; Zhao et al., arXiv 2203.09962). The
            draw is a function of ``seed`` and the step: the same on every rank and after resuming.
        seed: of these draws.
        rho_min: tie the radius to the learning rate (GSAM; Zhuang et al., ICLR 2022):
            ``rho_min + (rho - rho_min) (lr - lr_min) / (lr_max - lr_min)``, where rho is the radius given. Each group
            keeps that one as ``sam_rho_max``, and shows the current one as ``rho``.
        lr_max: learning rate at which the radius is rho; by default the one that a group starts with.
        lr_min: learning rate at which it is ``rho_min``.
    """

    every: int = 1
    window: tuple[float, float] = (0.0, 1.0)
    total_steps: int | None = None
    warmup_steps: int = 0
    probability: float = 1.0
    seed: int = 0
    rho_min: float | None = None
    lr_max: float | None = None
    lr_min: float = 0.0
    needs_norm: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: if one is out of its range, or ``total_steps`` is missing.
        """
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be a whole number >= 1, got {self.every!r}")
        try:
            start, stop = self.window
        except (TypeError, ValueError):
            raise ValueError(f"window must be a pair (start, stop) of fractions, got {self.window!r}") from None
        if not 0 <= start < stop <= 1:
            raise ValueError(f"window must satisfy 0 <= start < stop <= 1 (fractions of training), got {self.window!r}")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {self.total_steps!r}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {self.warmup_steps!r}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability!r}")
        if self.rho_min is not None and not (math.isfinite(self.rho_min) and self.rho_min >= 0):
            raise ValueError(f"rho_min must be a finite number >= 0, got {self.rho_min!r}")
        if self.lr_min < 0 or (self.lr_max is not None and self.lr_max <= self.lr_min):
            raise ValueError(f"0 <= lr_min < lr_max must hold, got lr_min={self.lr_min!r}, lr_max={self.lr_max!r}")
        if (start, stop) != (0, 1) and self.total_steps is None:
            raise ValueError(
                f"window={self.window!r} is a fraction of training, so flatwise must know its length: "
                "pass total_steps=epochs * len(loader)"
            )

    def active(self, step: int) -> bool:
        """Tell whether step ``step`` (0, 1, 2, ...) looks around.

        Args:
            step: steps taken before this one.

        Returns:
            True where the step perturbs.
        """
        if step % self.every or not self.in_phase(step):
            return False
        return self.probability == 1 or random.Random(step_seed(self.seed, step)).random() < self.probability

    def in_phase(self, step: int) -> bool:
        """Tell whether step ``step`` lies after the warm-up and inside the window, active or not.

        Args:
            step: steps taken before this one.

        Returns:
            True where steps around it perturb.
        """
        if step < self.warmup_steps:
            return False
        start, stop = self.window
        if (start, stop) == (0, 1) or self.total_steps is None:
            return True
        first, end = (round(share * self.total_steps, 6) for share in (start, stop))  # 0.55 * 100 is not 55
        return step >= first and (stop == 1 or step < end)

    def tie_radius(self, group: dict[str, Any], key: str) -> None:
        """Set a group's radius from its learning rate, where ``rho_min`` asks for it.

        Args:
            group: a parameter group.
            key: name of the radius in it.
        """
        if self.rho_min is None:
            return
        rho_max = group.setdefault("sam_rho_max", group[key])
        lr_max = group.setdefault("sam_lr_max", self.lr_max or group.get("initial_lr", group["lr"]))
        share = (float(group["lr"]) - self.lr_min) / (float(lr_max) - self.lr_min)
        # In this order rho_min = rho, and lr = lr_max, give rho itself, bit for bit.
        group[key] = rho_max if share == 1 else max(0.0, self.rho_min + (rho_max - self.rho_min) * share)

    def accepts(self, squared_norm: float, step: int, group: MutableMapping[str, Any]) -> bool:
        """Decide after the first pass, where ``needs_norm``.

        Args:
            squared_norm: of the gradient at w, over all parameters.
            step: steps taken before this one.
            group: the first parameter group, which keeps what must be remembered.

        Returns:
            True where the step perturbs.
        """
        return True


@dataclass(frozen=True)
class AdaptiveSchedule(Schedule):
    """Perturb where the gradient is larger than usual: AE-SAM (Jiang et al., ICLR 2023).

    With ``mu <- delta mu + (1 - delta) ||g||^2`` and ``var <- delta var + (1 - delta) (||g||^2 - mu)^2``, from 0, a
    step perturbs iff ``||g||^2 >= mu + c sqrt(var)``, where ``c = (t/T) lambda_1 + (1 - t/T) lambda_2`` falls over
    training.
    The decision reads one number from the device in each step.

    Attributes:
        delta: decay of the statistics.
        lambda_1: c at the end.
        lambda_2: c at the start.
    """

    delta: float = 0.9
    lambda_1: float = -1.0
    lambda_2: float = 1.0
    needs_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: if one is out of its range, or ``total_steps`` is missing.
        """
        super().__post_init__()
        if self.total_steps is None:
            raise ValueError("the threshold falls over training, so flatwise must know its length: pass total_steps=")
        if not 0 <= self.delta < 1:
            raise ValueError(f"delta must be in [0, 1), got {self.delta!r}")

    def accepts(self, squared_norm: float, step: int, group: MutableMapping[str, Any]) -> bool:  # noqa: D102
        if not math.isfinite(squared_norm) or self.total_steps is None:
            return False
        mean = self.delta * float(group.get("sam_mean", 0.0)) + (1 - self.delta) * squared_norm
        deviation = (squared_norm - mean) ** 2
        variance = self.delta * float(group.get("sam_variance", 0.0)) + (1 - self.delta) * deviation
        group["sam_mean"], group["sam_variance"] = mean, variance
        done = min(1.0, step / self.total_steps)
        threshold = mean + (done * self.lambda_1 + (1 - done) * self.lambda_2) * math.sqrt(variance)
        return squared_norm >= threshold
