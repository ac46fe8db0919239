"""Trainings of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatwise.lab.train import TrainConfig
from flatwise.lab.train import network as networks

pytest.importorskip("accelerate", reason="needs flatwise[lab]")

TINY: dict[str, Any] = {
    "dataset": "digits", "model": "mlp", "train_size": 72, "val_fraction": 0.1, "batch_size": 16, "epochs": 2,
    "augment": "none", "tracker": "none", "label_noise": 0.2, "lr": 0.05,
}  # fmt: skip


class Dropping(nn.Module):
    """Batch statistics and dropout, whose state a training must bring back."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.body(images)
        return out


def dropping(name: str, shape: Any, classes: int, seed: int, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Dropping(classes)


@pytest.fixture
def with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network is one with dropout."""
    monkeypatch.setattr(networks, "build_model", dropping)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Make settings whose folder is the test's own; each call may name another place."""

    def make(place: str = "runs", **settings: Any) -> TrainConfig:
        return TrainConfig(**{**TINY, "out": str(tmp_path / place), **settings})

    return make


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """What Accelerate shares between all of its objects is not shared between tests."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
