"""Keeping a step out of what ``torch.compile`` traces: it moves weights in place, and decides by their numbers.

Traced, it would fall into a dozen fragments, with the radius as a constant in some of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])

REASON = """flatwise runs its step without torch.compile, around the closure too. Compile what the closure calls, and \
call the step outside: torch.compile(model), or torch.compile(loss_fn)"""


_WAITING: list[Callable[[], None]] = []


def eagerly(method: Method) -> Method:
    """Let ``torch.compile`` leave a method alone, from :func:`prepare` on.

    Args:
        method: what moves weights.

    Returns:
        The method; under ``fullgraph=True`` the error says what to compile instead.
    """
    alone: list[Callable[..., Any]] = [method]

    def disable() -> None:
        alone[0] = torch.compiler.disable(method, reason=REASON)  # type: ignore[no-untyped-call]

    _WAITING.append(disable)

    @functools.wraps(method)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return alone[0](*args, **kwargs)

    return cast(Method, inner)


def prepare() -> None:
    """Do what imports the compiler: not when flatwise is imported, and before anything of it can be traced."""
    while _WAITING:
        _WAITING.pop()()
