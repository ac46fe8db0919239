"""The last gradient before the base optimizer: infinity and NaN must not become weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatwise.descent import Late
from flatwise.directions import real
from flatwise.nograd import no_grad
from flatwise.norms import all_finite, joint_norm, kinds_of
from flatwise.record import StepRecord
from flatwise.shards import Sharding, agreed, all_plain, distinct, is_sharded, local, placed_like, shardings_of


def _numbers(grad: Tensor) -> Tensor:
    """Return the numbers of a gradient as a dense real tensor that shares its memory."""
    grad = grad._values() if grad.is_sparse else local(grad)
    return torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad


def _gradients(base: Optimizer) -> list[Tensor]:
    """Return all gradients as dense real tensors, of the parts that are here; they share their memory."""
    params = [p for group in base.param_groups for p in group["params"]]
    found = [grad for p in params if (grad := p.grad) is not None]
    if all_plain(found):
        return found
    for param in params:
        if param.grad is not None and is_sharded(param.grad):
            param.grad = placed_like(param, local(param.grad, param))
    return [_numbers(p.grad) for p in params if p.grad is not None]


def _over(base: Optimizer) -> list[Sharding | None]:
    """Return how each parameter with a gradient is cut over processes."""
    return shardings_of(p for group in base.param_groups for p in group["params"] if p.grad is not None)


@no_grad
def withhold_nonfinite(
    base: Optimizer, record: StepRecord, late: Late | None = None, *, first: bool = False, wait: bool = False
) -> bool:
    """Keep a non-finite gradient from the base optimizer, without waiting for a device.

    On the CPU the gradients are removed, so the base's step changes nothing, its state included. On an accelerator a
    fused base skips the step by itself, as it does for ``torch.amp.GradScaler``; for other bases the gradients
    become zero, so that weights stay finite (momentum and weight decay still act).

    Args:
        base: the optimizer about to step.
        record: takes the verdict.
        late: what is added after the base's step, which is judged with the gradients.
        first: judge the first gradient too, by its norm.
        wait: read the verdict from an accelerator, and remove the gradients there too.

    Returns:
        Whether a verdict was left with a fused base, to be removed by :func:`forget_verdict` after its step.
    """
    grads = _gradients(base)
    extra = [difference for _, difference in late or ()]
    finite = agreed(
        all_finite([*grads, *extra]), distinct(shardings_of(p for group in base.param_groups for p in group["params"]))
    )
    if first and record._norm is not None:
        on_host = isinstance(finite, bool) and record._norm.is_cpu
        finite = torch.isfinite(record._norm) & finite
        finite = bool(finite) if on_host else finite
    record._finite = finite = bool(finite) if wait else finite
    if isinstance(finite, bool):
        if not finite:
            for group in base.param_groups:
                for param in group["params"]:
                    param.grad = None
    elif getattr(base, "_step_supports_amp_scaling", False):
        if getattr(base, "found_inf", None) is None:  # a GradScaler has its own verdict
            base.grad_scale, base.found_inf = None, (~finite).to(torch.float32)  # type: ignore[attr-defined]
            return True
    else:
        for grad in grads:
            grad.masked_fill_(~finite.to(grad.device), 0)
    return False


@no_grad
def clip(base: Optimizer, record: StepRecord, largest: float) -> None:
    """Scale the gradients down to a norm, as ``torch.nn.utils.clip_grad_norm_`` does.

    Args:
        base: the optimizer about to step.
        record: takes the norm before clipping.
        largest: the L2 norm allowed, over all gradients.
    """
    grads = _gradients(base)
    if not grads:
        return
    record._update_norm = norm = joint_norm(grads, over=_over(base))
    factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
    if norm.is_cpu and factor == 1:
        return
    for kind in kinds_of(grads):
        torch._foreach_mul_(kind, factor.to(kind[0].device, kind[0].dtype))


@no_grad
def add_late(base: Optimizer, record: StepRecord, late: Late) -> None:
    """Take ``lr * difference`` from the weights after the base's step, unless the update was withheld.

    Args:
        base: the optimizer that has stepped.
        record: holds the verdict.
        late: pairs of a parameter and the difference, as real numbers.
    """
    finite = record._finite
    if finite is False:
        return
    rates = {p: group["lr"] for group in base.param_groups for p in group["params"]}
    for param, difference in late:
        change = difference * rates[param]
        if isinstance(finite, Tensor):
            change = torch.where(finite.to(change.device), change, 0)
        real(param.detach()).sub_(change)


@no_grad
def spoil_unless(finite: Tensor, grads: Sequence[Tensor]) -> None:
    """Write NaN into one gradient unless ``finite``, without reading it.

    Args:
        finite: a verdict on the device.
        grads: gradients; the smallest is written.
    """
    if grads:
        grad = _numbers(min(grads, key=Tensor.numel))
        grad.masked_fill_(~finite.to(grad.device), float("nan"))


def forget_verdict(base: Optimizer) -> None:
    """Remove the verdict that :func:`withhold_nonfinite` left with a fused base: it is for one step.

    Args:
        base: the optimizer that has stepped.
    """
    del base.grad_scale, base.found_inf  # type: ignore[attr-defined]
