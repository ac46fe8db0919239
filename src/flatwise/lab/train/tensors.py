"""Tensors that may be cut over processes (FSDP2): gathered, cut alike, copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flatwise.shards import is_sharded, local


@torch.no_grad()
def put_state(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into those in use.

    Args:
        live: the tensors by name, whole or cut.
        saved: whole tensors, by the same names.

    Raises:
        KeyError: the names are others.
    """
    if set(live) != set(saved):
        raise KeyError(f"these names are in one of both states only: {sorted(set(live) ^ set(saved))[:3]}")
    for name, value in live.items():
        local(value).copy_(local(cut(saved[name], value)))


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that is cut over processes; every process must call it.

    Args:
        tensor: any.

    Returns:
        All of it; a tensor that is not cut is returned itself.
    """
    if is_sharded(tensor):
        full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
        return full
    return tensor.detach()


def whole_tree(value: Any) -> Any:
    """Gather every tensor in a nest of dicts; every process must call it."""
    if isinstance(value, Tensor):
        return whole(value)
    if isinstance(value, dict):
        return {key: whole_tree(entry) for key, entry in value.items()}
    return value


def cut(value: Any, like: Tensor) -> Any:
    """Cut a whole tensor as another one of its shape is cut.

    Args:
        value: a tensor, or anything else, which is returned itself.
        like: a tensor.

    Returns:
        This process's part of it where ``like`` is cut, as a tensor of the same kind.
    """
    if not (isinstance(value, Tensor) and is_sharded(like) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    placements: Any = like.placements  # type: ignore[attr-defined]
    # Every process has the whole, and keeps its own part: nothing is sent.
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)
