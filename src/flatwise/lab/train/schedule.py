"""The learning rate of each step: a straight rise from 0, then a fall.

With T steps in all, W of them warm-up, and s = (t - W) / (T - W) the share of the fall that step t = 0, 1, ... has
behind it, the rate relative to its peak is::

    t < W:      t / W
    cosine:     (1 + cos(pi s)) / 2        (Loshchilov and Hutter, ICLR 2017; the SAM paper's)
    linear:     1 - s
    step:       gamma ^ (number of milestones <= t / T)
    constant:   1
"""

from __future__ import annotations

import math

from flatwise.lab.train.config import TrainConfig


def relative_rate(config: TrainConfig, step: int, warmup: int, total: int) -> float:
    """Return the learning rate of a step, relative to its peak.

    Args:
        config: its ``schedule``, ``milestones`` and ``gamma`` are read.
        step: counted from 0 over the whole training.
        warmup: steps of the rise.
        total: steps of the whole training.

    Returns:
        A number from 0 to 1 (with a ``gamma`` above 1 also more).
    """
    if step < warmup:
        return step / warmup
    share = (step - warmup) / (total - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if config.schedule == "linear":
        return 1 - share
    if config.schedule == "step":
        # 0.28 * 100 is a little more than 28, and is meant to be step 28.
        return float(config.gamma ** sum(step >= round(milestone * total, 6) for milestone in config.fall))
    return 1.0
