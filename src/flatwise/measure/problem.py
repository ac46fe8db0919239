"""The problem that every measure is about: this loss, at these weights, on these samples.

``L(w) = sum_b n_b L_b(w) / sum_b n_b`` over the batches b of n_b samples, where ``L_b = loss_fn(model, batch)`` is a
mean over the samples of the batch. Batches may be cut into micro-batches and shared between processes; the sum stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from flatwise.batching import map_tensors
from flatwise.errors import UserError
from flatwise.measure.data import Part, cut, read_batches
from flatwise.measure.result import Conditions, Cost
from flatwise.measure.select import Parameters, selected
from flatwise.measure.space import Space
from flatwise.measure.unchanged import seed_all, unchanged
from flatwise.seeds import derive
from flatwise.true_gradient import true_gradients

LossFn = Callable[[Module, Any], Tensor]
Mode = Literal["eval", "train", "as is"]

FORWARD, BACKWARD, DOUBLE_BACKWARD = 1 / 3, 2 / 3, 2.0
"""In gradient evaluations: a backward pass costs two forward passes, one through both costs twice their sum."""


class NotInTheLossError(UserError):
    """The loss depends on none of the parameters that were chosen."""


class Problem(Space):
    """A loss at given weights on fixed samples, and how to evaluate it and its gradient.

    Everything is evaluated inside ``with problem.open():``, which puts the model into its mode and leaves it as it was.

    Args:
        model: any module; a DistributedDataParallel wrapper is looked through.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch as one number.
        data: one batch, or an iterable of batches, read once.
        parameters: which parameters the measure is about; None: all that are trainable.
        mode: ``"eval"``: batch normalisation and dropout as at test time. ``"train"``: batch statistics and dropout,
            with the same masks in every evaluation. ``"as is"``: as the model is.
        micro_batch_size: evaluate at most so many samples at once; None: a batch at once.
        seed: seeds what the loss draws, anew before every part.
        process_group: a ``torch.distributed`` group whose processes each bring their own share of the data; None: this
            process alone.

    Attributes:
        asked: the micro-batch size that was asked for.

    Raises:
        UserError: bad data, parameters, mode or size.
    """

    def __init__(
        self,
        model: Module,
        loss_fn: LossFn,
        data: Any,
        *,
        parameters: Parameters = None,
        mode: Mode = "eval",
        micro_batch_size: int | None = None,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        if mode not in ("eval", "train", "as is"):
            raise UserError(f"mode must be 'eval', 'train' or 'as is', got {mode!r}")
        if micro_batch_size is not None and (not isinstance(micro_batch_size, int) or micro_batch_size < 1):
            raise UserError(f"micro_batch_size must be a whole number >= 1, got {micro_batch_size!r}")
        self.model: Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.loss_fn, self.mode, self.seed = loss_fn, mode, seed
        chosen, self.frozen = selected(self.model, parameters)
        super().__init__(chosen, process_group)
        self.unused: tuple[str, ...] = ()
        self.notes: list[str] = []
        self.batches = read_batches(data)
        self.gradient_evaluations = 0.0
        self._started = time.perf_counter()
        self.asked = micro_batch_size
        self.cut(micro_batch_size)

    def cut(self, micro_batch_size: int | None) -> None:
        """Cut the batches anew.

        Args:
            micro_batch_size: the largest number of samples evaluated at once; None: a batch.
        """
        self.parts, counted = cut(self.batches, micro_batch_size)
        self._local = sum(part.samples for part in self.parts)
        numbers = torch.tensor([self._local, len(self.batches)], dtype=torch.float64, device=self.device)
        self.samples, self._batches = map(int, self.summed(numbers).tolist())
        if not counted:
            self.note("the samples of a batch could not be counted: every batch has the same weight")
        if micro_batch_size is not None and self.batch_statistics:
            self.note(
                f"batch normalisation sees {micro_batch_size} samples at a time, as micro_batch_size says: "
                "the loss depends on it"
            )

    def note(self, sentence: str) -> None:
        """Add a sentence to the notes of the conditions, once.

        Args:
            sentence: what a reader should know.
        """
        if sentence not in self.notes:
            self.notes.append(sentence)

    @property
    def batch_statistics(self) -> bool:
        """Whether the loss of a sample depends on which others are in its part, through batch normalisation."""
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm)]
        train = self.mode == "train"
        return any(m.running_mean is None or train or (self.mode == "as is" and m.training) for m in norms)

    def conditions(self) -> Conditions:
        """Say under which conditions the numbers were measured.

        Returns:
            The conditions.
        """
        return Conditions(
            samples=self.samples,
            batches=self._batches,
            micro_batch_size=max(part.samples for part in self.parts),
            mode=self.mode,
            seed=self.seed,
            weights=self.weights,
            unused=self.unused,
            frozen=self.frozen,
            processes=1 if self.group is None else torch.distributed.get_world_size(self.group),
            dtype=str(self.params[0].dtype).removeprefix("torch."),
            device=str(self.device),
            notes=tuple(self.notes),
        )

    def cost(self) -> Cost:
        """Return what was spent since the problem was made, or since the last call.

        Returns:
            Gradient evaluations and seconds.
        """
        now = time.perf_counter()
        spent = Cost(self.gradient_evaluations, now - self._started)
        self.gradient_evaluations, self._started = 0.0, now
        return spent

    def spend(self, part: Part, evaluations: float) -> None:
        """Count what was evaluated on a part.

        Args:
            part: the micro-batch.
            evaluations: in units of one forward and backward pass over it.
        """
        self.gradient_evaluations += evaluations * part.samples / self._local

    @contextmanager
    def open(self) -> Iterator[None]:
        """Put the model into its mode; leave mode, gradients, buffers and random state as they were.

        Yields:
            Nothing.
        """
        with unchanged(self.model), true_gradients():  # of the loss that is measured, whatever layers do in training
            if self.mode != "as is":
                self.model.train(self.mode == "train")
            yield

    def share(self, part: Part) -> float:
        """Return the share of a part among all samples of all processes.

        Args:
            part: a micro-batch.

        Returns:
            A number in (0, 1].
        """
        return part.samples / self.samples

    def loss_of(self, part: Part) -> Tensor:
        """Evaluate the loss of one part, with a graph where gradients are on.

        What the loss draws (dropout masks, noise) depends on the seed and the part alone.

        Args:
            part: the micro-batch.

        Returns:
            0-dim.

        Raises:
            UserError: if ``loss_fn`` does not return one number as a tensor.
        """
        seed_all(derive(self.seed, "part", part.number) % 2**32)
        loss = self.loss_fn(self.model, self._placed(part.batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"loss_fn(model, batch) must return the mean loss as a tensor with one number, got {shape}")
        self.spend(part, FORWARD)
        return loss.reshape(())

    def _placed(self, batch: Any) -> Any:
        device = self.device
        return map_tensors(batch, lambda leaf: leaf if leaf.device == device else leaf.to(device))

    def losses(self, parts: Sequence[Part] | None = None) -> Tensor:
        """Evaluate the loss of every part of this process, without graphs.

        Args:
            parts: micro-batches; None: all.

        Returns:
            Shape (parts,), float64, on the CPU.
        """
        with torch.inference_mode():
            values = [self.loss_of(part) for part in (self.parts if parts is None else parts)]
            return torch.stack([value.double() for value in values]).cpu().clone()

    def loss(self) -> float:
        """Evaluate the loss of all samples, without graphs.

        Returns:
            The mean over the samples of all processes.
        """
        losses = self.losses()
        shares = torch.tensor([self.share(part) for part in self.parts], dtype=torch.float64)
        return float(self.summed((losses * shares).sum().to(self.device)))

    def gradient(self, parts: Sequence[Part] | None = None) -> tuple[float, Tensor]:
        """Evaluate the loss and its gradient.

        Args:
            parts: micro-batches of this process, whose mean is meant; None: all samples of all processes.

        Returns:
            The loss, and the gradient, shape (weights,).
        """
        alone = parts is not None
        parts = self.parts if parts is None else parts
        together = sum(part.samples for part in parts) if alone else self.samples
        total = torch.zeros(self.weights, dtype=self.dtype, device=self.device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        used: set[int] = set()
        for part in parts:
            with torch.enable_grad():
                loss = self.loss_of(part)
            grads = self.gradients_of(loss)
            used |= {number for number, g in enumerate(grads) if g is not None}
            self.spend(part, BACKWARD)
            total.add_(self.flat(grads), alpha=part.samples / together)
            loss_sum += loss.detach().double() * (part.samples / together)
        if not alone:
            total, loss_sum = self.summed(total), self.summed(loss_sum)
            self.say_used(used)
        return float(loss_sum), total

    def say_used(self, used: set[int]) -> None:
        """Say which parameters the loss depends on; every process of the group says it.

        Args:
            used: their places, over all parts of this process.

        Raises:
            NotInTheLossError: if it depends on none.
        """
        flags = torch.tensor([number in used for number in range(len(self.params))], device=self.device)
        used_anywhere = self.summed(flags.double()).tolist()
        self.unused = tuple(name for name, use in zip(self.names, used_anywhere, strict=True) if not use)
        if len(self.unused) == len(self.names):
            raise NotInTheLossError("the loss depends on none of the parameters that were chosen")

    def gradients_of(self, loss: Tensor, **options: Any) -> list[Tensor | None]:
        """Differentiate by the parameters.

        Args:
            loss: 0-dim, with a graph.
            **options: for :func:`torch.autograd.grad`.

        Returns:
            One gradient for each parameter, None where the loss does not depend on it.

        Raises:
            UserError: if it has no graph.
        """
        if not loss.requires_grad:
            raise UserError("the loss depends on none of the parameters: is it computed under no_grad, or detached?")
        grads: list[Tensor | None] = list(torch.autograd.grad(loss, self.params, allow_unused=True, **options))
        return grads
