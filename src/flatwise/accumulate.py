"""Gradient accumulation: several closures are one batch, and every pass replays all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from flatwise.passes import Closure, checked_loss, removed

CLEARED = """a closure of opt.step([...]) cleared the gradients of those before it: flatwise clears once for each \
pass. Leave zero_grad() out, and let each closure bring its share of the mean:
    def closure(part=part):
        loss = loss_fn(model(part.x), part.y) / len(parts)
        loss.backward()
        return loss"""


def joined(
    closures: Sequence[Closure],
    clear: Callable[[], None],
    params: Sequence[Tensor],
    apart: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Closure:
    """Make one closure of several.

    Args:
        closures: each does forward and backward on its micro-batch, without clearing gradients, and returns its
            share of the loss.
        clear: clears all gradients.
        params: all parameters.
        apart: inside it no gradients are summed over ranks; that is left to the last closure.

    Returns:
        A closure that clears once, runs all of them, and returns the sum.
    """

    def closure() -> Any:
        clear()
        total: Any = 0
        for number, part in enumerate(closures):
            last = number == len(closures) - 1
            with refuse_clearing(params) if number else nullcontext(), nullcontext() if last else apart():
                total = total + checked_loss(part())
        return total

    return closure


@contextmanager
def refuse_clearing(params: Sequence[Tensor]) -> Iterator[None]:
    """Raise if the gradients that exist on entry were cleared, in place or not, on leaving.

    Args:
        params: all parameters; the smallest with a gradient is watched.

    Yields:
        Nothing.

    Raises:
        RuntimeError: if gradients were cleared.
    """
    usable = (p for p in params if p.grad is not None and p.requires_grad and not p.grad.is_sparse)
    param = min(usable, key=Tensor.numel, default=None)
    if param is None or param.grad is None:
        yield
        return
    grad, version, intact = param.grad, param.grad._version, list[bool]()

    def arrive(_: Tensor) -> None:
        # Asked before anything is added: a wrapper that sums over ranks writes into the gradient afterwards.
        if not intact:
            intact.append(param.grad is grad and grad._version == version)

    with removed(lambda: param.register_hook(arrive)):  # type: ignore[no-untyped-call]
        yield
    arrive(grad)  # where nothing arrived
    if not intact[0]:
        raise RuntimeError(CLEARED)
