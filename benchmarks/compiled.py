"""Does ``torch.compile`` move weights faster than the calls that flatwise makes?

    python benchmarks/compiled.py --out record.json     # --models mlp deep resnet18

Two parts of a step, each as flatwise writes it (a foreach call, a norm of packed tensors) and as one compiled function:
the copy with the move to ``w + c g``, which a compiler can fuse into one reading of w, and the norm of the gradients.
Best of several turns, on one thread; memory for the copies is what the allocator hands out, as in a step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from family_cost import seconds
from flatwise.norms import joint_norm
from step_cost_models import MODELS, make_task

TURNS = 15
SECONDS = 0.1
"""About how long a turn lasts."""


def move(weights: Sequence[Tensor], grads: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Copy and move, to be compiled; a number would be compiled into it, so the factor is a tensor."""
    copies = [w.clone() for w in weights]
    for w, g in zip(weights, grads, strict=True):
        w.add_(g * factor)
    return copies


def norm(grads: Sequence[Tensor]) -> Tensor:
    """Take the norm, to be compiled."""
    return torch.stack([g.square().sum() for g in grads]).sum().sqrt()


def move_eagerly(weights: list[Tensor], grads: list[Tensor], factor: float) -> list[Tensor]:
    """Copy and move as :class:`flatwise.weights.Displacement` does."""
    copies = list(torch._foreach_clone(weights))
    torch._foreach_add_(weights, grads, alpha=factor)
    return copies


def best(work: Callable[[], Any]) -> float:
    """Return the processor seconds of a call, in the best of several turns."""
    work()
    times = max(1, round(SECONDS / max(seconds(work, 1), 1e-6)))
    return min(seconds(work, times) for _ in range(TURNS))


@torch.no_grad()
def measure(name: str) -> dict[str, float]:
    """Measure both parts on the tensors of one model.

    Args:
        name: a key of ``MODELS``.

    Returns:
        Microseconds of each, eager and compiled, and the seconds that compiling takes.
    """
    weights = [p.detach() for p in make_task(name).params]
    grads = [1e-3 * torch.randn_like(w) for w in weights]
    moved = torch.compile(move, fullgraph=True)
    normed = torch.compile(norm, fullgraph=True)
    small, begun = torch.tensor(1e-9), time.perf_counter()
    moved(weights, grads, small)
    normed(grads)
    compiling = time.perf_counter() - begun
    torch.testing.assert_close(normed(grads), joint_norm(grads), rtol=1e-4, atol=0)
    return {
        "move": 1e6 * best(lambda: move_eagerly(weights, grads, 1e-9)),
        "move, compiled": 1e6 * best(lambda: moved(weights, grads, small)),
        "norm": 1e6 * best(lambda: joint_norm(grads)),
        "norm, compiled": 1e6 * best(lambda: normed(grads)),
        "compiling, s": compiling,
    }


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["mlp", "deep", "resnet18"])
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"torch": torch.__version__, "models": {}}
    for name in arguments.models:
        record["models"][name] = found = {key: round(value, 1) for key, value in measure(name).items()}
        print(name, ", ".join(f"{key} {value:g}" for key, value in found.items()), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
