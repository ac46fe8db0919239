"""Whether tensors are the same, bit for bit, without keeping them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def bits(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor, row by row.

    Args:
        tensor: on any device.

    Returns:
        As many as its elements take.
    """
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Make one short text of tensors.

    Args:
        tensors: any.

    Returns:
        Different where a bit is.
    """
    together = hashlib.sha256()
    for tensor in tensors:
        together.update(bits(tensor))
    return together.hexdigest()
