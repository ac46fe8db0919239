"""What every result carries: the conditions under which it was measured, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Conditions:
    """Under which conditions a number was measured.

    Attributes:
        samples: over all processes.
        batches: as given, over all processes.
        micro_batch_size: the largest number of samples evaluated at once.
        mode: ``"eval"``, ``"train"`` or ``"as is"``: batch normalisation and dropout as at test time, as in training,
            or as the caller left them.
        seed: of everything that is drawn.
        weights: number of weights that the measure is about.
        unused: names of parameters that the loss does not depend on.
        frozen: names of parameters that do not require gradients.
        processes: how many shared the work.
        dtype: of the weights.
        device: of the weights.
        notes: what a reader should know, in sentences.
    """

    samples: int
    batches: int
    micro_batch_size: int
    mode: str
    seed: int
    weights: int
    unused: tuple[str, ...]
    frozen: tuple[str, ...]
    processes: int
    dtype: str
    device: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """What a measure cost.

    Attributes:
        gradient_evaluations: in units of one forward and backward pass over all the samples. A forward pass alone is
            1/3, a backward pass 2/3, a backward pass through both 2.
        seconds: wall time.
    """

    gradient_evaluations: float
    seconds: float


def plain(value: Any) -> Any:
    """Turn a result into what JSON can hold: dataclasses to dicts, tensors and tuples to lists.

    Args:
        value: a result, or part of one.

    Returns:
        Dicts, lists, strings, numbers, booleans and None.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def digits(value: float, error: float | None) -> str:
    """Write a number with no more digits than it has: two of its standard error.

    Args:
        value: the number.
        error: its standard error; None where it has none, or it is not known: three digits then.

    Returns:
        Such as ``"12.31 ± 0.14"``.
    """
    if not math.isfinite(value):
        return str(value)
    if error is None or not math.isfinite(error):
        return f"{value:.3g}"
    if error == 0:
        return f"{value:.6g}"
    places = 1 - math.floor(math.log10(abs(error)))
    if places < 0:
        return f"{round(value, places):.0f} ± {round(error, places):.0f}"
    if places > 6 or abs(value) >= 1e6:
        return f"{value:.{max(0, places + math.floor(math.log10(max(abs(value), abs(error)))))}e} ± {error:.1e}"
    return f"{value:.{places}f} ± {error:.{places}f}"
