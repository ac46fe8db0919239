"""Two loops that run side by side: flatwise's and an oracle's, each of which returns the path that it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tests.family_world import (
    DECAY,
    LR,
    SGD,
    STEPS,
    AdamW,
    Batch,
    Problem,
    base_of,
    batches,
    flat,
    network,
    reseed,
)
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise

__all__ = [
    "DECAY", "LR", "Path", "Problem", "Rule", "base_of", "batches", "flat", "network", "reseed", "run_fast",
    "run_oracle",
]  # fmt: skip


@dataclass
class Path:
    """The weights and the buffers after every step, each one vector."""

    weights: list[Tensor]
    buffers: list[Tensor]

    def assert_close(self, expected: Path, tolerance: float = 1e-10, *, buffers: bool = True) -> None:
        pairs = [("weights", self.weights, expected.weights), ("buffers", self.buffers, expected.buffers)]
        for what, ours, theirs in pairs if buffers else pairs[:1]:
            for step, (got, want) in enumerate(zip(ours, theirs, strict=True)):
                assert torch.isfinite(want).all(), f"the oracle's {what} of step {step}"
                off = (got - want).abs().max() if want.numel() else 0.0
                assert off <= tolerance, f"{what} of step {step} are off by {float(off):.1e}"  # false for NaN

    def assert_equal(self, expected: Path) -> None:
        """Bit for bit."""
        for what in ("weights", "buffers"):
            for step, (got, want) in enumerate(zip(getattr(self, what), getattr(expected, what), strict=True)):
                assert torch.equal(got, want), f"{what} of step {step} are off by {float((got - want).abs().max()):.1e}"


def run_fast(
    name: str,
    options: dict[str, Any],
    base: str = "sgd",
    steps: int = STEPS,
    *,
    data: Sequence[Batch] | None = None,
    make: Callable[[], nn.Module] = network,
    reduction: str = "mean",
    before: Callable[[int, Any], None] | None = None,
) -> Path:
    """Train with ``flatwise.create``.

    ``model=True`` among the options stands for the model that is trained. ``reduction="none"`` is for methods that ask
    for one loss of each sample. ``before(step, opt)`` runs before each step (to set a learning rate).
    """
    model = make()
    if options.get("model") is True:
        options = {**options, "model": model}
    opt = flatwise.create(name, base_of(base, model.parameters()), **options)
    path = Path([], [])
    for step, batch in enumerate(data or batches(steps)):
        if before:
            before(step, opt)
        reseed(step)
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1], reduction=reduction), batch)
        path.weights.append(flat(model))
        path.buffers.append(flat(model.buffers()))
    return path


Rule = Callable[[Tensor, Problem, Any], Tensor]
"""``rule(w, problem, base)`` returns the next weights: it asks ``problem.gradient`` and calls ``base.step``."""


def oracle_steps(
    rule: Rule, base: str, data: Sequence[Batch], make: Callable[[], nn.Module], skip: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    problem = Problem(data, make)
    optimizer, w = {"sgd": SGD, "adamw": AdamW}[base](), problem.start()
    for step in range(len(data)):
        problem.begin(step)
        if step not in skip:
            w = rule(w, problem, optimizer)
        yield w, problem.buffers()


def run_oracle(
    make_rule: Callable[[], Rule],
    base: str = "sgd",
    steps: int = STEPS,
    *,
    data: Sequence[Batch] | None = None,
    make: Callable[[], nn.Module] = network,
    skip: Sequence[int] = (),
) -> Path:
    """Train with an oracle. The steps in ``skip`` did not happen."""
    pairs = list(oracle_steps(make_rule(), base, data or batches(steps), make, skip))
    return Path([w for w, _ in pairs], [b for _, b in pairs])
