"""Gradients of a scaled loss: all that flatwise asks of a ``torch.amp.GradScaler``.

Every pass is unscaled as soon as it ends, so that whatever depends on the size of a gradient sees the true one. Each
pass has a key of its own in the scaler: an infinity in any of them makes ``scaler.update()`` back off, once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flatwise.nograd import no_grad
from flatwise.shards import local

NOT_ATTACHED = """scaler.step(opt, closure) was called, and the optimizer does not know the scaler: its gradients \
would stay scaled. Attach it once, and step with the optimizer itself:
    opt.attach_scaler(scaler)            # or SAM(base, grad_scaler=scaler)
    opt.step(closure)                    # closure: opt.zero_grad(), forward, scaler.scale(loss).backward(), return loss
    scaler.update()"""


class _Pass:
    """What ``unscale_`` wants to see of an optimizer."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups


class Scaling:
    """The scale of the loss, where there is one."""

    def __init__(self) -> None:
        self._scaler: Any = None
        self._passes: list[_Pass] = []
        self._stepped = False

    def attach(self, scaler: Any, device: torch.device) -> None:
        """Use a scaler from now on.

        Args:
            scaler: a ``torch.amp.GradScaler`` or what behaves like one, or None for none.
            device: of the parameters.

        Raises:
            TypeError: if it is no scaler.
        """
        if scaler is not None and not all(hasattr(scaler, name) for name in ("scale", "unscale_", "is_enabled")):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
        self._scaler = scaler
        if self.on:
            self.factor(device)  # a scaler makes its scale on first use, and scaler.step(opt, closure) wants it before

    @property
    def on(self) -> bool:
        """Whether losses are scaled."""
        return self._scaler is not None and bool(self._scaler.is_enabled())

    def through_scaler(self, optimizer: Any) -> bool:
        """Tell whether ``scaler.step(optimizer, closure)`` is what called.

        Args:
            optimizer: whose step begins.

        Returns:
            True where it is.

        Raises:
            RuntimeError: if that scaler was not attached.
        """
        called = "grad_scale" in optimizer.__dict__  # a scaler leaves it there for the time of the call
        if called and not self.on:
            raise RuntimeError(NOT_ATTACHED)
        return called

    def begin(self) -> None:
        """Begin a step."""
        # A key is the identity of an object, so the keys of a step live until the next; after a step that failed
        # nobody has called update(), and the scaler knows its keys still: they must not be those of new objects.
        if self._stepped:
            self._passes, self._stepped = [], False

    def end(self) -> None:
        """End a step that did not fail."""
        self._stepped = True

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss to call ``backward()`` on."""
        return self._scaler.scale(loss) if self.on else loss

    def factor(self, device: torch.device) -> Tensor:
        """Return the scale, without waiting for a device."""
        return self._scaler.scale(torch.ones((), device=device))  # type: ignore[no-any-return]

    def unscale(self, groups: list[dict[str, Any]]) -> None:
        """Bring the gradients of a pass to their true scale.

        Args:
            groups: parameter groups whose gradients are in ``.grad``.
        """
        if self.on and any(p.grad is not None for group in groups for p in group["params"]):
            self._passes.append(_Pass(groups))
            self._scaler.unscale_(self._passes[-1])

    @no_grad
    def scale(self, params: Iterable[Tensor], *, back: bool = False) -> None:
        """Multiply gradients by the scale, or divide by it: exact, unless somebody chose a scale that is no power of 2.

        Args:
            params: parameters.
            back: divide.
        """
        if not self.on:
            return
        for param in params:
            if param.grad is not None:
                factor = self.factor(param.grad.device)
                local(param.grad).mul_(factor.reciprocal() if back else factor)
