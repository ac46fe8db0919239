"""On which samples (the ``batching`` slot): the whole batch, micro-batches of m, a fraction for the ascent.

A batch is any nested tuple, list or mapping of tensors whose first dimension counts samples. Leaves that are not
tensors, and tensors without dimensions, go to every part unchanged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batching:
    """How the batch of one step is used.

    Attributes:
        micro_batch_size: m of m-sharpness (Foret et al., section 4.1): the batch is cut into parts of m samples (the
            last may be smaller), each with its own perturbation; their gradients are averaged by sample count.
            None is the whole batch.
        ascent_fraction: share of each part, from its start, on which the ascent gradient is computed
            (Brock et al., ICML 2021; Bahri et al., ACL 2022), 0 < fraction <= 1.
        top_fraction: share of each part, those with the largest loss, that both passes see (K-SAM; Ni et al., arXiv
            2210.12864). Finding them takes a forward pass over the whole part, which is what batch statistics see.
        rising_fraction: share of each part, those whose loss rises most from w to w + eps, that the second pass sees
            (ESAM's data selection; Du et al., ICLR 2022). Finding them takes a forward pass at w + eps.

    With either of the last two, ``loss_fn(batch)`` returns one loss for each sample, and flatwise takes the mean.
    """

    micro_batch_size: int | None = None
    ascent_fraction: float = 1.0
    top_fraction: float = 1.0
    rising_fraction: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: if one is out of its range.
        """
        m = self.micro_batch_size
        if m is not None and (not isinstance(m, int) or isinstance(m, bool) or m < 1):
            raise ValueError(f"micro_batch_size must be a whole number >= 1, got {m!r}")
        if not 0 < self.ascent_fraction <= 1:
            raise ValueError(f"ascent_fraction must be in (0, 1], got {self.ascent_fraction!r}")
        for name in ("top_fraction", "rising_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)!r}")
        if sum(f < 1 for f in (self.ascent_fraction, self.top_fraction, self.rising_fraction)) > 1:
            raise ValueError(
                "ascent_fraction, top_fraction and rising_fraction each choose samples of their own: use one of them"
            )

    @property
    def splits(self) -> bool:
        """Whether flatwise must be able to cut the batch."""
        return self.micro_batch_size is not None or self.ascent_fraction < 1 or self.ranks

    @property
    def ranks(self) -> bool:
        """Whether flatwise must know the loss of each sample."""
        return self.top_fraction < 1 or self.rising_fraction < 1

    def parts(self, batch: Any) -> list[tuple[Any, float]]:
        """Cut a batch into micro-batches.

        Args:
            batch: the batch.

        Returns:
            Pairs of a micro-batch and its share of the samples. The shares sum to 1.
        """
        if self.micro_batch_size is None:
            return [(batch, 1.0)]
        total, m = count(batch), self.micro_batch_size
        starts = range(0, total, m)
        if len(starts) == 1:
            return [(batch, 1.0)]
        return [(narrow(batch, s, min(s + m, total)), (min(s + m, total) - s) / total) for s in starts]

    def for_ascent(self, part: Any) -> Any:
        """Return the samples of a micro-batch that the ascent sees, at least one.

        Args:
            part: a micro-batch.

        Returns:
            Its first ``ascent_fraction``.
        """
        if self.ascent_fraction == 1:
            return part
        # 0.07 * 100 is a little more than 7
        return narrow(part, 0, math.ceil(round(self.ascent_fraction * count(part), 6)))


def largest(values: Tensor, fraction: float) -> Tensor:
    """Return the indices of the largest values, at least one, in ascending order of index.

    Args:
        values: shape (n,).
        fraction: share of them.

    Returns:
        Shape (max(1, round up of fraction * n),). Of equal ones the first are taken, so that every rank and device
        chooses alike. NaN counts as largest, so that it is seen.
    """
    chosen = math.ceil(round(fraction * values.numel(), 6))
    order = torch.argsort(values.detach().nan_to_num(nan=math.inf), descending=True, stable=True)
    return order[:chosen].sort().values


def pick(batch: Any, index: Tensor) -> Any:
    """Return the samples of a batch at ``index``, in the same nesting.

    Args:
        batch: nested tuple, list or mapping of tensors.
        index: positions in the first dimension.

    Returns:
        The same structure over copies of the tensors.
    """
    return map_tensors(batch, lambda leaf: leaf.index_select(0, index.to(leaf.device)) if leaf.dim() else leaf)


def _leaves(batch: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        if batch.dim():
            yield path, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _leaves(value, f"{path}[{key!r}]")
    elif isinstance(batch, tuple | list):
        for index, value in enumerate(batch):
            yield from _leaves(value, f"{path}[{index}]")


def count(batch: Any) -> int:
    """Count the samples of a batch.

    Args:
        batch: nested tuple, list or mapping of tensors.

    Returns:
        The common size of their first dimensions.

    Raises:
        ValueError: if there is no tensor, no sample, or the sizes differ.
    """
    leaves = list(_leaves(batch))
    if not leaves:
        raise ValueError(f"cannot split a batch without tensors in it (got {type(batch).__name__})")
    sizes = {path: leaf.shape[0] for path, leaf in leaves}
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{path}: {size}" for path, size in sizes.items())
        raise ValueError(f"cannot split the batch: its tensors have different first dimensions ({listing})")
    size = leaves[0][1].shape[0]
    if not size:
        raise ValueError("cannot split an empty batch")
    return size


def narrow(batch: Any, start: int, stop: int) -> Any:
    """Return samples ``start`` to ``stop`` of a batch, in the same nesting.

    Args:
        batch: nested tuple, list or mapping of tensors.
        start: first sample.
        stop: one past the last sample.

    Returns:
        The same structure over views of the tensors.
    """
    return map_tensors(batch, lambda leaf: leaf[start:stop] if leaf.dim() else leaf)


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor of a batch, in the same nesting.

    Args:
        batch: nested tuple, list or mapping; what is no tensor stays.
        change: gives the new tensor.

    Returns:
        The same structure over what ``change`` returned.
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        parts = {key: map_tensors(value, change) for key, value in batch.items()}
        if isinstance(batch, MutableMapping):  # a shallow copy keeps what the class needs, such as a default factory
            whole = copy.copy(batch)
            whole.update(parts)
            return whole
        return type(batch)(parts)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(value, change) for value in batch)
    return batch
