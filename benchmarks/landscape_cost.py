"""What a point of a landscape costs, and a plane beside the package loss-landscapes.

    python benchmarks/landscape_cost.py             # everything, about a minute on one core
    python benchmarks/landscape_cost.py --rounds 1  # quickly, and less certain

A point is compared with one forward pass over the same samples in inference mode: both are timed in turns, and the
median of the ratios is printed. A plane of 25 x 25 points is compared with ``random_plane`` of loss-landscapes 3 (PyPI)
on the same network and samples, measured in full (``refine=False``) and refined.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flatwise.measure import landscape
from flatwise.measure.directions import normalised, random_direction
from flatwise.measure.problem import Problem
from flatwise.measure.sheet import Sheet

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss."""
    return cross_entropy(model(batch[0]), batch[1])


def small_cnn() -> nn.Module:
    """Make a network of about 20 thousand weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 16, 28),
        nn.ReLU(),
        nn.Linear(28, 10),
    )


def wide_mlp() -> nn.Module:
    """Make a network of 1.3 million weights, for which moving them costs most beside the forward pass."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def point_ratio(model: nn.Module, batch: Batch, rounds: int) -> float:
    """Compare a point with a forward pass."""
    problem = Problem(model, loss_fn, batch)
    vectors = [problem.flat(normalised(random_direction(problem, n, 0), problem.params)) for n in (0, 1)]

    def forward() -> float:
        with torch.inference_mode():
            return float(loss_fn(model, batch))

    model.eval()
    with Sheet(problem, vectors, "frozen") as sheet:
        pairs = [(timed(lambda: sheet.loss_at((0.3, -0.2))), timed(forward)) for _ in range(12 * rounds)]
    return statistics.median(ours / theirs for ours, theirs in pairs[2:])


def planes(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Time the planes of 25 x 25 points."""
    import loss_landscapes
    from loss_landscapes.metrics import Loss

    metric = Loss(cross_entropy, *batch)
    return {
        "loss-landscapes": timed(
            lambda: loss_landscapes.random_plane(model, metric, 1, 25, "filter", deepcopy_model=True)
        ),
        "flatwise, every point": timed(lambda: landscape(model, loss_fn, batch, refine=False, progress=False)),
        "flatwise, refined": timed(lambda: landscape(model, loss_fn, batch, progress=False)),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(0)
    batch = (torch.randn(512, 1, 16, 16, generator=draws), torch.randint(10, (512,), generator=draws))
    for name, make in (("small CNN", small_cnn), ("wide MLP", wide_mlp)):
        model = make()
        count = sum(p.numel() for p in model.parameters())
        ratio = point_ratio(model, batch, rounds)
        print(f"{name}, {count} weights, 512 samples: a point is {ratio:.2f} forward passes")
    seconds = planes(small_cnn(), batch)
    theirs = seconds["loss-landscapes"]
    for name, value in seconds.items():
        print(f"plane of 25 x 25, {name}: {value:.1f} s, {value / theirs:.2f} of loss-landscapes")


if __name__ == "__main__":
    main()
