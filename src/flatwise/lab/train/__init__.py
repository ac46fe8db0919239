"""One training, of any size: ``flatwise train``, and what the paper's experiments are made of."""

from __future__ import annotations

from flatwise.lab.train.config import TrainConfig
from flatwise.lab.train.run import train

__all__ = ["TrainConfig", "train"]
