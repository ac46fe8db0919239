"""One epoch of training: the loop that every method shares, kept as short as a loop written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from flatwise.lab.augment import augment
from flatwise.lab.config import CompareConfig
from flatwise.lab.data import ImageData
from flatwise.lab.methods import Method, base_optimizer, wrap
from flatwise.lab.models import build_model
from flatwise.lab.split import Split, make_split
from flatwise.seeds import derive, stream

Batch = tuple[Tensor, Tensor]
EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Scores:
    """What an evaluation gives.

    Attributes:
        loss: mean cross-entropy, without smoothing and decay.
        accuracy: share that is right.
    """

    loss: float
    accuracy: float


class Trainer:
    """A model, its samples and its optimizer, for one method and one seed.

    ``samples_differentiated`` counts the samples whose gradient was really evaluated so far.

    Args:
        config: the settings.
        method: what wraps the base optimizer.
        seed: decides weights, split, wrong labels and order.
        data: the data set.
        total_steps: for how many steps learning rate and schedule are laid out; None: for those of all epochs.
    """

    def __init__(
        self, config: CompareConfig, method: Method, seed: int, data: ImageData, total_steps: int | None = None
    ) -> None:
        self.config = config
        self.seed = seed
        self.data = data
        self.split: Split = make_split(
            data,
            seed,
            train_size=config.train_size,
            validation_share=config.val_fraction,
            label_noise=config.label_noise,
        )
        self.batch_size = min(config.batch_size, len(self.split.labels))
        self.steps_per_epoch = len(self.split.labels) // self.batch_size
        self.epochs = config.epochs * method.longer
        self.total_steps = total_steps or self.epochs * self.steps_per_epoch
        self.model: nn.Module = build_model(
            config.model, data.train_inputs.shape[1:], data.classes, derive(seed, "weights")
        )
        self.base = base_optimizer(config, list(self.model.parameters()))
        self.samples_differentiated = 0
        self.reduction = "mean"
        if method.variant is None:
            self.optimizer: torch.optim.Optimizer = self.base
            self.step: Callable[[Batch], Tensor] = self._plain_step
        else:
            wrapped = wrap(
                method,
                self.base,
                self.total_steps,
                model=self.model,
                train_size=len(self.split.labels),
                batch_size=self.batch_size,
            )
            self.optimizer = wrapped
            self.reduction = "none" if wrapped.wants_sample_losses else "mean"
            self.step = lambda batch: wrapped.step(self.loss_fn, batch)

    def loss_fn(self, batch: Batch) -> Tensor:
        """Compute the loss, and count the samples whose gradient it is computed for.

        Args:
            batch: images and labels.

        Returns:
            The mean cross-entropy; that of each sample for a method that chooses samples.
        """
        inputs, labels = batch
        if torch.is_grad_enabled():  # a method that chooses samples first looks at all, without gradients
            self.samples_differentiated += len(labels)
        return functional.cross_entropy(self.model(inputs), labels, reduction=self.reduction)

    def _plain_step(self, batch: Batch) -> Tensor:
        self.base.zero_grad()
        loss = self.loss_fn(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.base.step()
        return loss.detach()

    def train_epoch(self, epoch: int) -> float:
        """Train one epoch; its order, augmentation and random state depend on seed and epoch alone.

        Args:
            epoch: counted from 0; sets the place on the learning-rate curve too.

        Returns:
            The mean over the steps of the loss at the weights, before each step.
        """
        self.model.train()
        torch.manual_seed(derive(self.seed, "dropout", epoch))
        order = torch.randperm(len(self.split.labels), generator=stream(self.seed, "order", epoch))
        shifts = stream(self.seed, "augmentation", epoch)
        losses = []
        step = epoch * self.steps_per_epoch
        for indices in torch.split(order, self.batch_size)[: self.steps_per_epoch]:
            batch = self.batch(indices, shifts)
            self.set_learning_rate(step)
            losses.append(self.step(batch))
            step += 1
        return float(torch.stack(losses).mean())

    def batch(self, indices: Tensor, shifts: torch.Generator) -> Batch:
        """Gather a batch.

        Args:
            indices: which training samples.
            shifts: draws the augmentation, if there is one.

        Returns:
            Images and labels.
        """
        inputs = self.split.inputs.index_select(0, indices)
        if self.config.augment == "basic":
            inputs = augment(inputs, self.data.padding, self.data.flips, shifts)
        return inputs, self.split.labels.index_select(0, indices)

    def set_learning_rate(self, step: int) -> None:
        """Put the step's learning rate in place: a cosine from the configured one to 0.

        Args:
            step: counted from 0 over the whole training.
        """
        rate = self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.total_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> Tensor:
        """Compute logits as at test time.

        Args:
            inputs: images, any number.

        Returns:
            (images, classes).
        """
        self.model.eval()
        return torch.cat([self.model(part) for part in torch.split(inputs, EVALUATION_BATCH)])


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Score predictions.

    Args:
        logits: (samples, classes).
        labels: (samples,).

    Returns:
        Mean loss and accuracy.
    """
    right = int((logits.argmax(dim=1) == labels).sum())
    return Scores(float(functional.cross_entropy(logits, labels)), right / len(labels))
