"""A search over radius, learning rate, weight decay and method: ``flatwise sweep``, around ``train``."""

from __future__ import annotations

from flatwise.lab.sweep.config import SweepConfig
from flatwise.lab.sweep.run import sweep

__all__ = ["SweepConfig", "sweep"]
