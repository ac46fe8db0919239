"""The second pass of a step whose first pass a framework ran: the same micro-batches again, at w + eps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from flatwise.guards import RandomState
from flatwise.optimizer import SAM


def find_sam(optimizer: Any) -> SAM | None:
    """Return the flatwise optimizer inside the wrappers of a framework.

    Args:
        optimizer: what the framework calls its optimizer; wrappers have it as ``.optimizer``, ``._optimizer``
            or ``._base_optimizer``.

    Returns:
        The optimizer; None where there is none inside.
    """
    for _ in range(8):  # no framework wraps that often
        inside = vars(optimizer) if optimizer is not None else {}
        within = next((inside[n] for n in ("optimizer", "_optimizer", "_base_optimizer") if n in inside), None)
        if within is None:  # asked first: Lightning's wrappers claim to be of the class that they wrap
            return optimizer if isinstance(optimizer, SAM) else None
        optimizer = within
    return None


def climbing_together(optimizer: Any, missing: str) -> SAM:
    """Return the flatwise optimizer inside the wrappers of a framework that sums every gradient over ranks.

    Args:
        optimizer: what the framework calls its optimizer.
        missing: what to say where there is none inside.

    Returns:
        The optimizer.

    Raises:
        TypeError: if there is none.
        ValueError: if ranks are to climb apart.
    """
    sam = find_sam(optimizer)
    if sam is None:
        raise TypeError(missing)
    if sam._method.ranks.local:
        raise ValueError(
            "the framework sums the first gradient over all ranks, so that there is one perturbation for all: "
            "leave sync_ascent out"
        )
    return sam


class Replay:
    """Remembers the micro-batches of a step, and runs them again."""

    def __init__(self) -> None:
        self._parts: list[tuple[Callable[[], object], RandomState]] = []

    def __len__(self) -> int:
        """Return the number of micro-batches of this step so far."""
        return len(self._parts)

    def add(self, optimizer: SAM, run: Callable[[], object]) -> None:
        """Remember a micro-batch; call it before the micro-batch's first forward pass.

        Args:
            optimizer: whose parameters say which devices have random states to keep.
            run: forward and backward on it, with its share of the loss, without clearing gradients.
        """
        devices = {param.device for group in optimizer.param_groups for param in group["params"]}
        # A state of its own for each: a framework may draw random numbers between micro-batches.
        self._parts.append((run, RandomState(devices)))

    def forget_last(self) -> None:
        """Forget the latest micro-batch: it failed, and those before it have left their gradients."""
        self._parts.pop()

    def clear(self) -> None:
        """Forget the micro-batches."""
        self._parts = []

    def second_pass(self, optimizer: SAM, apart: Callable[[], AbstractContextManager[Any]] = nullcontext) -> bool:
        """Perturb, run every micro-batch again, and restore; then ``step()`` without closure is the base's step.

        If a micro-batch raises, the weights are at w, and nothing is left to step with.

        Args:
            optimizer: with the gradients of the first pass in ``.grad``.
            apart: inside it no gradients are summed over ranks; that is left to the last micro-batch.

        Returns:
            Whether a second pass was made.

        Raises:
            BaseException: what a micro-batch raised.
        """
        parts, self._parts = self._parts, []
        if not optimizer.perturb():
            return False
        try:
            if optimizer._method.one_pass:
                optimizer._guard.between()  # it would not have wanted the first pass, which has written to buffers
            for number, (run, random) in enumerate(parts):
                if not optimizer._fresh_masks:
                    random.put()
                with nullcontext() if number == len(parts) - 1 else apart():
                    run()
        except BaseException:
            optimizer._abandon()
            raise
        optimizer.restore()
        return True
