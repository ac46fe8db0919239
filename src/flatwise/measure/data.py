"""The samples that a measure sees: read once, the same in every evaluation, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flatwise.batching import count, narrow
from flatwise.errors import UserError


@dataclass(frozen=True)
class Part:
    """A micro-batch.

    Attributes:
        batch: as ``loss_fn`` takes it.
        samples: how many samples are in it; 1 where they cannot be counted.
        number: its place among all parts of this process, which seeds what the loss draws in it.
    """

    batch: Any
    samples: int
    number: int


def read_batches(data: Any) -> list[Any]:
    """Read the data once.

    A tensor, a tuple and a mapping are one batch, and so is a list of tensors (what a DataLoader yields). Everything
    else that can be iterated is a series of batches.

    Args:
        data: one batch, or an iterable of batches.

    Returns:
        The batches.

    Raises:
        UserError: if there is none, or ``data`` is neither.
    """
    listed = isinstance(data, list) and bool(data) and all(isinstance(entry, Tensor) for entry in data)
    if isinstance(data, Tensor | tuple | Mapping) or listed:
        return [data]
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise UserError(f"data must be a batch, or an iterable of batches such as a DataLoader, got {data!r:.80}")
    batches = list(data)
    if not batches:
        raise UserError("data has no batch in it (an iterator that was used before is empty: pass a list of batches)")
    return batches


def cut(batches: Iterable[Any], micro_batch_size: int | None) -> tuple[list[Part], bool]:
    """Cut batches into parts of at most ``micro_batch_size`` samples.

    Args:
        batches: the batches.
        micro_batch_size: None leaves the batches as they are.

    Returns:
        The parts, and whether the samples of every batch could be counted.

    Raises:
        UserError: if a batch must be cut and cannot be.
    """
    parts: list[Part] = []
    counted = True
    for batch in batches:
        try:
            samples = count(batch)
        except ValueError as error:
            if micro_batch_size is not None:
                raise UserError(
                    f"micro_batch_size={micro_batch_size} needs batches that can be cut: {error}"
                ) from error
            parts.append(Part(batch, 1, len(parts)))
            counted = False
            continue
        size = micro_batch_size or samples
        for start in range(0, samples, size):
            stop = min(start + size, samples)
            part = batch if stop - start == samples else narrow(batch, start, stop)
            parts.append(Part(part, stop - start, len(parts)))
    return parts, counted
