"""What a method remembers between steps: tensors per parameter, saved beside the base optimizer's state.

They are kept apart from ``base.state``, since several base optimizers take a state that is not empty for their own.
What a step learns before its update is put aside, and counts once the update is made: a step that fails, or is
withheld, teaches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatwise.nograd import no_grad
from flatwise.norms import COARSE
from flatwise.shards import local, placed_like

PREFIX = "sam_"
"""Begins the name of every entry of a saved state, and of every entry of a group, that is flatwise's."""

STEP = PREFIX + "step"
"""The entry of a group that counts the steps."""


class Memory:
    """Named tensors per parameter."""

    def __init__(self) -> None:
        self._kept: dict[Tensor, dict[str, Tensor]] = {}
        self._promised: dict[Tensor, dict[str, Tensor]] = {}
        self._next: dict[Tensor, dict[str, Tensor]] = {}
        self.numbers: dict[str, Any] = {}
        """Entries of the first group that count once the update is made."""

    def promise(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        """Let :meth:`save` name what will be remembered before anything is.

        torch.distributed.checkpoint loads into a fresh optimizer's own entries, so they must be there.

        Args:
            params: those that will have entries.
            names: of the entries.
        """
        for param in params:
            here = local(param.detach())
            here = torch.view_as_real(here) if here.is_complex() else here
            dtype = torch.float32 if here.dtype in COARSE else here.dtype
            blank = {name: torch.zeros_like(here, dtype=dtype if name == "average" else here.dtype) for name in names}
            if blank:
                self._promised.setdefault(param, {}).update(blank)

    def begin(self) -> None:
        """Forget promises: a step was made."""
        self._promised = {}

    def get(self, param: Tensor, name: str) -> Tensor | None:
        """Return what is remembered, in this step or before, or None."""
        new = self._next.get(param, {}).get(name)
        return self._kept.get(param, {}).get(name) if new is None else new

    def set(self, param: Tensor, name: str, value: Tensor) -> None:
        """Put a tensor aside, without a copy, until :meth:`settle`."""
        self._next.setdefault(param, {})[name] = value

    def zeros(self, param: Tensor, name: str, like: Tensor) -> Tensor:
        """Return what is remembered, zeros at first: shape of ``like``, in float32 or better. Not to be written."""
        known = self.get(param, name)
        if known is None:
            return torch.zeros_like(like, dtype=torch.float32 if like.dtype in COARSE else like.dtype)
        return known

    @no_grad
    def settle(self, group: dict[str, Any], finite: Tensor | bool | None) -> None:
        """Remember what was put aside, unless the update is withheld.

        Args:
            group: the first one.
            finite: the verdict; a tensor is not read.
        """
        if finite is not False:
            for param, entries in self._next.items():
                for name, value in entries.items():
                    if isinstance(finite, Tensor):
                        old = self._kept.get(param, {}).get(name, torch.zeros_like(value))
                        value = torch.where(finite.to(value.device), value, old.to(value.dtype))
                    self.keep(param, name, value)
            group.update(self.numbers)
        self.forget()

    def forget(self) -> None:
        """Forget what was put aside."""
        self._next, self.numbers = {}, {}

    def keep(self, param: Tensor, name: str, value: Tensor) -> None:
        """Remember a copy of ``value`` at once, in the same buffer as the last time where the shape is the same."""
        kept = self._kept.setdefault(param, {})
        known = kept.get(name)
        if known is None or known.shape != value.shape or known.dtype != value.dtype or known.device != value.device:
            kept[name] = value.detach().clone()
        else:
            known.copy_(value)

    def save(self, groups: Sequence[dict[str, Any]]) -> dict[int, dict[str, Tensor]]:
        """Return everything by the index that ``torch.optim`` gives a parameter in a state dict."""
        params = [param for group in groups for param in group["params"]]
        return {
            index: {PREFIX + name: placed_like(param, value) for name, value in entries.items()}
            for index, param in enumerate(params)
            if (entries := {**self._promised.get(param, {}), **self._kept.get(param, {})})
        }

    @no_grad
    def load(
        self,
        groups: Sequence[dict[str, Any]],
        saved: dict[Any, dict[str, Tensor]],
        saved_groups: Sequence[dict[str, Any]],
    ) -> None:
        """Replace everything by copies of what :meth:`save` returned, on the parameters' devices.

        As in torch, parameters are matched by their order: their keys may be indices, or the names that
        torch.distributed.checkpoint puts in their place. Before the first step there are promises only.
        """
        params = [param for group in groups for param in group["params"]]
        keys = [key for group in saved_groups for key in group["params"]]
        fresh = {key for group in saved_groups if group.get(STEP) == 0 for key in group["params"]}
        self._promised = {}
        self._kept = {
            param: {
                name.removeprefix(PREFIX): local(value.detach()).to(param.device, copy=True)
                for name, value in saved[key].items()
            }
            for key, param in zip(keys, params, strict=True)
            if key in saved and key not in fresh
        }


def split_state(state: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, dict[str, Tensor]]]:
    """Separate a saved state.

    Args:
        state: the ``"state"`` of a state dict.

    Returns:
        The base's own entries, and flatwise's.
    """
    base: dict[Any, Any] = {}
    ours: dict[Any, dict[str, Tensor]] = {}
    for index, entries in state.items():
        own = {k: v for k, v in entries.items() if isinstance(k, str) and k.startswith(PREFIX)}
        if own:
            ours[index] = own
        rest = {k: v for k, v in entries.items() if k not in own}
        if rest or not own:
            base[index] = rest
    return base, ours
