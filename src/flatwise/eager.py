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


def eagerly(method: Method) -> Method:
    """Let ``torch.compile`` leave a method alone.

    Args:
        method: what moves weights.

    Returns:
        The method; under ``fullgraph=True`` the error says what to compile instead.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def inner(*args: Any, **kwargs: Any) -> Any:
        if not disabled:  # not before: it imports the compiler
            disabled.append(torch.compiler.disable(method, reason=REASON))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return cast(Method, inner)
