"""A copy of a model and its optimizer that trains, while the user's stay as they are.

Both are copied together, so that the copied optimizer drives the copied model. How an optimizer wants to be called is
found from what it has: ``step(loss_fn, batch)`` of flatwise, ``first_step`` and ``second_step`` of the older SAM code,
or the ``step(closure)`` of torch.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from flatwise.bsam import BSAM
from flatwise.errors import UserError
from flatwise.measure.data import read_batches
from flatwise.optimizer import SAM

LossFn = Callable[[Module, Any], Tensor]
TrainStep = Callable[[Module, Any, Any], Any]
"""``train_step(model, optimizer, batch)``: the body of the user's loop."""

# What an Optimizer has for its own book-keeping: hooks may belong to the user's objects, and a learning-rate scheduler
# puts a `step` in front of the class's that steps the original.
_NOT_COPIED = ("step", "_step_count", "_opt_called")


class Twin:
    """A copied model and the copied optimizer that drives it.

    Args:
        model: the user's.
        optimizer: the user's; of flatwise, of torch, or of another library.

    Raises:
        UserError: if they cannot be copied, or the optimizer does not drive the model.
    """

    def __init__(self, model: Module, optimizer: Any) -> None:
        mine = {id(p) for p in model.parameters()}
        groups = getattr(optimizer, "param_groups", None)
        if groups is None:
            raise UserError(f"optimizer must be an optimizer with param_groups, got {type(optimizer).__name__}")
        if not any(id(p) in mine for group in groups for p in group["params"]):
            raise UserError("the optimizer has no parameter of this model: make it from model.parameters()")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UserError("LBFGS evaluates the loss at points of its own choice: SAM is not made for it")
        memo: dict[int, Any] = {}
        try:
            self.model: Module = copy.deepcopy(model, memo)
            self.optimizer: Any = _copied(optimizer, memo)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"the model and its optimizer cannot be copied: {error}") from error
        original = getattr(optimizer, "_model", None)
        if isinstance(optimizer, SAM) and original is not None and original() is model:
            self.optimizer._model = weakref.ref(self.model)  # not copied: the optimizer holds its model weakly
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        for p in self.params:
            p.grad = None

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for p in self.params:
            p.grad = None

    def step(self, loss_fn: LossFn, batch: Any, train_step: TrainStep | None = None) -> Any:
        """Take one step.

        Args:
            loss_fn: the mean loss of a batch.
            batch: the batch.
            train_step: the user's own way to make a step; None: the one that fits the optimizer.

        Returns:
            What the step returned.
        """
        model, optimizer = self.model, self.optimizer
        if train_step is not None:
            return train_step(model, optimizer, batch)
        if isinstance(optimizer, SAM | BSAM):
            return optimizer.step(lambda part: loss_fn(model, part), batch)

        def closure() -> Tensor:
            self.zero_grad()
            with torch.enable_grad():
                loss = loss_fn(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        if callable(getattr(optimizer, "first_step", None)) and callable(getattr(optimizer, "second_step", None)):
            loss = closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)
            return loss.detach()
        return optimizer.step(closure)


def _copied(optimizer: Any, memo: dict[int, Any]) -> Any:
    """Copy an optimizer. torch copies groups, state and defaults alone, which loses what a wrapper adds."""
    plain = type(optimizer).__module__.startswith("torch.optim")
    if isinstance(optimizer, SAM | BSAM) or plain or not isinstance(optimizer, Optimizer):
        return copy.deepcopy(optimizer, memo)
    kept = {k: v for k, v in vars(optimizer).items() if k not in _NOT_COPIED and not k.endswith("_hooks")}
    twin = type(optimizer).__new__(type(optimizer))
    memo[id(optimizer)] = twin
    Optimizer.__setstate__(twin, copy.deepcopy(kept, memo))
    return twin


def base_twin(model: Module, optimizer: Any) -> Twin | None:
    """Copy the model with the base optimizer alone.

    Args:
        model: the user's.
        optimizer: the user's.

    Returns:
        The copy; None where there is no base optimizer to be seen.
    """
    base = getattr(optimizer, "base_optimizer", None)
    if base is None and not takes_radius(optimizer):
        base = optimizer
    return Twin(model, base) if isinstance(base, Optimizer) else None


def takes_radius(optimizer: Any) -> bool:
    """Tell whether an optimizer claims to be one of the family: it has a radius.

    Args:
        optimizer: of any library.

    Returns:
        Whether it has.
    """
    if isinstance(optimizer, SAM | BSAM):
        return True
    if type(optimizer) is torch.optim.Adadelta:  # its rho is a decay rate
        return False
    return any("rho" in group for group in optimizer.param_groups) or hasattr(optimizer, "rho")


def radius_of(optimizer: Any) -> float | None:
    """Return the largest radius of the groups.

    Args:
        optimizer: of any library.

    Returns:
        The radius; None where there is none.
    """
    if not takes_radius(optimizer):
        return None
    key = getattr(optimizer, "_rho_key", "rho")
    radii = [float(group[key]) for group in optimizer.param_groups if key in group]
    return max(radii) if radii else float(optimizer.rho)


@contextmanager
def generators_of(data: Any) -> Iterator[None]:
    """Put back the generators that a DataLoader shuffles with.

    Args:
        data: anything.

    Yields:
        Nothing.
    """
    samplers = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    samplers.append(getattr(samplers[-1], "sampler", None))
    found = [getattr(holder, "generator", None) for holder in samplers]
    states = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def some_batches(data: Any, limit: int) -> list[Any]:
    """Read at most so many batches.

    Args:
        data: one batch, or an iterable of batches.
        limit: how many.

    Returns:
        The batches.
    """
    if isinstance(data, Tensor | tuple | Mapping | list) or not isinstance(data, Iterable):
        return read_batches(data)[:limit]
    return read_batches(itertools.islice(data, limit))
