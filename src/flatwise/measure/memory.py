"""How much memory a curvature product takes, measured on a few samples, and what fits into a budget.

What lives at once is seen at torch's dispatcher: every storage that an operation makes is counted from its first sight
until it is freed. So the numbers are those of the machine's own graphs, double backward and temporaries included, and
not a factor that was guessed. What a kernel takes inside itself is not seen.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatwise.batching import narrow
from flatwise.measure.data import Part

FEW = (8, 32)
"""Numbers of samples that the memory is measured with."""

SHARE = 0.5
"""Share of the free memory that graphs may take where no budget was given."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the bytes of the storages that were made inside and are still alive.

    Attributes:
        live: now.
        peak: the most at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made."""
        # What comes in was there before, or was counted when it was made.
        old = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for leaf in _tensors(result):
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in old and key not in self._known:
                self._known.add(key)
                size = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, key, size)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(nest: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


@dataclass(frozen=True)
class Need:
    """What a part takes, linear in its samples.

    Attributes:
        kept: bytes that its graphs take, (for each part, for each sample).
        working: bytes at the worst moment of building them and of a product, (for each part, for each sample).
    """

    kept: tuple[float, float]
    working: tuple[float, float]

    def of(self, samples: int) -> tuple[float, float]:
        """Return what a part takes.

        Args:
            samples: in it.

        Returns:
            Kept and working bytes.
        """
        return self.kept[0] + samples * self.kept[1], self.working[0] + samples * self.working[1]

    def fitting(self, budget: float) -> int:
        """Return how many samples can be worked on at once.

        Args:
            budget: bytes.

        Returns:
            A number of samples; 0 where not even one fits.
        """
        fixed, each = self.working
        return max(0, int((budget - fixed) / each)) if each > 0 else (2**31 if fixed <= budget else 0)


def need(part: Part, use: Callable[[Part], Callable[[], object]]) -> Need:
    """Measure what parts take.

    Args:
        part: of it a few samples are used, or all where it is small or cannot be cut.
        use: builds the graphs of a part, and returns what multiplies with them.

    Returns:
        The line through two sizes; where there is one size, everything counts as for each part.
    """
    small, large = min(FEW[0], part.samples // 2), min(FEW[1], part.samples)
    low = high = None
    if small:
        # A loss may want a whole batch; an operation without a double backward is met again below.
        with contextlib.suppress(RuntimeError, ValueError):
            low, high = (measured(Part(narrow(part.batch, 0, n), n, part.number), use) for n in (small, large))
    if low is None or high is None:
        kept, working = measured(part, use)
        return Need((kept, 0.0), (working, 0.0))

    def line(which: int) -> tuple[float, float]:
        slope = max(0.0, (high[which] - low[which]) / (large - small))
        return max(0.0, high[which] - large * slope), slope

    return Need(line(0), line(1))


def measured(part: Part, use: Callable[[Part], Callable[[], object]]) -> tuple[int, int]:
    """Measure what a part takes.

    Args:
        part: all of it is used.
        use: builds its graphs, and returns what multiplies with them.

    Returns:
        Kept bytes, and the most bytes at once.
    """
    with LiveBytes() as bytes_:
        product = use(part)
        kept = bytes_.live
        product()
    return kept, bytes_.peak


def kept_parts(parts: Sequence[Part], needs: Need, budget: float) -> set[int]:
    """Choose the parts whose graphs are kept.

    Args:
        parts: of this process.
        needs: what they take.
        budget: bytes.

    Returns:
        Their numbers: all, or the first ones that leave room for working on the largest.
    """
    if not parts:
        return set()
    extra = max(working - kept for kept, working in (needs.of(part.samples) for part in parts))
    if sum(needs.of(part.samples)[0] for part in parts) + extra <= budget:
        return {part.number for part in parts}
    left = budget - max(needs.of(part.samples)[1] for part in parts)
    chosen: set[int] = set()
    for part in parts:
        left -= needs.of(part.samples)[0]
        if left < 0:
            break
        chosen.add(part.number)
    return chosen


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on a device, as far as the system says.

    Args:
        device: where the weights are.

    Returns:
        Bytes; infinity where nothing is known.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    known = [_available(), _left_in_group()]
    return min((number for number in known if number is not None), default=float("inf"))


def _available() -> float | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return None


def _left_in_group() -> float | None:
    """Return what the control group of a container leaves."""
    folder = Path("/sys/fs/cgroup")
    try:
        return float((folder / "memory.max").read_text()) - float((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None
