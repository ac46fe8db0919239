"""What a step costs, on paper: bytes held by a device, and bytes and collectives that it sends in a step.

Everything here is arithmetic on sizes. ``scale_count.py`` counts the same numbers in running processes, and they must
be equal; ``scale.py`` puts sizes into these functions that nobody ran here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, ...]
Key = tuple[str, str]
"""A collective, and the group of devices that it runs over: ``("all-gather", "shard")``."""
Calls = Counter[tuple[Key, int]]
"""How often a collective runs, by its key and the bytes of its whole buffer (gathered, or before it is scattered)."""

NORM, VERDICT = 8, 4
"""Bytes of the single numbers that are reduced: a float64, and the vote on a gradient's being finite."""


@dataclass(frozen=True)
class Model:
    """Sizes of a model of equal blocks.

    Attributes:
        name: what it is called.
        before: parameters before the blocks, in their order.
        block: parameters of a block.
        blocks: how many.
        after: parameters after them.
        width: of what flows between blocks.
        rows: parameters of a block that tensor parallelism cuts along the second dimension; it cuts the other
            matrices along the first, and vectors not at all.
        sums: all-reduces of activations that tensor parallelism needs in a block's forward pass, and in its backward.
    """

    name: str
    before: tuple[Shape, ...]
    block: tuple[Shape, ...]
    blocks: int
    after: tuple[Shape, ...]
    width: int
    rows: tuple[int, ...] = ()
    sums: int = 1

    @property
    def root(self) -> tuple[Shape, ...]:
        """Return the parameters outside the blocks: those that ``fully_shard(model)`` itself takes."""
        return self.before + self.after

    @property
    def parameters(self) -> int:
        """Return their number."""
        return numbers(self.root) + self.blocks * numbers(self.block)


@dataclass(frozen=True)
class Layout:
    """How the devices share the work.

    Attributes:
        kind: ``ddp``: every device holds everything. ``fsdp``: ``fully_shard`` of each block and of the model.
        replicas: devices that hold the same; for ``ddp`` all of them.
        shards: devices that a replica is cut over.
        tensor: devices that a matrix is cut over by tensor parallelism.
        reshard: free the gathered weights after the forward pass (``reshard_after_forward``); the root's own stay
            by default.
        root_too: the option was also given to the root by name.
        sync: ``sync_ascent``.
        views: gradients are views of the buckets of ``ddp`` (``gradient_as_bucket_view``).
        cap: bytes of a bucket of ``ddp``.
        first_cap: of its first bucket.
    """

    kind: Literal["ddp", "fsdp"]
    replicas: int = 1
    shards: int = 1
    tensor: int = 1
    reshard: bool = True
    root_too: bool = False
    sync: bool | int = True
    views: bool = False
    cap: int = 25 << 20
    first_cap: int = 1 << 20

    @property
    def axes(self) -> dict[str, int]:
        """Return the sizes of the groups that collectives run over."""
        return {"replica": self.replicas, "shard": self.shards, "tensor": self.tensor, "ascent": int(self.sync)}

    def reach(self, axis: str) -> int:
        """Return how many consecutive devices a group spans: tensor parallelism is innermost, replicas outermost."""
        inside = {"replica": self.shards * self.tensor, "shard": self.tensor}
        return self.axes[axis] * inside.get(axis, 1)


@dataclass(frozen=True)
class Precision:
    """Bytes of a number.

    Attributes:
        weight: of the weights that are kept, their gradients, copies and the base's state.
        gathered: as gathered for a pass (``param_dtype`` of a ``MixedPrecisionPolicy``).
        reduced: as gradients are summed (``reduce_dtype``).
    """

    weight: int = 4
    gathered: int = 4
    reduced: int = 4


@dataclass(frozen=True)
class Method:
    """What a method does, over a period of one or more steps.

    Attributes:
        name: as in ``flatwise.create``, or ``plain``.
        passes: gradients computed in each step of the period.
        norms: norms and inner products over all parameters, in each step.
        verdicts: votes on a gradient, in each step.
        copies: copies of the weights' size during the last pass: of w, and of the gradient at w.
        kept: tensors of that size kept between steps, beside the base's state.
    """

    name: str
    passes: tuple[int, ...] = (2,)
    norms: tuple[int, ...] = (1,)
    verdicts: tuple[int, ...] = (1,)
    copies: int = 1
    kept: int = 0

    @property
    def mean_passes(self) -> float:
        """Return the gradients computed in a step."""
        return sum(self.passes) / len(self.passes)


