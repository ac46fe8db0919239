"""On which samples (the ``batching`` slot): the whole batch, micro-batches of m, a fraction for the ascent.

A batch is any nested tuple, list or mapping of tensors whose first dimension counts samples. Leaves that are not
tensors, and tensors without dimensions, go to every part unchanged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

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
    """

    micro_batch_size: int | None = None
    ascent_fraction: float = 1.0

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

    @property
    def splits(self) -> bool:
        """Whether flatwise must be able to cut the batch."""
        return self.micro_batch_size is not None or self.ascent_fraction < 1

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
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.dim() else batch
    if isinstance(batch, Mapping):
        cut = {key: narrow(value, start, stop) for key, value in batch.items()}
        if isinstance(batch, MutableMapping):  # a shallow copy keeps what the class needs, such as a default factory
            whole = copy.copy(batch)
            whole.update(cut)
            return whole
        return type(batch)(cut)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(narrow(value, start, stop) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(narrow(value, start, stop) for value in batch)
    return batch
