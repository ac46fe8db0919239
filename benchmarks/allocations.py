"""Live bytes of some work, from the allocator's own events; no clock, so a busy machine changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def live_bytes(work: Callable[[], Any]) -> tuple[int, int]:
    """Watch what is allocated and freed on the CPU while some work is done.

    Args:
        work: what is done, once.

    Returns:
        The peak of live bytes, and those alive at the end, both above the state before.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    live = peak = 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live
