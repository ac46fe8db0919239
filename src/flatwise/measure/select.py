"""Which parameters a measure is about: all, or those of a module, of a name, of a rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import Module

from flatwise.errors import UserError, nearest

Parameters = str | Module | Sequence[str | Tensor] | Callable[[str, Tensor], bool] | None
"""None: all. A regular expression, searched in the names. A module of the model. Names or tensors. A rule."""


def selected(model: Module, parameters: Parameters) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Find the parameters that a measure is about.

    Args:
        model: whose parameters.
        parameters: which of them.

    Returns:
        The trainable ones that were asked for, by name, and the names of frozen ones that were left out.

    Raises:
        UserError: if nothing was found, or a name or tensor is not of the model.
    """
    everything: dict[str, Tensor] = dict(model.named_parameters())
    if parameters is None:
        wanted = everything
    elif isinstance(parameters, str):
        wanted = {name: p for name, p in everything.items() if re.search(parameters, name)}
        if not wanted:
            raise UserError(f"no parameter's name matches {parameters!r}{nearest(parameters, everything)}")
    elif isinstance(parameters, Module):
        inside = {id(p) for p in parameters.parameters()}
        wanted = {name: p for name, p in everything.items() if id(p) in inside}
    elif callable(parameters):
        wanted = {name: p for name, p in everything.items() if parameters(name, p)}
    else:
        wanted = dict(_named(everything, entry) for entry in parameters)
    frozen = tuple(name for name, p in wanted.items() if not p.requires_grad)
    chosen = {name: p for name, p in wanted.items() if p.requires_grad}
    if not chosen:
        raise UserError(
            "there is no trainable parameter to measure"
            + (f": {', '.join(frozen[:3])} {'is' if len(frozen) == 1 else 'are'} frozen" if frozen else "")
        )
    return chosen, frozen


def _named(everything: dict[str, Tensor], entry: str | Tensor) -> tuple[str, Tensor]:
    if isinstance(entry, str):
        if entry not in everything:
            raise UserError(f"the model has no parameter {entry!r}{nearest(entry, everything)}")
        return entry, everything[entry]
    for name, p in everything.items():
        if p is entry:
            return name, p
    raise UserError(f"a tensor of shape {tuple(entry.shape)} was given that is no parameter of the model")
