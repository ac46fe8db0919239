"""Descents that join the gradient at w with the one at w + eps: PGN, WSAM, StableSAM, GSAM, LookSAM.

The mathematics is in the free functions, over lists of dense real tensors; norms and inner products are over all
parameters jointly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flatwise.descent import Descent, Late
from flatwise.directions import joint_gradient_norm, real
from flatwise.memory import Memory
from flatwise.nograd import no_grad
from flatwise.norms import joint_dot, joint_norm
from flatwise.shards import Sharding, is_sharded, local, placed_like, sharding_of, shardings_of

Over = Sequence[Sharding | None] | None
"""How each tensor of a list is cut over processes; None where all of them are whole."""


def paired(
    params: Sequence[Tensor], clean: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor], list[Sharding | None]]:
    """Return gradients at w and at w + eps of the same parameters, with zeros where only one exists.

    Args:
        params: parameters with the gradient at w + eps in ``.grad``; where a zero or dense tensor stands in, it is put
            there.
        clean: gradients at w.

    Returns:
        Real dense tensors: those at w, those at w + eps (these share their memory with ``.grad``); and how they are
        cut over processes.
    """
    first, second, over = [], [], []
    for param, before in zip(params, clean, strict=True):
        if before is None and param.grad is None:
            continue
        if param.grad is None:
            assert before is not None
            param.grad = torch.zeros_like(before.to_dense() if before.is_sparse else before)
        elif param.grad.is_sparse:
            param.grad = param.grad.to_dense()
        elif is_sharded(param.grad):
            param.grad = placed_like(param, local(param.grad, param))
        after = real(param.grad)
        first.append(torch.zeros_like(after) if before is None else real(local(before, param)))
        second.append(after)
        over.append(sharding_of(param))
    return first, second, over


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """Return ``top / bottom``, 0 where that is no finite number."""
    ratio = top.double() / bottom.double() if top.device.type != "mps" else top / bottom
    return torch.where(torch.isfinite(ratio), ratio, 0)


def _scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(factor.to(tensor.device))


def mix_(perturbed: Sequence[Tensor], clean: Sequence[Tensor], alpha: float) -> None:
    """``g' <- (1 - alpha) g + alpha g'``, in place."""
    if alpha == 1 or not perturbed:
        return
    torch._foreach_mul_(list(perturbed), alpha)
    torch._foreach_add_(list(perturbed), list(clean), alpha=1 - alpha)


def renormalise_(perturbed: Sequence[Tensor], clean: Sequence[Tensor], over: Over = None) -> None:
    """``g' <- (||g|| / ||g'||) g'``, in place; unchanged where ``g'`` is zero."""
    ratio = joint_norm(clean, over=over).double(), joint_norm(perturbed, over=over).double()
    factor = torch.where(ratio[1] > 0, ratio[0] / ratio[1], 1)
    _scale_(perturbed, factor)


def remove_orthogonal_(perturbed: Sequence[Tensor], clean: Sequence[Tensor], alpha: float, over: Over = None) -> None:
    """``g' <- g' - alpha (g - <g, g'> g' / ||g'||^2)``, in place."""
    if alpha == 0 or not perturbed:
        return
    along = _ratio(joint_dot(clean, perturbed, over), joint_dot(perturbed, perturbed, over))
    _scale_(perturbed, 1 + alpha * along)
    torch._foreach_add_(list(perturbed), list(clean), alpha=-alpha)


def orthogonal_part(perturbed: Sequence[Tensor], clean: Sequence[Tensor], over: Over = None) -> list[Tensor]:
    """Return ``g' - <g', g> g / ||g||^2``: what of ``g'`` is orthogonal to ``g``, over all tensors jointly."""
    along = _ratio(joint_dot(perturbed, clean, over), joint_dot(clean, clean, over))
    return [
        after - (along.to(after.device) * before).to(after.dtype)
        for after, before in zip(perturbed, clean, strict=True)
    ]


def _checked(name: str, value: Any) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


@dataclass(frozen=True)
class GradientNormPenalty(Descent):
    """``(1 - alpha) g + alpha g'``: PGN (Zhao, Zhang, Hu, ICML 2022). alpha = 1 is SAM; above 1 extrapolates.

    Attributes:
        alpha: share of the gradient at w + eps. The authors use 0.8 for CIFAR-10.
    """

    alpha: float = 0.8
    needs_clean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check alpha: a finite number >= 0."""
        _checked("alpha", self.alpha)

    @no_grad
    def combine(self, params: Sequence[Tensor], clean: Sequence[Tensor | None], memory: Memory) -> Late | None:  # noqa: D102
        if self.alpha != 1:
            before, after, _ = paired(params, clean)
            mix_(after, before, self.alpha)
        return None


@dataclass(frozen=True)
class WeightedSharpness(Descent):
    """``g + a (g' - g)`` with ``a = gamma / (1 - gamma)``: WSAM (Yue et al., KDD 2023). Coupled, gamma = 0.5 is SAM.

    Attributes:
        gamma: weight of the sharpness, 0 <= gamma < 1. The authors use 0.9.
        decoupled: give the base optimizer g alone, and take ``lr a (g' - g)`` from the weights after its step.
    """

    gamma: float = 0.9
    decoupled: bool = True
    needs_clean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check gamma.

        Raises:
            ValueError: if it is out of its range.
        """
        if not (isinstance(self.gamma, int | float) and 0 <= self.gamma < 1):
            raise ValueError(f"gamma must be in [0, 1), got {self.gamma!r}")

    @property
    def adds_late(self) -> bool:  # noqa: D102
        return self.decoupled

    @no_grad
    def combine(self, params: Sequence[Tensor], clean: Sequence[Tensor | None], memory: Memory) -> Late | None:  # noqa: D102
        weight = self.gamma / (1 - self.gamma)
        if not self.decoupled:
            if weight != 1:
                before, after, _ = paired(params, clean)
                mix_(after, before, weight)
            return None
        before, after, _ = paired(params, clean)
        late = []
        present = [p for p in params if p.grad is not None]
        for param, g, perturbed in zip(present, before, after, strict=True):
            difference = perturbed.sub_(g).mul_(weight)
            grad = torch.view_as_complex(g.contiguous()) if param.is_complex() else g
            late.append((param, difference))
            param.grad = placed_like(param, grad)
        return late


@dataclass(frozen=True)
class Renormalised(Descent):
    """``(||g|| / ||g'||) g'``: StableSAM (Tan et al., JMLR 2025)."""

    needs_clean: ClassVar[bool] = True

    @no_grad
    def combine(self, params: Sequence[Tensor], clean: Sequence[Tensor | None], memory: Memory) -> Late | None:  # noqa: D102
        before, after, over = paired(params, clean)
        renormalise_(after, before, over)
        return None


@dataclass(frozen=True)
class SurrogateGap(Descent):
    """``g' - alpha g_orthogonal``: GSAM (Zhuang et al., ICLR 2022), g split along ``g'``. alpha = 0 is SAM.

    Attributes:
        alpha: share of the orthogonal part that is removed. 0.6 in Google's ViT recipe, 0.4 elsewhere.
    """

    alpha: float = 0.6
    needs_clean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check alpha: a finite number >= 0."""
        _checked("alpha", self.alpha)

    @no_grad
    def combine(self, params: Sequence[Tensor], clean: Sequence[Tensor | None], memory: Memory) -> Late | None:  # noqa: D102
        if self.alpha:
            before, after, over = paired(params, clean)
            remove_orthogonal_(after, before, self.alpha, over)
        return None


@dataclass(frozen=True)
class ReusedPart(Descent):
    """LookSAM (Liu et al., CVPR 2022): keep the part of ``g'`` that is orthogonal to g, and reuse it between.

    On SAM steps ``g_v = g' - <g', g> g / ||g||^2`` is kept; on the others the base sees
    ``g + alpha (||g|| / ||g_v||) g_v``. The projection is over all parameters jointly.

    Attributes:
        alpha: weight of the kept part. The paper has 0.7 for ViT; two independent groups find that it fails on
            convolutional networks and use 0.1 to 0.3, so the default is 0.1.
    """

    alpha: float = 0.1
    needs_clean: ClassVar[bool] = True
    reuses: ClassVar[bool] = True
    remembers: ClassVar[tuple[str, ...]] = ("kept",)

    def __post_init__(self) -> None:
        """Check alpha: a finite number >= 0."""
        _checked("alpha", self.alpha)

    @no_grad
    def combine(self, params: Sequence[Tensor], clean: Sequence[Tensor | None], memory: Memory) -> Late | None:  # noqa: D102
        moved = [p for p, before in zip(params, clean, strict=True) if before is not None and p.grad is not None]
        before = [real(local(g, p)) for p, g in zip(params, clean, strict=True) if g is not None and p.grad is not None]
        after = [real(local(p.grad, p)) for p in moved if p.grad is not None]
        over = shardings_of(moved)
        part = orthogonal_part(after, before, over)
        norm = joint_norm(part, over=over)
        if norm.device.type == "cpu" and not math.isfinite(float(norm)):
            return None
        for param, value in zip(moved, part, strict=True):
            if norm.device.type != "cpu":
                known = memory.zeros(param, "kept", value)
                value = torch.where(torch.isfinite(norm.to(value.device)), value, known.to(value.dtype))
            memory.set(param, "kept", value)
        return None

    @no_grad
    def reuse(self, params: Sequence[Tensor], memory: Memory) -> None:  # noqa: D102
        grads, parts, over = [], [], []
        for param in params:
            part = memory.get(param, "kept")
            if part is None or param.grad is None:
                continue
            if param.grad.is_sparse:
                param.grad = param.grad.to_dense()
            elif is_sharded(param.grad):
                param.grad = placed_like(param, local(param.grad, param))
            grads.append(real(param.grad))
            parts.append(part)
            over.append(sharding_of(param))
        if not grads or not self.alpha:
            return
        # The norm of g is over all gradients, kept part or not.
        factor = self.alpha * _ratio(joint_gradient_norm(params), joint_norm(parts, over=over))
        for grad, part in zip(grads, parts, strict=True):
            grad.add_((part * factor.to(part.device)).to(grad.dtype))
