"""A small network in double precision, and what the scripts beside it ask of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Line = tuple[str, Any, Any]
"""What is compared, what the paper's equations give, what the peer does."""


class Task:
    """A network of two layers, one batch, and a count of the forward and backward passes over it."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
        self.params = list(self.model.parameters())
        with torch.no_grad():
            for param in self.params:
                param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.5)
        self.inputs = torch.randn(32, 6, generator=generator, dtype=torch.float64).to(dtype)
        self.targets = torch.randint(3, (32,), generator=generator)
        self.passes = 0
        self.seen: list[list[Tensor]] = []

    def closure(self) -> Tensor:
        """Clear the gradients, compute the loss and the gradients; note at which weights."""
        self.passes += 1
        self.seen.append(self.weights())
        for param in self.params:
            param.grad = None
        loss = F.cross_entropy(self.model(self.inputs), self.targets)
        loss.backward()
        return loss

    def weights(self) -> list[Tensor]:
        """Return copies of the weights."""
        return [param.detach().clone() for param in self.params]

    def gradient(self, at: list[Tensor] | None = None) -> list[Tensor]:
        """Return the gradient at some weights (by default the present ones), and leave everything as it is."""
        params = self.params if at is None else at
        leaves = {
            name: w.detach().clone().requires_grad_()
            for (name, _), w in zip(self.model.named_parameters(), params, strict=True)
        }
        outputs = torch.func.functional_call(self.model, leaves, self.inputs)
        return list(torch.autograd.grad(F.cross_entropy(outputs, self.targets), list(leaves.values())))


def dot(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Return the inner product over all tensors."""
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()


def norm(tensors: list[Tensor]) -> Tensor:
    """Return the norm over all tensors."""
    return dot(tensors, tensors).sqrt()


def minus(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Return the difference, tensor by tensor."""
    return [a - b for a, b in zip(first, second, strict=True)]


def along(weights: list[Tensor], direction: list[Tensor], length: float | Tensor) -> list[Tensor]:
    """Return the weights moved by a length times the direction, tensor by tensor."""
    return [w + length * d for w, d in zip(weights, direction, strict=True)]


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return ``||found - expected|| / ||expected||``."""
    return float(norm(minus(found, expected)) / norm(expected))


def show(title: str, measure: Callable[[], list[Line]]) -> None:
    """Print what a script found."""
    torch.set_num_threads(1)
    rows = [("", "paper", "peer"), *[(what, _text(paper), _text(peer)) for what, paper, peer in measure()]]
    print(title)
    for what, paper, peer in rows:
        print(f"  {what:<62}{paper:>12}{peer:>12}".rstrip())


def _text(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
