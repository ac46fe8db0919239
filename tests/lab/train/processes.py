"""One process of a training with several, started by test_distributed.py: SETTINGS as JSON, one training each."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from flatwise.errors import UserError
from flatwise.lab.train import TrainConfig, course, train
from flatwise.lab.train import network as networks
from flatwise.lab.train.loop import Trainer


class Normed(nn.Module):
    """Batch statistics, and blocks that FSDP2 cuts by themselves."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.end = nn.Linear(12, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.start(images)
        for block in self.blocks:
            hidden = block(hidden)
        out: Tensor = self.end(hidden)
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 12), nn.BatchNorm1d(12)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.norm(self.linear(hidden)).relu()
        return out


def normed(name: str, shape: Any, classes: int, seed: int, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Normed(classes)


class Broken(Exception):
    """What ends a training from inside."""


STEP = Trainer.step


def breaking_at(step: int | None) -> Any:
    def stepping(self: Trainer, number: int) -> Tensor:
        if number == step:
            raise Broken
        return STEP(self, number)

    return stepping


def main() -> None:
    torch.set_num_threads(1)
    networks.build_model = normed
    for settings in json.loads(sys.argv[1]):
        stop, broken = settings.pop("stop", None), settings.pop("broken", None)
        if broken is not None:
            course.LOOK_EVERY = 1
        Trainer.step = breaking_at(broken)  # type: ignore[method-assign]
        try:
            result = train(
                TrainConfig(**settings),
                lambda record, stop=stop: record["epoch"] == stop,  # type: ignore[misc]
                on_notice=lambda text: print("notice:", text, flush=True),
            )
            text = f"{result['processes']} {result['effective_m']}"
        except Broken:
            text = "broken off"
        except UserError as error:
            text = f"{type(error).__name__}: {error}"
        if os.environ.get("RANK", "0") == "0":
            print("answer:", text, flush=True)


if __name__ == "__main__":
    main()
