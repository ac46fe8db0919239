"""The theorem behind SAM in formulas: its two forms, with every term.

Theorem 2 of Foret et al., ICLR 2021 (appendix A.1). For n training samples, k weights, a loss in [0, 1], and noise of
standard deviation ``sigma = rho / (sqrt(k) + sqrt(log n))``, its proof shows with probability 1 - delta

    E L_D(w + eps) <= E L_S(w + eps)
        + sqrt( (k/4 log(1 + |w|^2 / (k sigma^2)) + 1/4 + log(n / delta) + 2 log(6n + 3k)) / (n - 1) )        (Gaussian)

and, since that noise is longer than rho with probability at most 1 / sqrt(n), the theorem as printed,

    L_D(w) <= max_{|eps| <= rho} L_S(w + eps)
        + sqrt( (k log(1 + |w|^2 / rho^2 (1 + sqrt(log(n) / k))^2) + 4 log(n / delta) + O(1)) / (n - 1) )      (printed)

where O(1) stands for ``8 log(6n + 3k)``, the last line of the proof. Both bound ``L_D(w)`` itself only where noise on
the weights does not lower the true loss, which the theorem assumes. The grid of prior variances must start from
``sigma^2 (1 + exp(4n/k))`` for the union bound to hold as stated; the paper writes rho there, and KL(P||Q) for
KL(Q||P) in its equation 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Terms:
    """What the square root holds: ``sqrt((complexity + constant + confidence + union) / (n - 1))``.

    Attributes:
        complexity: k times a logarithm: how far the weights are from where the prior has its centre.
        constant: from rounding the prior's variance to its grid.
        confidence: of delta.
        union: the price of choosing the prior's variance after seeing the weights.
    """

    complexity: float
    constant: float
    confidence: float
    union: float

    def root(self, n: int) -> float:
        """Return the square root.

        Args:
            n: number of samples.

        Returns:
            What is added to the loss.
        """
        return math.sqrt((self.complexity + self.constant + self.confidence + self.union) / (n - 1))


def gaussian_terms(n: int, k: int, distance_squared: float, rho: float, delta: float) -> Terms:
    """Return the terms of the Gaussian form.

    Args:
        n: number of samples.
        k: number of weights.
        distance_squared: ``|w|^2``.
        rho: the radius.
        delta: probability that the bound fails.

    Returns:
        The terms.
    """
    sigma = noise(n, k, rho)
    return Terms(
        complexity=k / 4 * math.log1p(distance_squared / (k * sigma**2)),
        constant=1 / 4,
        confidence=math.log(n / delta),
        union=2 * math.log(6 * n + 3 * k),
    )


def printed_terms(n: int, k: int, distance_squared: float, rho: float, delta: float) -> Terms:
    """Return the terms of the theorem as printed.

    Args:
        n: number of samples.
        k: number of weights.
        distance_squared: ``|w|^2``.
        rho: the radius.
        delta: probability that the bound fails.

    Returns:
        The terms; the hidden O(1) is ``union``.
    """
    return Terms(
        complexity=k * math.log1p(distance_squared / rho**2 * (1 + math.sqrt(math.log(n) / k)) ** 2),
        constant=0.0,
        confidence=4 * math.log(n / delta),
        union=8 * math.log(6 * n + 3 * k),
    )


def noise(n: int, k: int, rho: float) -> float:
    """Return the standard deviation at which noise is rarely longer than rho.

    Args:
        n: number of samples.
        k: number of weights.
        rho: the radius.

    Returns:
        ``rho / (sqrt(k) + sqrt(log n))``.
    """
    return rho / (math.sqrt(k) + math.sqrt(math.log(n)))
