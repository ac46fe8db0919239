"""Random mixing of branches, with other draws for the gradient: Shake-Shake and ShakeDrop, image by image.

Forward the coefficient is alpha; the gradient comes back with beta instead, unless a true gradient is wanted
(:mod:`flatwise.true_gradient`; SAM's first pass). One call draws everything, beta too where it is not used: both passes
of a step then draw the same alpha, and the random state afterwards is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatwise.true_gradient import true_gradient_wanted


def draws(count: int, like: Tensor) -> tuple[Tensor, ...]:
    """Draw numbers from [0, 1), independently for each image.

    Args:
        count: how many for each image.
        like: the images' features, (batch, channels, height, width).

    Returns:
        ``count`` tensors of shape (batch, 1, 1, 1). The draws are float32 whatever the features are.
    """
    numbers = torch.rand(count, len(like), 1, 1, 1, device=like.device)
    return tuple(numbers.to(like.dtype).unbind())


def with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """Return a tensor that has one value and another's derivative.

    Args:
        value: its elements are returned, exactly: what is added to them is 0.
        other: what is differentiated.

    Returns:
        Shape of both.
    """
    return value.detach() + (other - other.detach())


def shake_shake(first: Tensor, second: Tensor) -> Tensor:
    """Mix two branches: ``alpha a + (1 - alpha) b``, alpha from U[0, 1] (Gastaldi, 2017, "Shake-Shake-Image").

    The gradient is that of ``beta a + (1 - beta) b``, beta from U[0, 1].

    Args:
        first: a, (batch, channels, height, width).
        second: b.

    Returns:
        The mixture.
    """
    alpha, beta = draws(2, first)
    mixed = alpha * first + (1 - alpha) * second
    if true_gradient_wanted():
        return mixed
    return with_gradient_of(mixed, beta * first + (1 - beta) * second)


def shake_drop(branch: Tensor, survival: float) -> Tensor:
    """Scale a branch by ``b + alpha - b alpha``: 1 with probability p, else alpha (Yamada et al., 2018, eq. 6).

    b is Bernoulli(p), alpha from U[-1, 1]; the gradient is that of ``(b + beta - b beta) F(x)`` with the same b and
    beta from U[0, 1]: the ranges that the paper found best, for each image as in the SAM authors' code.

    Args:
        branch: F(x), (batch, channels, height, width).
        survival: p.

    Returns:
        The scaled branch.
    """
    chance, alpha, beta = draws(3, branch)
    kept = chance < survival
    scaled = torch.where(kept, 1, 2 * alpha - 1) * branch
    if true_gradient_wanted():
        return scaled
    return with_gradient_of(scaled, torch.where(kept, 1, beta) * branch)


class ShakeShake(nn.Module):
    """Two branches, mixed at random in training and half and half in evaluation."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Mix.

        Args:
            first: (batch, channels, height, width).
            second: same shape.

        Returns:
            Same shape.
        """
        return shake_shake(first, second) if self.training else (first + second) / 2


class ShakeDrop(nn.Module):
    """A residual branch, scaled at random in training and by the expectation of that, p, in evaluation.

    Args:
        survival: the probability p that a branch is left as it is.
    """

    def __init__(self, survival: float) -> None:
        super().__init__()
        self.survival = survival

    def forward(self, branch: Tensor) -> Tensor:
        """Scale.

        Args:
            branch: (batch, channels, height, width).

        Returns:
            Same shape.
        """
        return shake_drop(branch, self.survival) if self.training else self.survival * branch

    def extra_repr(self) -> str:
        """Show the probability where the network is printed.

        Returns:
            The text.
        """
        return f"survival={self.survival:g}"


def survival(layer: int, layers: int, last: float = 0.5) -> float:
    """Return ShakeDrop's probability of a block: it falls linearly, ``p_l = 1 - (l / L) (1 - p_L)`` (eq. 7).

    Args:
        layer: l, counted from 1.
        layers: L.
        last: p_L.

    Returns:
        p_l.
    """
    return 1 - layer / layers * (1 - last)
