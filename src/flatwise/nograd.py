"""``torch.no_grad`` for functions that call each other: the outermost one switches, those inside it only look.

A step goes through a dozen of them. torch's own decorator makes a new context for each call, which together takes as
long as the arithmetic of a small network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function without recording gradients.

    Args:
        function: no generator.

    Returns:
        The same function, to be called anywhere.
    """

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return inner
