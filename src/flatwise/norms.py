"""One joint norm over many tensors, whatever their devices, dtypes and layouts.

The radius of SAM is a radius in the space of *all* perturbed weights, so its norm is one number over all of
them. Three things go wrong elsewhere and are settled here: half-precision gradients whose squares leave the
range of float16, tiny or huge float32 gradients whose squares leave the range of float32, and parameters
spread over devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from flatwise.shards import DTYPE, Sharding

SMALL = 1 << 16
"""Tensors below this many elements are packed together: for them a launch costs more than the bytes."""


FEW = 8
"""So many tensors are not packed: that costs more than their launches."""

BLOCK = 1 << 18
"""Elements worked on at once where there are many; fewer in all are packed, whatever their sizes."""

IS_CPU = attrgetter("is_cpu")
"""To be mapped over many tensors, as ``DTYPE``."""

COARSE = frozenset({torch.float16, torch.bfloat16})
"""Dtypes of weights so coarse that a perturbation must be measured to be known."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a norm of ``dtype`` is accumulated: float32 or better."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def kinds_of(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors by device and dtype, since one foreach call serves one kind.

    Args:
        tensors: any tensors.

    Returns:
        The groups, in the order in which they are met.
    """
    if not tensors:
        return []
    if all(map(IS_CPU, tensors)) and len(set(map(DTYPE, tensors))) == 1:
        return [list(tensors)]
    return [lists[0] for lists, _ in _group_tensors_by_device_and_dtype([list(tensors)]).values()]  # type: ignore[misc]


def packs(*lists: Iterable[Tensor], limit: int = BLOCK) -> list[tuple[list[Tensor], ...]]:
    """Cut parallel lists of tensors into packs of one device and dtype with at most ``limit`` elements each.

    Args:
        *lists: lists of equal length whose i-th tensors belong together.
        limit: elements per pack (of the first list). Larger tensors are cut into views of that size; one that is not
            contiguous makes a pack of its own.

    Returns:
        The packs, each a tuple of parallel lists. Temporaries made pack by pack stay small beside the weights.
    """
    open_packs: dict[tuple[object, ...], tuple[int, tuple[list[Tensor], ...]]] = {}
    result: list[tuple[list[Tensor], ...]] = []
    for row in _cut(zip(*lists, strict=True), limit):
        kind = tuple((t.device, t.dtype) for t in row)
        size, pack = open_packs.get(kind, (limit, ()))
        if size + row[0].numel() > limit:
            size, pack = 0, tuple([] for _ in row)
            result.append(pack)
        for part, tensor in zip(pack, row, strict=True):
            part.append(tensor)
        open_packs[kind] = (size + row[0].numel(), pack)
    return result


def _cut(rows: Iterable[tuple[Tensor, ...]], limit: int) -> Iterator[tuple[Tensor, ...]]:
    for row in rows:
        if row[0].numel() > limit and all(t.is_contiguous() for t in row):
            yield from zip(*(torch.split(t.view(-1), limit) for t in row), strict=True)
        elif row[0].numel():
            yield row


def _host_norms(kind: list[Tensor], q: float, dtype: torch.dtype) -> list[Tensor]:
    """Norms on the CPU: large tensors one by one, small ones joined, since there a launch is what costs."""
    small, large = _by_size(kind)
    # Float32 sums of squares lose digits over millions of elements: the blocks are combined in float64.
    blocks = [block for t in large for block in _blocks(t)]
    if small:
        blocks.append(_flatten_dense_tensors(small))  # type: ignore[no-untyped-call]
    wider = None if kind[0].dtype == dtype else dtype
    return [torch.linalg.vector_norm(t, q, dtype=wider) for t in blocks if t.numel()]


def _by_size(kind: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Part tensors into those to be worked on together and those that are worked on one by one."""
    if len(kind) <= FEW:
        return [], list(kind)
    sizes = [t.numel() for t in kind]
    if sum(sizes) <= BLOCK or max(sizes) < SMALL:
        return list(kind), []
    small = [t for t, size in zip(kind, sizes, strict=True) if size < SMALL]
    return small, [t for t, size in zip(kind, sizes, strict=True) if size >= SMALL]


def _device_norms(kind: list[Tensor], q: float, dtype: torch.dtype) -> list[Tensor]:
    """Norms on an accelerator: one foreach launch, nothing read back."""
    full = [t for t in kind if t.numel()]
    return list(torch._foreach_norm(full, q, dtype=dtype)) if full else [kind[0].new_zeros((), dtype=dtype)]


def _all_norms(tensors: Sequence[Tensor], q: float, dtype: torch.dtype | None = None) -> list[Tensor]:
    norms: list[Tensor] = []
    for kind in kinds_of(tensors):
        of_kind = _host_norms if kind[0].device.type == "cpu" else _device_norms
        norms += of_kind(kind, q, dtype or accumulation_dtype(kind[0].dtype))
    return norms


def combine(norms: Sequence[Tensor], q: float) -> Tensor:
    """Return the ``q``-norm of a vector whose parts have the ``q``-norms ``norms`` (0-dim tensors)."""
    if len(norms) == 1:
        return norms[0]
    device = norms[0].device
    stacked = torch.stack([n.to(device) for n in norms])
    dtype = torch.float64 if device.type != "mps" else None  # which has no float64
    total: Tensor = torch.linalg.vector_norm(stacked, q, dtype=dtype)
    return total.to(stacked.dtype)


def joint_norm(tensors: Sequence[Tensor], q: float = 2.0, over: Sequence[Sharding | None] | None = None) -> Tensor:
    """Return the ``q``-norm of all tensors taken as one vector.

    Args:
        tensors: dense real tensors of any shapes, dtypes and devices; empty ones count as nothing.
        q: order, 1 <= q <= inf.
        over: how each of them is cut, where other processes hold the rest. All processes must call it then.

    Returns:
        A 0-dim tensor on the device of the first tensor, float32, or float64 where any tensor is float64.
        On the CPU a result whose q-th power is near the edge of its dtype is taken again in units of the largest
        element, in float64. On an accelerator that would wait for the device, so it is not done there.
    """
    if over is not None and any(over):
        parts = {s: [t for t, o in zip(tensors, over, strict=True) if o == s] for s in dict.fromkeys(over)}
        return combine([reduced(joint_norm(ts, q), q, s, _width(ts)) for s, ts in parts.items()], q)
    if all(map(IS_CPU, tensors)):
        return _host_norm(tensors, q)
    return combine(_all_norms(tensors, q), q)


def _width(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def reduced(norm: Tensor, q: float, over: Sharding | None, width: torch.dtype = torch.float32) -> Tensor:
    """Return the ``q``-norm of a vector of which every process holds a part.

    Args:
        norm: the norm of the part here, 0-dim.
        q: order.
        over: how the vector is cut; None where all of it is here.
        width: dtype of the result, where it lies well inside its range.

    Returns:
        The norm of all, the same on every process.
    """
    if over is None:
        return norm
    wide = norm.double() if norm.device.type != "mps" else norm
    if math.isinf(q):
        total = over.reduce(wide, "MAX")
        # A NaN of one process is none of the largest of several, and must reach all.
        total = torch.where(over.reduce(torch.isnan(wide).to(wide)) > 0, math.nan, total)
    else:
        total = over.reduce(wide**q) ** (1 / q)
    narrow = total.to(width)
    if not narrow.is_cpu or _comfortable(float(total), q, width) or float(total) == 0:
        return narrow
    return total


def _host_norm(tensors: Sequence[Tensor], q: float) -> Tensor:
    """The joint norm on the CPU, in Python numbers once there are few: reading one costs less than a launch."""
    norms = _all_norms(tensors, q)
    value = _sum_up(list(map(float, norms)), q)
    double = torch.float64 in map(DTYPE, norms)
    if norms and not _comfortable(value, q, torch.float64 if double else torch.float32):
        peak = _sum_up([float(n) for n in _all_norms(tensors, math.inf)], math.inf)
        if 0 < peak < math.inf:
            blocks = [block for t in tensors for block in _blocks(t) if block.numel()]
            value = peak * _sum_up([float(torch.linalg.vector_norm(b.double() / peak, q)) for b in blocks], q)
            double = True
        else:
            value = peak
    elif len(norms) == 1:
        return norms[0]
    return torch.tensor(value, dtype=torch.float64 if double else torch.float32)


def _sum_up(norms: Sequence[float], q: float) -> float:
    """Return the ``q``-norm of a vector whose parts have these ``q``-norms."""
    if q == 2:
        return math.hypot(*norms)
    peak = max(norms, default=0.0)
    if len(norms) <= 1 or peak == 0 or any(map(math.isnan, norms)) or math.isinf(peak):
        return math.nan if any(map(math.isnan, norms)) else peak
    return peak if math.isinf(q) else float(peak * math.fsum([(n / peak) ** q for n in norms]) ** (1 / q))


def _comfortable(value: float, q: float, dtype: torch.dtype) -> bool:
    """Tell whether a norm and the powers it was summed from lie well inside the range of their dtype."""
    if math.isnan(value) or math.isinf(q):
        return True
    low, high = (-280.0, 300.0) if dtype == torch.float64 else (-30.0, 37.0)
    return 0 < value < math.inf and low < q * math.log10(value) < high


def filter_norms(w: Tensor) -> Tensor:
    """Return the norm of each slice of the first dimension, in a shape that broadcasts to that of ``w``.

    Args:
        w: real; in a tensor of one dimension each element is its own slice.

    Returns:
        Shape (n, 1, ..., 1), or that of ``w``.
    """
    if w.dim() < 2:
        return w.abs()
    norms: Tensor = torch.linalg.vector_norm(w, dim=tuple(range(1, w.dim())), keepdim=True)
    return norms


def joint_dot(xs: Sequence[Tensor], ys: Sequence[Tensor], over: Sequence[Sharding | None] | None = None) -> Tensor:
    """Return the inner product of two lists of tensors, each taken as one vector, without waiting for a device.

    Args:
        xs: dense real tensors.
        ys: tensors of the same shapes and devices.
        over: how each of them is cut, where other processes hold the rest. All processes must call it then.

    Returns:
        A 0-dim tensor on the device of the first tensor, summed in float64 where the device has it.
    """
    if over is not None and any(over):
        total = torch.zeros(())
        for sharding in dict.fromkeys(over):
            mine = [index for index, o in enumerate(over) if o == sharding]
            dot = joint_dot([xs[i] for i in mine], [ys[i] for i in mine])
            total = (dot if sharding is None else sharding.reduce(dot)) + total.to(dot)
        return total
    parts = []
    for x, y in zip(xs, ys, strict=True):
        dtype = accumulation_dtype(x.dtype)
        parts.append(torch.dot(x.reshape(-1).to(dtype), y.reshape(-1).to(dtype)))
    if not parts:
        return torch.zeros(())
    device = parts[0].device
    wide = torch.float64 if device.type != "mps" else torch.float32
    return torch.stack([part.to(device, wide) for part in parts]).sum()


def all_finite(tensors: Sequence[Tensor]) -> bool | Tensor:
    """Tell whether every element of every tensor is finite, without waiting for a device.

    Args:
        tensors: dense real tensors.

    Returns:
        True or False where all are on the CPU; otherwise a 0-dim bool tensor on an accelerator.
    """
    host, device = True, []
    for kind in kinds_of(tensors):
        if kind[0].device.type != "cpu":
            device.append(_device_finite(kind))
        elif host:
            host = _host_finite(kind)
    if not device:
        return host
    verdict = torch.stack([v.to(device[0].device) for v in device]).all()
    return verdict if host else torch.zeros_like(verdict)


def _device_finite(kind: list[Tensor]) -> Tensor:
    """Check in one launch, that of torch.amp.GradScaler, scaling by exactly 1."""
    return _found_in(kind) == 0


def _found_in(kind: list[Tensor]) -> Tensor:
    found = torch.zeros((), device=kind[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(kind, found, torch.ones_like(found))
    return found


def _host_finite(kind: list[Tensor]) -> bool:
    """Check small tensors as on a device; that writes every byte back, so large ones are only read."""
    small, large = _by_size(kind)
    if small and float(_found_in(small)):
        return False
    for tensor in large:
        # One infinity or NaN makes the sum one. So may finite numbers; only then look at every element.
        total = float(tensor.sum(dtype=accumulation_dtype(tensor.dtype)))
        if not math.isfinite(total) and not all(map(_every_element_finite, _blocks(tensor))):
            return False
    return True


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.numel() <= BLOCK:
        return (tensor,)
    return torch.split(tensor.reshape(-1), BLOCK)


def _every_element_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
