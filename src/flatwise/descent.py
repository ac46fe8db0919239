"""What to step with: from the gradients to what the base optimizer sees (the ``descent`` slot).

SAM's answer is the gradient found at ``w + eps`` (Foret et al., eq. 3). It drops a term: the perturbation itself
depends on w. :func:`second_order_term` is that term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flatwise.ascent import Ball
from flatwise.memory import Memory

Late = list[tuple[Tensor, Tensor]]
"""Pairs of a parameter and what is taken from it, times its learning rate, after the base's step."""


@dataclass(frozen=True)
class Descent:
    """Base of all descents: step with the gradient at ``w + eps``.

    Attributes:
        needs_clean: whether the gradient at w is kept for :meth:`combine` (one more copy of the weights' size).
        reuses: whether steps without a second pass, between steps with one, go through :meth:`reuse`.
        needs_output: whether the second pass starts from the output gradients of the first (see ``functional``).
        remembers: names of what is kept for each parameter between steps.
    """

    needs_clean: ClassVar[bool] = False
    reuses: ClassVar[bool] = False
    needs_output: ClassVar[bool] = False
    remembers: ClassVar[tuple[str, ...]] = ()

    @property
    def adds_term(self) -> bool:
        """Whether the term that SAM drops is added."""
        return False

    @property
    def adds_late(self) -> bool:
        """Whether :meth:`combine` returns something to be added after the base's step."""
        return False

    def combine(self, params: Sequence[Tensor], clean: Sequence[Tensor | None], memory: Memory) -> Late | None:
        """Turn the gradients at w + eps, in ``.grad``, into what the base optimizer sees.

        Args:
            params: all parameters.
            clean: their gradients at w, where there were any.
            memory: what the method remembers.

        Returns:
            What is to be taken from the parameters after the base's step, if anything.
        """
        return None

    def reuse(self, params: Sequence[Tensor], memory: Memory) -> None:
        """Change the gradients at w, in ``.grad``, on a step without a second pass.

        Args:
            params: all parameters.
            memory: what the method remembers.
        """


@dataclass(frozen=True)
class PerturbedGradient(Descent):
    """Step with the gradient at ``w + eps``, optionally with the term that SAM drops.

    Attributes:
        second_order: add ``(d eps / d w)^T g'``. For p = 2 it is ``(rho / ||g||) H (I - gg^T/||g||^2) g'``: one
            Hessian-vector product at w, run as a third pass.
    """

    second_order: bool = False

    @property
    def adds_term(self) -> bool:
        """Whether the term that SAM drops is added."""
        return self.second_order


class KeepGraph(TorchFunctionMode):
    """Inside, ``loss.backward()`` keeps and records the graph, so that gradients can be differentiated again."""

    def __init__(self) -> None:
        super().__init__()
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, with ``create_graph=True`` where it is a backward pass."""
        kwargs = dict(kwargs or {})
        if func is Tensor.backward:
            kwargs["create_graph"] = True
            args = args[:2]  # (loss, gradient); retain_graph and create_graph follow
            self.used = True
        return func(*args, **kwargs)


def second_order_term(
    ball: Ball,
    params: Sequence[Tensor],
    rhos: Sequence[float],
    perturbed: Sequence[Tensor | None],
    scaled: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """Return ``(d eps / d w)^T g'`` by automatic differentiation through the perturbation.

    Args:
        ball: the set that was searched.
        params: all parameters, at w, whose ``.grad`` carries a graph (made inside :class:`KeepGraph`). Those of
            radius 0 do not move, but the perturbation of the others depends on them.
        rhos: radius of each parameter's group.
        perturbed: gradients ``g'`` at w + eps, None where there was none.
        scaled: whether T is used for a parameter; for all by default.

    Returns:
        The term for each parameter, None where it is zero.
    """
    moving = [i for i, p in enumerate(params) if rhos[i] > 0 and p.grad is not None and p.numel()]
    weights = [params[i] for i in moving]
    grads = [grad for i in moving if (grad := params[i].grad) is not None]
    if not grads:
        return [None] * len(params)
    use = None if scaled is None else [scaled[i] for i in moving]
    eps = ball.perturbation(weights, grads, [rhos[i] for i in moving], use)
    pairs = [(e, v) for e, i in zip(eps, moving, strict=True) if (v := perturbed[i]) is not None and e.requires_grad]
    if not pairs:  # the loss is linear, and the perturbation does not depend on w
        return [None] * len(params)
    outputs, vectors = [e for e, _ in pairs], [v.to(e.dtype) for e, v in pairs]
    inputs = [i for i, p in enumerate(params) if p.requires_grad]
    terms = torch.autograd.grad(outputs, [params[i] for i in inputs], vectors, allow_unused=True)
    result: list[Tensor | None] = [None] * len(params)
    for i, term in zip(inputs, terms, strict=True):
        result[i] = term
    return result
