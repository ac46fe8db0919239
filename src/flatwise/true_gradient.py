"""Telling layers whose backward pass draws anew in which passes they must differentiate what they computed.

Shake-Shake (Gastaldi, 2017) and ShakeDrop (Yamada et al., 2018) mix branches at random, and mix the gradients by
another draw: what comes back is the gradient of no function. SAM climbs along a gradient, so its first pass wants the
true one; the pass whose gradient the base optimizer sees keeps the layer's own rule. So does the SAM authors' code.

flatwise sets the flag in the passes that it runs itself (``step`` with a closure or a batch). A layer reads it in its
forward pass, and must draw as many random numbers whatever it reads: both passes replay one random state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# For all threads: those of DataParallel and of a backward pass that computes activations again must see it.
_wanted = False


def true_gradient_wanted() -> bool:
    """Tell a layer, in its forward pass, what its backward pass must give.

    Returns:
        Whether it must be the derivative of the output.
    """
    return _wanted


@contextmanager
def true_gradients() -> Iterator[None]:
    """Have layers give the derivative of their output, for forward and backward passes inside the ``with`` block.

    For a first pass that you run yourself (before ``first_step()``, ``perturbed()`` or ``perturb()``), and wherever
    else a gradient is wanted for what it is.

    Yields:
        Nothing.
    """
    global _wanted
    before = _wanted
    try:
        try:
            _wanted = True
            yield
        finally:
            _wanted = before
    finally:  # an interrupt can come between the lines of the one above
        _wanted = before
