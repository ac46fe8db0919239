"""One seed, many independent streams.

Every random decision of a run has a generator of its own, derived from the run's seed and the decision's
name. So the methods of one seed meet the same split, noise, weights and sample order whatever else each of
them draws, and a run that continues at epoch k needs no saved generator: its streams are derived afresh.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """Derive the seed of one stream.

    Args:
        seed: the run's seed.
        *names: what the stream is for, such as ``"order", 3``.

    Returns:
        A number in [0, 2^63), the same on every machine.
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: str | int) -> torch.Generator:
    """Make the generator of one stream.

    Args:
        seed: the run's seed.
        *names: what the stream is for.

    Returns:
        A CPU generator that nobody else draws from.
    """
    return torch.Generator().manual_seed(derive(seed, *names))