def methods(every: int) -> dict[str, Method]:
    """Return the methods of the page.

    Args:
        every: period of ``every-k`` and ``looksam``.
    """
    rest = every - 1
    rows = (
        Method("plain", (1,), (0,), (0,), copies=0),
        Method("sam"),
        Method("msam", (1,)),
        Method("stale", (1,), kept=1),
        Method("gsam", norms=(3,), copies=2),
        Method("every-k", (2, *[1] * rest), (1, *[0] * rest), (1,) * every),
        Method("looksam", (2, *[1] * rest), (4, *[2] * rest), (1,) * every, copies=2, kept=1),
    )
    return {method.name: method for method in rows}


# Sizes


def numbers(shapes: Iterable[Shape]) -> int:
    """Return the number of elements."""
    return sum(map(math.prod, shapes))


def part(shape: Shape, shards: int) -> int:
    """Return the elements of the largest part: ``fully_shard`` cuts the first dimension, and whole rows only."""
    return math.ceil(shape[0] / shards) * math.prod(shape[1:])


def parts(shapes: Iterable[Shape], shards: int) -> int:
    """Return the elements of the largest parts of all."""
    return sum(part(shape, shards) for shape in shapes)


def tensor_cut(shapes: tuple[Shape, ...], rows: tuple[int, ...], tensor: int) -> tuple[Shape, ...]:
    """Return the shapes of a block that tensor parallelism leaves on a device."""
    cut = []
    for index, shape in enumerate(shapes):
        if index in rows:
            cut.append((shape[0], shape[1] // tensor))
        else:
            cut.append((shape[0] // tensor, *shape[1:]) if len(shape) > 1 else shape)
    return tuple(cut)


def buckets(sizes: Iterable[int], cap: int, first: int) -> list[int]:
    """Return the bytes of the buckets of ``DistributedDataParallel``: each is closed once it reaches its limit.

    Args:
        sizes: bytes of the gradients, in the order in which a backward pass makes them.
        cap: limit.
        first: limit of the first bucket.
    """
    found, size = [], 0
    for more in sizes:
        size += more
        if size >= (cap if found else first):
            found.append(size)
            size = 0
    return [*found, size] if size else found


# Traffic


def one_backward(model: Model, layout: Layout, precision: Precision, tokens: int) -> Calls:
    """Return the collectives of a forward and backward pass of one micro-batch, by their key and bytes.

    Args:
        model: its sizes.
        layout: of the devices.
        precision: of the numbers.
        tokens: rows of activations on a device.
    """
    found: Calls = Counter()
    block = tensor_cut(model.block, model.rows, layout.tensor)
    if layout.kind == "fsdp":
        for shapes, times, again in (
            (model.root, 1, layout.reshard and layout.root_too),
            (block, model.blocks, layout.reshard),
        ):
            mine = parts(shapes, layout.shards)
            whole = mine * layout.shards
            found[("all-gather", "shard"), whole * precision.gathered] += times * (1 + again)
            found[("reduce-scatter", "shard"), whole * precision.reduced] += times
            if layout.replicas > 1:
                found[("all-reduce", "replica"), mine * precision.reduced] += times
    if layout.tensor > 1:
        found[("all-reduce", "tensor"), tokens * model.width * precision.gathered] += 2 * model.sums * model.blocks
    return found


def summed(model: Model, layout: Layout, precision: Precision) -> Calls:
    """Return the sums of gradients that ``ddp`` makes once for a pass, however many micro-batches it has."""
    found: Calls = Counter()
    if layout.kind == "ddp":
        shapes = [*model.before, *model.block * model.blocks, *model.after]
        sizes = [math.prod(shape) * precision.weight for shape in reversed(shapes)]
        for size in buckets(sizes, layout.cap, layout.first_cap):
            found[("all-reduce", "replica"), size] += 1
    return found


def singles(model: Model, layout: Layout, norms: int, verdicts: int) -> Calls:
    """Return the reductions of single numbers, over every dimension that parameters are cut along.

    A norm is reduced once for each way in which parameters are cut. A verdict is reduced once for each device mesh:
    that of ``fully_shard`` alone, and that of parameters which tensor parallelism cuts too.
    """
    found: Calls = Counter()
    if layout.kind == "ddp":
        return found  # every device has the same gradients, and computes the same numbers
    matrices = {index in model.rows for index, shape in enumerate(model.block) if len(shape) > 1}
    ways = len(matrices) if layout.tensor > 1 else 0
    for axis, norm_times, verdict_times in (("shard", 1 + ways, 1 + bool(ways)), ("tensor", ways, bool(ways))):
        found[("all-reduce", axis), NORM] += norms * norm_times
        found[("all-reduce", axis), VERDICT] += verdicts * verdict_times
    return +found


def traffic(
    model: Model, layout: Layout, method: Method, precision: Precision, *, tokens: int = 0, micro_batches: int = 1
) -> Calls:
    """Return the collectives of a device in one period of a method.

    Args:
        model: its sizes.
        layout: of the devices.
        method: what is done.
        precision: of the numbers.
        tokens: rows of activations in a micro-batch on a device.
        micro_batches: accumulated into one step.
    """
    found: Calls = Counter()
    backward = one_backward(model, layout, precision, tokens)
    sums = summed(model, layout, precision)
    for passes, norms, verdicts in zip(method.passes, method.norms, method.verdicts, strict=True):
        for key, times in backward.items():
            found[key] += times * passes * micro_batches
        for key, times in sums.items():
            found[key] += times * (passes if layout.sync is True else 1)
        if layout.sync > 1 and passes > 1:
            found[("all-reduce", "ascent"), model.parameters * precision.weight] += 1
        found += singles(model, layout, norms, verdicts)
    return +found


def sent(calls: Calls, axes: dict[str, int]) -> dict[str, float]:
    """Return the bytes that a device sends, and receives, over each group of devices, with ring algorithms.

    A ring of n sends (n - 1) / n of the buffer for an all-gather or a reduce-scatter, and twice that for an all-reduce.
    """
    found: dict[str, float] = dict.fromkeys(axes, 0.0)
    for ((kind, axis), size), times in calls.items():
        found[axis] += times * size * (2 if kind == "all-reduce" else 1) * (axes[axis] - 1) / axes[axis]
    return found


# Memory


def held(model: Model, layout: Layout, method: Method, precision: Precision) -> dict[str, int]:
    """Return the bytes that the device with the largest parts holds during the last pass of a step.

    The base optimizer is AdamW. Activations, gradients on their way to where they are kept, and what libraries allocate
    for themselves are not in it.

    Args:
        model: its sizes.
        layout: of the devices.
        method: what is done.
        precision: of the numbers.
    """
    block = tensor_cut(model.block, model.rows, layout.tensor)
    cut = layout.shards if layout.kind == "fsdp" else 1
    mine = (parts(model.root, cut) + model.blocks * parts(block, cut)) * precision.weight
    return {
        "weights": mine,
        "gradients": mine,
        "state": 2 * mine,
        "copies": method.copies * mine,
        "kept": method.kept * mine,
        "buckets": mine if layout.kind == "ddp" and not layout.views else 0,
        "gathered": gathered(model, layout, precision, blocks_at_once(model, layout)),
    }


def blocks_at_once(model: Model, layout: Layout) -> int:
    """Return how many blocks are gathered at once: one is at work, and the next comes meanwhile."""
    return min(2, model.blocks) if layout.reshard else model.blocks


def gathered(model: Model, layout: Layout, precision: Precision, blocks: int, *, root: bool = True) -> int:
    """Return the bytes of gathered weights, with their padding.

    Args:
        model: its sizes.
        layout: of the devices.
        precision: of the numbers.
        blocks: how many are gathered.
        root: whether the root's own are.
    """
    if layout.kind == "ddp":
        return 0
    block = parts(tensor_cut(model.block, model.rows, layout.tensor), layout.shards)
    return (root * parts(model.root, layout.shards) + blocks * block) * layout.shards * precision.gathered
