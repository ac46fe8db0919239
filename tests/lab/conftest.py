"""Small settings that train in a second, and Fashion-MNIST files that are made here."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flatwise.lab.config import CompareConfig


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., CompareConfig]:
    """Make small settings whose run folder is the test's own."""

    def make(**settings: object) -> CompareConfig:
        small = {"model": "mlp", "train_size": 200, "epochs": 2, "seeds": 2, "workers": 1, "batch_size": 32}
        return CompareConfig(**{**small, "out": str(tmp_path / "runs"), **settings})

    return make


def idx_bytes(values: Tensor) -> bytes:
    header = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape)
    return header + bytes(values.to(torch.uint8).flatten().tolist())


@pytest.fixture
def write_idx() -> Callable[..., None]:
    """Write a small Fashion-MNIST: four IDX files, packed or not."""

    def write(folder: Path, *, packed: bool, train: int = 60, test: int = 20) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        for stem, count in (("train", train), ("t10k", test)):
            images = torch.randint(0, 256, (count, 28, 28), generator=generator)
            labels = torch.arange(count) % 10
            for name, values in (
                (f"{stem}-images-idx3-ubyte", images),
                (f"{stem}-labels-idx1-ubyte", labels),
            ):
                raw = idx_bytes(values)
                (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)

    return write
