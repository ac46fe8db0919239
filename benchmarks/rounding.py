"""How much of a perturbation arrives in half-precision weights.

    python benchmarks/rounding.py          # the table of docs/precision.md

A million weights of standard deviation 0.02, and a perturbation of length rho along a random direction. For both ways
of rounding: the share of the weights that move, ||moved|| / rho, what arrives (<moved, eps> / rho^2), and the cosine of
the angle between the two.
"""

from __future__ import annotations

import torch

from flatwise.rounding import round_at_random

COUNT, DEVIATION = 1_000_000, 0.02
RADII = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def row(weights: torch.Tensor, eps: torch.Tensor, moved: torch.Tensor) -> str:
    """Return the four numbers of one way of rounding."""
    change = moved.float() - weights.float()
    along, length = float(change @ eps), float(eps.norm())
    share = float((change != 0).float().mean())
    cosine = along / (length * float(change.norm()))
    return f"{100 * share:.0f} % | {float(change.norm()) / length:.2f} | {along / length**2:.2f} | {cosine:.2f}"


def main() -> None:
    """Print the table."""
    draws = torch.Generator().manual_seed(0)
    print("| weights | rho | moved | length | arrives | cosine | moved | length | arrives | cosine |")
    print("|---" * 10 + "|")
    for dtype in (torch.bfloat16, torch.float16):
        weights = (torch.randn(COUNT, generator=draws) * DEVIATION).to(dtype)
        direction = torch.randn(COUNT, generator=draws)
        for rho in RADII:
            eps = rho * direction / direction.norm()
            exact = weights.float() + eps
            nearest, drawn = exact.to(dtype), round_at_random(exact, dtype, draws)
            name = str(dtype).removeprefix("torch.")
            print(f"| {name} | {rho:g} | {row(weights, eps, nearest)} | {row(weights, eps, drawn)} |")


if __name__ == "__main__":
    main()
