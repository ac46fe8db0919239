"""Whether tensors are the same, bit for bit, without keeping them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

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


def fingerprint_of_batches(batches: Iterable[Any]) -> str:
    """Make one short text of batches.

    Args:
        batches: nests of tuples, lists and mappings.

    Returns:
        Different where a bit of a tensor, its shape or its type is, or a number or a text between them. Of other
        objects only the type is seen.
    """
    together = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            together.update(f"{value.dtype}{tuple(value.shape)}".encode())
            together.update(bits(value))
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                add(key)
                add(entry)
        elif isinstance(value, tuple | list):
            together.update(f"{len(value)} entries".encode())
            for entry in value:
                add(entry)
        else:
            known = isinstance(value, str | bytes | int | float | complex | None)
            together.update((repr(value) if known else type(value).__name__).encode())

    for batch in batches:
        add(batch)
    return together.hexdigest()


def everywhere(mine: str, group: Any) -> list[str]:
    """Collect a text from every process.

    Args:
        mine: of this process.
        group: the processes; None: this one alone.

    Returns:
        One from each, in the order of their ranks.
    """
    if group is None:
        return [mine]
    everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyone, mine, group=group)
    return everyone
