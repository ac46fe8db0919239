"""Attention that can be differentiated twice.

The fused kernels of ``F.scaled_dot_product_attention`` have no second derivative; the math kernel has. A curvature
product needs it, so the forward pass runs with that kernel, and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

NOTICE = (
    "attention ran with torch's math kernel, which can be differentiated twice; the fused kernels cannot. "
    "The loss is the same up to rounding"
)

# Inside multi_head_attention_forward the mode is off, so that its own call is not seen.
_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


class _Watch(TorchFunctionMode):
    """Sees whether attention was called."""

    called = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the function, and call it."""
        self.called = self.called or func in _ATTENTION
        return func(*args, **(kwargs or {}))


@contextmanager
def twice_differentiable(note: Callable[[str], None]) -> Iterator[None]:
    """Let attention choose the kernel that has a double backward.

    Args:
        note: called with a sentence, if attention was met inside.
    """
    watch = _Watch()
    with sdpa_kernel(SDPBackend.MATH), watch:
        yield
    if watch.called:
        note(NOTICE)
