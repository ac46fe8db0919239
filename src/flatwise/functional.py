"""Functional SAM: the Jacobian at w + eps, the gradient of the loss by the output from w."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import Module

from flatwise.descent import Descent
from flatwise.passes import removed


@dataclass(frozen=True)
class FunctionalGradient(Descent):
    """``J(w + eps)^T dL/dF(w)`` (Singh, Mobahi, Agarwala, Dauphin, ICML 2025). Needs ``model=``.

    The second pass starts from the gradients that the model's output tensors got in the first. What the loss takes
    from elsewhere (a penalty on the weights) is differentiated at w + eps, as in SAM.
    """

    needs_output: ClassVar[bool] = True


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


class OutputGradients:
    """Takes the gradients of a model's outputs in one pass, and puts them into another.

    Args:
        model: whose outputs.
    """

    def __init__(self, model: Module) -> None:
        self._model = model
        self._taken: list[Tensor | None] = []

    @contextmanager
    def take(self) -> Iterator[None]:
        """Note the gradient of every output tensor, in the order of the calls."""
        self._taken = []

        def note(module: Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                place = len(self._taken)
                self._taken.append(None)

                def store(grad: Tensor, place: int = place) -> None:
                    self._taken[place] = grad.detach()

                tensor.register_hook(store)  # type: ignore[no-untyped-call]

        with removed(lambda: self._model.register_forward_hook(note)):
            yield

    @contextmanager
    def put(self) -> Iterator[None]:
        """Replace the gradient of every output tensor by the one that was noted.

        Inside, the model raises a RuntimeError if its outputs are not those of the first pass.
        """
        seen = 0

        def replace(module: Module, args: Any, output: Any) -> None:
            nonlocal seen
            for tensor in _tensors(output):
                if seen >= len(self._taken):
                    raise RuntimeError("the model made more output tensors in the second pass than in the first")
                known = self._taken[seen]
                seen += 1
                if known is not None:
                    if known.shape != tensor.shape:
                        raise RuntimeError(
                            f"an output of the model has shape {tuple(tensor.shape)} in the second pass and "
                            f"{tuple(known.shape)} in the first: both passes must see the same batch"
                        )
                    tensor.register_hook(lambda grad, known=known: known)  # type: ignore[no-untyped-call]

        with removed(lambda: self._model.register_forward_hook(replace)):
            yield
