"""What is minimised: cross-entropy with smoothed labels, and weight decay where it belongs to the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed
from torch.nn import functional

from flatwise.shards import any_sharded, local

Batch = tuple[Tensor, Tensor]


class Loss:
    """The loss of a batch, counted.

    ``samples_differentiated`` counts the samples whose gradient was really computed so far, in this process.

    Args:
        model: gives logits.
        smoothing: share of each label that is spread over all classes (Szegedy et al., CVPR 2016, section 7).
        decayed: parameters whose squared norm is part of the loss.
        decay: half of it is what their squared norm is multiplied with, as in the SAM authors' code.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], smoothing: float, decayed: Sequence[Tensor], decay: float
    ) -> None:
        self.model, self.smoothing = model, smoothing
        self.decayed, self.decay = decayed, decay
        self.reduction = "mean"
        """"none" for a method that chooses samples by their loss."""
        self.samples_differentiated = 0

    def __call__(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch.

        Args:
            batch: images, and labels or a probability for each class.

        Returns:
            The mean over the samples, or one loss for each.
        """
        images, targets = batch
        if torch.is_grad_enabled():  # a method that chooses samples first looks at all, without gradients
            self.samples_differentiated += len(images)
        loss = functional.cross_entropy(
            self.model(images).float(), targets, reduction=self.reduction, label_smoothing=self.smoothing
        )
        if self.decay and self.decayed:
            loss = loss + 0.5 * self.decay * self._squares()
        return loss

    def _squares(self) -> Tensor:
        # Of a cut parameter each process differentiates the part that it holds: its gradient is not summed.
        own = torch.stack([local(weight).square().sum() for weight in self.decayed]).sum()
        if not any_sharded(self.decayed):
            return own
        whole = own.detach().clone()
        distributed.all_reduce(whole)
        return own + (whole - own.detach())
