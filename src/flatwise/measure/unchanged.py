"""Measuring changes nothing: what a measure may touch is put back, bit for bit, also when it raises."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.guards import RandomState


@contextmanager
def unchanged(model: Module) -> Iterator[None]:
    """Put back mode, gradients, buffers, ``requires_grad`` and random state on leaving.

    The random state is that of torch (the CPU and every device of the model), of ``random`` and, where it is loaded,
    of numpy. Weights are the business of :class:`Displaced`, which alone moves them.

    Args:
        model: what is measured.
    """
    params, modules = list(model.parameters()), list(model.modules())
    modes = [module.training for module in modules]
    gradients = [(p, p.grad, p.requires_grad) for p in params]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
    ]
    tensors = [*params, *(b for _, _, b, _ in buffers if b is not None)]
    torch_state = RandomState({t.device for t in tensors})
    python_state, numpy_state = random.getstate(), _numpy_state()
    for p in params:
        p.grad = None  # what a loss that calls backward() adds must not go into the caller's gradients
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for p, grad, wanted in gradients:
            p.grad = grad
            p.requires_grad_(wanted)
        with torch.no_grad():
            for module, name, buffer, copy in buffers:
                if buffer is not None and copy is not None:
                    buffer.copy_(copy)
                module._buffers[name] = buffer
        torch_state.put()
        random.setstate(python_state)
        if numpy_state is not None:
            sys.modules["numpy"].random.set_state(numpy_state)


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state()


def seed_all(seed: int) -> None:
    """Seed torch, ``random`` and, where it is loaded, numpy. Only inside :func:`unchanged`.

    Args:
        seed: any number >= 0.
    """
    # torch.manual_seed would also queue a seed for devices that were never used, which outlives the measure.
    torch.default_generator.manual_seed(seed)
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            device.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


class Displaced:
    """Weights that may be moved inside ``with``, and are put back from a copy on leaving, bit for bit.

    Args:
        params: what may be moved. One copy of them is kept.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._copies: list[Tensor] = []

    def __enter__(self) -> Displaced:
        """Keep a copy."""
        self._copies = [p.detach().clone(memory_format=torch.preserve_format) for p in self._params]
        return self

    def __exit__(self, *_: object) -> None:
        """Put the weights back."""
        self.restore()
        self._copies = []

    @property
    def origin(self) -> list[Tensor]:
        """The weights as they were on entering."""
        return self._copies

    @torch.no_grad()
    def move(self, offset: Sequence[Tensor], factor: float = 1.0) -> None:
        """Place the weights at ``w + factor * offset``, counted from where they were on entering.

        Args:
            offset: shapes of the weights.
            factor: how far.
        """
        for p, copy, d in zip(self._params, self._copies, offset, strict=True):
            torch.add(copy, d.to(dtype=copy.dtype, device=copy.device), alpha=factor, out=p)

    @torch.no_grad()
    def place(self, weights: Sequence[Tensor]) -> None:
        """Put other weights in place.

        Args:
            weights: shapes of the weights.
        """
        for p, w in zip(self._params, weights, strict=True):
            p.copy_(w)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back to where they were on entering."""
        for p, copy in zip(self._params, self._copies, strict=True):
            p.copy_(copy)
