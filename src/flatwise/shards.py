"""Parameters of which a process holds a part: ``DTensor`` of FSDP2 (``fully_shard``), HSDP and tensor parallelism.

All arithmetic is done on the part that is here, which shares its memory with the parameter. Only what is one number
over all parameters (a norm, an inner product, a verdict) goes over the wire: each is reduced over the dimensions of the
device mesh that a parameter is cut along, and not over those that hold replicas.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

_WHOLE = frozenset({Parameter, Tensor})
_DENSE = frozenset({torch.strided})
_LAYOUT, DTYPE = attrgetter("layout"), attrgetter("dtype")


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a ``DTensor``, without importing what is not in use."""
    if type(tensor) in _WHOLE:  # the common case, asked for every parameter in every step
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Tell whether one of the tensors is a ``DTensor``."""
    tensors = list(tensors)
    return not _WHOLE.issuperset(map(type, tensors)) and any(map(is_sharded, tensors))


def all_plain(tensors: Collection[Tensor]) -> bool:
    """Tell whether all tensors are whole, dense and real, as nearly always: then none needs a view of its own."""
    return (
        _WHOLE.issuperset(map(type, tensors))
        and _DENSE.issuperset(map(_LAYOUT, tensors))
        and not any(dtype.is_complex for dtype in set(map(DTYPE, tensors)))
    )


@dataclass(frozen=True)
class Sharding:
    """How a tensor is cut.

    Attributes:
        mesh: the device mesh.
        cut: pairs of a dimension of the mesh and the dimension of the tensor that is cut along it.
    """

    mesh: Any
    cut: tuple[tuple[int, int], ...]

    @property
    def by_rows(self) -> bool:
        """Whether each slice of the first dimension is whole."""
        return all(dim == 0 for _, dim in self.cut)

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return math.prod(self.mesh.size(dim) for dim, _ in self.cut)

    @property
    def index(self) -> int:
        """Which part this process holds: equal on replicas, and 0 for the first."""
        place = 0
        for dim, _ in self.cut:
            place = place * self.mesh.size(dim) + self.mesh.get_local_rank(dim)
        return place

    def reduce(self, value: Tensor, how: Literal["SUM", "MAX", "MIN"] = "SUM") -> Tensor:
        """Reduce a number over all parts of the tensor; every process that holds one must call it.

        Args:
            value: a 0-dim tensor, on any device.
            how: the name of a ``ReduceOp``.

        Returns:
            The result, on the device of ``value``, the same on every process.
        """
        kind = self.mesh.device_type
        moved = value.detach().clone() if value.device.type == kind else value.to(kind)
        for dim, _ in self.cut:
            distributed.all_reduce(moved, getattr(distributed.ReduceOp, how), group=self.mesh.get_group(dim))
        return moved.to(value.device)


@lru_cache(maxsize=256)
def _sharding(mesh: Any, placements: tuple[Any, ...]) -> Sharding:
    cut = tuple((place, int(p.dim)) for place, p in enumerate(placements) if hasattr(p, "dim"))
    return Sharding(mesh, cut)


def sharding_of(tensor: Tensor) -> Sharding | None:
    """Return how a tensor is cut.

    Args:
        tensor: any.

    Returns:
        None where this process holds all of it.
    """
    if not is_sharded(tensor):
        return None
    known = _sharding(tensor.device_mesh, tuple(tensor.placements))  # type: ignore[attr-defined]
    return known if known.cut else None


def shardings_of(tensors: Iterable[Tensor]) -> list[Sharding | None]:
    """Return how each tensor is cut."""
    tensors = list(tensors)
    if not any_sharded(tensors):
        return [None] * len(tensors)
    return [sharding_of(tensor) for tensor in tensors]


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the part of a tensor that is here; it shares the memory.

    Args:
        tensor: a gradient, a weight, a state.
        like: the parameter that it belongs to. A gradient that is placed otherwise (tensor parallelism leaves sums to
            be made) is brought to its placement.

    Returns:
        A plain tensor.
    """
    if not is_sharded(tensor):
        return tensor
    if like is not None and is_sharded(like) and tensor.placements != like.placements:  # type: ignore[attr-defined]
        tensor = tensor.redistribute(like.device_mesh, like.placements)  # type: ignore[attr-defined]
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    wait = getattr(part, "wait", None)  # of an asynchronous collective
    return part if wait is None else wait()


def placed_like(param: Tensor, part: Tensor) -> Tensor:
    """Return a tensor whose part here is ``part``, cut as the parameter is.

    Args:
        param: the parameter.
        part: plain, with the shape of its part here; of a complex parameter, also as real numbers.

    Returns:
        ``part`` itself where the parameter is whole.
    """
    if not is_sharded(param) or is_sharded(part):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=(shape := torch.Size((*param.shape, *part.shape[param.dim() :]))),
        stride=torch.empty(shape, device="meta").stride(),
    )


def distinct(over: Iterable[Sharding | None]) -> list[Sharding]:
    """Return the different ways of being cut, in their order, without those that another one covers.

    Args:
        over: of all parameters, so that every process comes to the same answer.

    Returns:
        What a verdict must be reduced over.
    """
    found = list(dict.fromkeys(filter(None, over)))

    def covered(one: Sharding) -> bool:
        dims = {dim for dim, _ in one.cut}
        later = found.index(one)
        for place, other in enumerate(found):
            others = {dim for dim, _ in other.cut}
            if other is not one and other.mesh == one.mesh and dims <= others and (dims < others or place < later):
                return True
        return False

    return [one for one in found if not covered(one)]


def agreed(finite: bool | Tensor, over: Sequence[Sharding]) -> bool | Tensor:
    """Return whether a verdict is true on every process.

    Args:
        finite: the verdict here.
        over: from :func:`distinct`.

    Returns:
        Of the same kind as ``finite``.
    """
    if not over:
        return finite
    vote = finite.to(torch.float32) if isinstance(finite, Tensor) else torch.tensor(float(finite))
    for sharding in over:
        vote = sharding.reduce(vote, "MIN")
    return vote > 0 if isinstance(finite, Tensor) else bool(vote > 0)


def reshard(modules: Iterable[torch.nn.Module]) -> None:
    """Let the next forward pass gather the weights anew: what was gathered before they moved is stale.

    Args:
        modules: the outermost modules.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)
    if kind is not None:
        for root in modules:
            for part in root.modules():
                if isinstance(part, kind):
                    part.reshard()
