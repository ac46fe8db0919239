"""What to step with: from the gradients to what the base optimizer sees (the ``descent`` slot).

SAM's answer is the gradient found at ``w + eps`` (Foret et al., eq. 3). It drops a term: the perturbation itself
depends on w. :func:`second_order_term` is that term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flatwise.ascent import Ball


@dataclass(frozen=True)
class PerturbedGradient:
    """Step with the gradient at ``w + eps``, optionally with the term that SAM drops.

    Attributes:
        second_order: add ``(d eps / d w)^T g'``. For p = 2 it is ``(rho / ||g||) H (I - gg^T/||g||^2) g'``: one
            Hessian-vector product at w, run as a third pass.
    """

    second_order: bool = False


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
    ball: Ball, params: Sequence[Tensor], rhos: Sequence[float], perturbed: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return ``(d eps / d w)^T g'`` by automatic differentiation through the perturbation.

    Args:
        ball: the set that was searched.
        params: all parameters, at w, whose ``.grad`` carries a graph (made inside :class:`KeepGraph`). Those of
            radius 0 do not move, but the perturbation of the others depends on them.
        rhos: radius of each parameter's group.
        perturbed: gradients ``g'`` at w + eps, None where there was none.

    Returns:
        The term for each parameter, None where it is zero.
    """
    moving = [i for i, p in enumerate(params) if rhos[i] > 0 and p.grad is not None and p.numel()]
    weights = [params[i] for i in moving]
    grads = [grad for i in moving if (grad := params[i].grad) is not None]
    if not grads:
        return [None] * len(params)
    eps = ball.perturbation(weights, grads, [rhos[i] for i in moving])
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
