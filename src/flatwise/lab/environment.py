"""What a comparison ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("flatwise", "torch", "torchvision", "numpy", "scipy", "scikit-learn")


def cores() -> int:
    """Count the processors that this process may use, which can be fewer than the machine has.

    Returns:
        At least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def describe(workers: int) -> dict[str, Any]:
    """Describe versions, threads and processor.

    Args:
        workers: processes that train side by side.

    Returns:
        What goes into ``environment.json``.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        # torch says itself which build it is; its metadata does not.
        "packages": {**{name: _version(name) for name in PACKAGES}, "torch": torch.__version__},
        "processor": _processor(),
        "cores": cores(),
        "workers": workers,
        "threads_per_worker": 1,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
