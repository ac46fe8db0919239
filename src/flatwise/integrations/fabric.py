"""Lightning Fabric: ``optimizer.step(closure)`` where Fabric scales losses, and several closures for one step.

Fabric hands a closure on to the optimizer, so a :class:`flatwise.SAM` works as it is. Where it scales losses, torch's
scaler refuses closures: there the optimizer must know the scaler, and be stepped past it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flatwise.integrations.replay import find_sam


def sam_step(fabric: Any, optimizer: Any, closure: Callable[[], Any] | Sequence[Callable[[], Any]]) -> Tensor:
    """Take one step in any of Fabric's precisions.

    Args:
        fabric: the ``Fabric`` object.
        optimizer: what ``fabric.setup`` returned for a :class:`flatwise.SAM`.
        closure: ``optimizer.zero_grad()``, forward, ``fabric.backward(loss)``, ``return loss``. A list of them
            accumulates: each adds the gradients of its share of the loss, and clears none.

    Returns:
        The loss at w, detached.

    Raises:
        TypeError: if there is no :class:`flatwise.SAM` inside the optimizer.
    """
    sam = find_sam(optimizer)
    if sam is None:
        raise TypeError(
            "sam_step got an optimizer without a flatwise.SAM inside: "
            "model, optimizer = fabric.setup(model, flatwise.SAM(base_optimizer, rho))"
        )
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    if scaler is None:
        return optimizer.step(closure)  # type: ignore[no-any-return]
    sam.attach_scaler(scaler)
    loss = sam.step(closure)
    scaler.update()
    fabric.call("on_after_optimizer_step", strategy=fabric.strategy, optimizer=sam)  # as Fabric's own step does
    return loss
