"""timm: a loss scaler that makes the second pass, and names such as ``sam-adamw`` for ``create_optimizer_v2``.

timm's loop hands a loss to its scaler, which does backward, clipping, step and update. This scaler is told how the loss
was computed, so that it can compute it again between backward and clipping. Nothing else in the loop changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flatwise.integrations.replay import Replay, climbing_together, find_sam
from flatwise.optimizer import SAM
from flatwise.variants import create, variant_info

try:
    from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers
    from timm.optim._optim_factory import default_registry  # timm has no public name for it
    from timm.utils import NativeScaler, dispatch_clip_grad
except ImportError as error:
    raise ImportError('SAM in timm needs timm: pip install "flatwise[timm]"') from error

NO_SAM = """found no flatwise.SAM in the optimizer. Make one by name, or wrap timm's:
    flatwise.integrations.timm.register("sam"); optimizer = create_optimizer_v2(model, "sam-adamw", lr=1e-3)
    optimizer = flatwise.SAM(create_optimizer_v2(model, "adamw", lr=1e-3), rho=0.05)"""

NOT_FORWARDED = """this loss is not the one that forward() returned last, so the second pass would compute another. \
Hand the function over, and whatever changes the loss (a division, a penalty) belongs inside of it:
    loss = loss_scaler.forward(_forward, input, target)   # in the place of _forward()
    loss_scaler(loss, optimizer, clip_grad=..., parameters=..., need_update=...)"""


class SAMNativeScaler(NativeScaler):  # type: ignore[misc]  # timm is not there where types are checked
    """``timm.utils.NativeScaler`` for an optimizer with :class:`flatwise.SAM` inside.

    Two lines of the loop change: how it is made, and ``loss = loss_scaler.forward(_forward, input, target)``. Of
    several micro-batches each is remembered, with its random state, until the step. Clipping sees the last gradient.

    Args:
        optimizer: a :class:`flatwise.SAM`, or what wraps one; a TypeError says so if there is none, a ValueError that
            ranks cannot climb apart here.
        device: as for timm's.
        enabled: scale losses. False: for loops without AMP, and with bfloat16.
    """

    def __init__(self, optimizer: Any, device: str = "cuda", enabled: bool = True) -> None:
        sam = climbing_together(optimizer, NO_SAM)
        self._sam, self._replay = sam, Replay()
        self._scaler = torch.amp.GradScaler(device, enabled=enabled)
        self._loss: Tensor | None = None
        self._clean: list[Tensor] = []
        self._perturbed: list[Tensor] = []
        sam.attach_scaler(self._scaler)

    def forward(self, forward: Callable[..., Tensor], *batch: Any) -> Tensor:
        """Compute the loss of a micro-batch, and remember how.

        Args:
            forward: returns the loss, divided by the number of micro-batches where there are several.
            *batch: for it. Pass what changes from one micro-batch to the next here: a function that reads it from
                the loop around it would see that of the last micro-batch.

        Returns:
            The loss, for the call that follows.

        Raises:
            BaseException: what ``forward`` raised.
        """
        if self._loss is not None:
            self._replay.forget_last()  # nobody differentiated it
        if not self._sam._method.has_gradients():
            self._forget()  # left over from a step that was given up
        around = _tensors_around(forward)
        self._replay.add(self._sam, lambda: self._again(forward, batch, around))
        self._loss = None
        try:
            self._loss = forward(*batch)
        except BaseException:
            self._replay.forget_last()
            raise
        return self._loss

    def __call__(
        self,
        loss: Tensor,
        optimizer: Any,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        need_update: bool = True,
    ) -> None:
        """Do what timm's does, with the second pass between backward and clipping.

        Args:
            loss: what :meth:`forward` returned.
            optimizer: as given to the constructor.
            clip_grad: bound for the last gradient.
            clip_mode: ``"norm"``, ``"value"`` or ``"agc"``.
            parameters: to clip; those of the optimizer by default.
            create_graph: must be False.
            need_update: False for all micro-batches of a step but the last.

        Raises:
            RuntimeError: if the loss is another one.
            ValueError: if the optimizer is another one, or differentiates gradients.
        """
        if loss is not self._loss:
            raise RuntimeError(NOT_FORWARDED)
        if find_sam(optimizer) is not self._sam:
            raise ValueError(
                "this loss scaler was made for another optimizer: make one with SAMNativeScaler(optimizer)"
            )
        if create_graph:
            raise ValueError(
                "create_graph=True keeps the graph at w + eps, where the weights no longer are: leave it out"
            )
        self._loss = None
        self._clean.append(loss.detach())
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if not need_update:
            return
        moved = self._replay.second_pass(self._sam, self._sam._method.ranks.apart)
        self._sam.last._loss = torch.stack(self._clean).sum()
        if moved:
            self._sam.last._perturbed_loss = torch.stack(self._perturbed).sum()
        self._forget()
        if clip_grad is not None:
            self._scaler.unscale_(optimizer)
            params = self._sam._method.params() if parameters is None else parameters
            dispatch_clip_grad(params, clip_grad, mode=clip_mode)
        self._scaler.step(optimizer)
        self._scaler.update()

    def _again(self, forward: Callable[..., Tensor], batch: tuple[Any, ...], around: dict[str, Any]) -> None:
        """Forward and backward of a micro-batch, at w + eps."""
        if any(value is not around.get(name) for name, value in _tensors_around(forward).items()):
            raise RuntimeError(
                "the function given to forward() reads tensors from the loop around it, and they have changed "
                "since: pass them, loss_scaler.forward(_forward, input, target) with def _forward(input, target)"
            )
        loss = forward(*batch)
        self._perturbed.append(loss.detach())
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def _forget(self) -> None:
        self._replay.clear()
        self._clean, self._perturbed = [], []


def _tensors_around(function: Any) -> dict[str, Any]:
    """Return the tensors, and batches of them, that a function reads from where it was defined."""
    if not inspect.isfunction(function):
        return {}
    found = inspect.getclosurevars(function)
    return {k: v for k, v in {**found.globals, **found.nonlocals}.items() if _holds_tensors(v)}


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(isinstance(part, Tensor) for part in value)
    return isinstance(value, Tensor) or (isinstance(value, dict) and _holds_tensors(list(value.values())))


def register(method: str = "sam", **options: Any) -> list[str]:
    """Give timm the names ``<method>-<optimizer>``, such as ``sam-adamw``, for every optimizer that it knows.

    ``create_optimizer_v2(model, "sam-adamw", lr=1e-3, rho=0.1)`` makes timm's own parameter groups and its optimizer,
    and wraps it. What the optimizer does not know is an option of the method; ``rho`` always is the radius.

    Args:
        method: one of :func:`flatwise.list_variants`.
        **options: defaults for it, such as ``rho``.

    Returns:
        The names.

    Raises:
        ValueError: if there is no such method, or it is no wrapper of an optimizer.
    """
    if variant_info(method).own is not None:
        raise ValueError(
            f"{method!r} is an optimizer of its own, and wraps none of timm's: make it with flatwise.create()"
        )
    names = []
    for base in list_optimizers():
        info = get_optimizer_info(base)
        if isinstance(info.opt_class, _Wrapped):
            continue
        name = f"{method}-{base}"
        summary = f"{method} (flatwise) around {base}"
        # timm logs a warning where a name is taken; the latest options count.
        default_registry._optimizers.pop(name, None)
        default_registry.register(
            replace(info, name=name, opt_class=_Wrapped(method, base, options), description=summary)
        )
        names.append(name)
    return names


class _Wrapped:
    """Makes an optimizer of timm's from parameters, with a method around it."""

    def __init__(self, method: str, base: str, options: dict[str, Any]) -> None:
        self._method, self._base, self._options = method, base, options

    def __call__(self, params: Any, **arguments: Any) -> SAM:
        base = get_optimizer_class(self._base, bind_defaults=False)
        known = inspect.signature(base).parameters.keys() - {"rho"}
        own = {name: arguments.pop(name) for name in arguments.keys() - known}
        return create(self._method, base(params, **arguments), **{**self._options, **own})
