"""Keeping a step out of what ``torch.compile`` traces: it moves weights in place, and decides by their numbers.

Traced, it would fall into a dozen fragments, with the radius as a constant in some of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P, R = ParamSpec("P"), TypeVar("R")

REASON = """flatwise runs its step without torch.compile, around the closure too. Compile what the closure calls, and \
call the step outside: torch.compile(model), or torch.compile(loss_fn)"""


def eagerly(method: Callable[P, R]) -> Callable[P, R]:
    """Let ``torch.compile`` leave a method alone.

    Args:
        method: what moves weights.

    Returns:
        The method; under ``fullgraph=True`` the error says what to compile instead.
    """

    @functools.wraps(method)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        disabled = getattr(method, "_disabled", None)
        if disabled is None:  # not before: it imports the compiler
            disabled = torch.compiler.disable(method, reason=REASON)
            method._disabled = disabled  # type: ignore[attr-defined]
        return disabled(*args, **kwargs)  # type: ignore[no-any-return]

    return inner
