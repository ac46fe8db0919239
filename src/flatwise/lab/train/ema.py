"""An exponential moving average of the weights, which is then what is evaluated.

After step t = 0, 1, ... every parameter and every buffer of floating point (the statistics of batch normalisation among
them) moves the average by ``average = d * average + (1 - d) * weight`` with ``d = min(decay, (1 + t) / (10 + t))``, as
EfficientNet's authors do (Tan and Le, ICML 2019): early on the average forgets its random start. Whole numbers, such
as the count of batches, are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flatwise.shards import local


class Average:
    """A running average of everything that a model's state holds.

    Args:
        model: what is averaged; the average begins at its present state.
        decay: the share of the average that a step keeps, < 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = dict(model.state_dict())
        self.values = {name: value.detach().clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step.

        Args:
            step: counted from 0.
        """
        kept = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        for name, value in self._live.items():
            average, weight = local(self.values[name]), local(value.detach())
            if weight.is_floating_point():
                averages.append(average)
                weights.append(weight)
            else:
                average.copy_(weight)
        torch._foreach_lerp_(averages, weights, 1 - kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model be the average while the block runs.

        Yields:
            Nothing.
        """
        kept = {name: value.detach().clone() for name, value in self._live.items()}
        try:
            self._put(self.values)
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in self._live.items():
            local(value.detach()).copy_(local(values[name]))
