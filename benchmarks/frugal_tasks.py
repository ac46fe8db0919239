"""The fifteen tasks that judge ``frugal``, five of them set aside, and the one loop that trains them all.

    from frugal_contestants import CONTESTANTS
    from frugal_tasks import TASKS
    TASKS["digits-noise"].train(CONTESTANTS["sam 0.05"], seed=0)    # {"score": 73.2, "seconds": 5.1, ...}

A contestant decides how a step is made (see ``frugal_contestants.py``); weights, split, wrong labels and the order of
the batches depend on the seed alone. The settings were chosen with the base optimizer alone.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatwise.seeds import stream
from frugal_data import Chars, FineTune, Images, Material, cross_entropy, text_digest

if TYPE_CHECKING:
    from frugal_contestants import Contestant, Plain

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Setting:
    """What a contestant may know when it begins.

    Attributes:
        model: with its first weights, in training mode.
        base: the base optimizer; the loop sets the learning rate in its groups before each step.
        loss: the mean loss of a batch; with ``reduction="none"`` that of each sample.
        total_steps: steps of the training.
        warmup_steps: steps in which the learning rate rises.
        batch_size: samples in a step.
        train_size: training samples.
    """

    model: nn.Module
    base: Optimizer
    loss: Callable[..., Tensor]
    total_steps: int
    warmup_steps: int
    batch_size: int
    train_size: int


class Training:
    """One training, step by step.

    Args:
        task: its settings.
        contestant: makes the steps.
        seed: decides everything that is drawn.
        steps: to train for; None: those of all epochs.
    """

    def __init__(self, task: Task, contestant: Contestant, seed: int, steps: int | None = None) -> None:
        self.task, self.seed, self.who = task, seed, contestant
        self.material: Material = task.build(seed)
        count = len(self.material.labels)
        self.batch_size = min(task.batch_size, count)
        self.steps_per_epoch = count // self.batch_size
        self.total_steps = steps or task.epochs * contestant.longer * self.steps_per_epoch
        self.warmup_steps = math.ceil(task.warmup * self.total_steps)
        self.material.model.train()
        self.base = task.base(self.material.model)
        self.step_number = 0
        self._batches = self.batches()

    @cached_property
    def contestant(self) -> Plain:
        """What makes the steps; it begins when it is first asked for."""
        count = len(self.material.labels)
        setting = Setting(
            self.material.model, self.base, self.loss, self.total_steps, self.warmup_steps, self.batch_size, count
        )
        return self.who.begin(setting)

    def loss(self, batch: Batch, reduction: str = "mean") -> Tensor:
        """Return the loss of a batch."""
        return cross_entropy(self.material.model(batch[0]), batch[1], reduction)

    def batches(self) -> Iterator[Batch]:
        """Yield the batches; each epoch has an order of its own."""
        epoch = 0
        while True:
            order = torch.randperm(len(self.material.labels), generator=stream(self.seed, "order", epoch))
            for indices in order.split(self.batch_size)[: self.steps_per_epoch]:
                yield self.material.inputs.index_select(0, indices), self.material.labels.index_select(0, indices)
            epoch += 1

    def step(self) -> None:
        """Make the next step."""
        rate = self.task.rate * learning_rate(self.step_number, self.total_steps, self.warmup_steps)
        for group in self.base.param_groups:
            group["lr"] = rate
        self.contestant.step(next(self._batches))
        self.step_number += 1

    def score(self) -> float:
        """Judge what the contestant has made."""
        return self.material.score(self.contestant.result())


def learning_rate(step: int, total: int, warmup: int) -> float:
    """Return a share: a line from 0 up to 1 in the warm-up, then a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@dataclass(frozen=True)
class Task:
    """What is trained, how long and with which base optimizer.

    Attributes:
        name: of the task, and of its record.
        half: the rule is made on those of development; the others are looked at once, when the rule is fixed.
        build: makes model and samples from a seed.
        epochs: of the base.
        optimizer: ``"sgd"`` has momentum 0.9.
        rate: the highest learning rate.
        weight_decay: of the base.
        batch_size: samples in a step; the last, smaller batch of an epoch is dropped.
        warmup: share of the training in which the learning rate rises.
        digits: decimals of a score to show.
    """

    name: str
    half: Literal["development", "held-out"]
    build: Images | FineTune | Chars
    epochs: int
    optimizer: Literal["sgd", "adamw"] = "sgd"
    rate: float = 0.05
    weight_decay: float = 5e-4
    batch_size: int = 64
    warmup: float = 0.0
    digits: int = 2

    @property
    def unit(self) -> str:
        """What a score is measured in."""
        return "minus nats" if isinstance(self.build, Chars) else "% right"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that a score depends on beside contestant and seed."""
        more = {"text": text_digest(), "python": platform.python_version()} if isinstance(self.build, Chars) else {}
        return {**asdict(self), "kind": type(self.build).__name__, "torch": torch.__version__, **more}

    def base(self, model: nn.Module) -> Optimizer:
        """Make the base optimizer."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=self.rate, momentum=0.9, weight_decay=self.weight_decay)
        return torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=self.weight_decay)

    def train(self, contestant: Contestant, seed: int, steps: int | None = None) -> dict[str, Any]:
        """Train with one thread.

        Args:
            contestant: makes the steps.
            seed: decides everything that is drawn.
            steps: to train for; None: those of all epochs.

        Returns:
            Score, steps and processor seconds of the steps, and what the contestant wants to be remembered.
        """
        torch.set_num_threads(1)
        training = Training(self, contestant, seed, steps)
        started = time.process_time()
        for _ in range(training.total_steps):
            training.step()
        seconds = time.process_time() - started
        score = training.score()
        notes = training.contestant.notes()
        return {"score": round(score, 5), "steps": training.total_steps, "seconds": round(seconds, 3), **notes}

    def smaller(self, size: int) -> Task:
        """Return the task with fewer training samples and one epoch, to try the machinery."""
        less = {"pretrain_size": size, "pretrain_epochs": 1} if isinstance(self.build, FineTune) else {}
        return replace(self, epochs=1, batch_size=16, build=replace(self.build, size=size, **less))


def _adamw(name: str, half: Any, build: Any, epochs: int, rate: float, **settings: Any) -> Task:
    return Task(name, half, build, epochs, "adamw", rate, weight_decay=0.05, **settings)


def _fashion(model: str, size: int, noise: float = 0.0) -> Images:
    return Images("fashion-mnist", model, size, noise, halved=model != "vit")


_ROWS = (
    Task("digits-noise", "development", Images("digits", "cnn-small", noise=0.4), 40),
    Task("fashion-noise", "development", _fashion("cnn-small", 3000, 0.4), 15),
    Task("fashion-clean", "development", _fashion("cnn-small", 5000), 8),
    _adamw("digits-mlp-adamw", "development", Images("digits", "mlp"), 40, 1e-3),
    _adamw("chars", "development", Chars(), 3, 3e-3, batch_size=32, warmup=0.1, digits=4),
    # Set aside while the first rule was made, and no longer when it was changed.
    Task("digits-resnet-long", "development", Images("digits", "resnet8"), 30),
    Task("fashion-noise20-plain", "development", _fashion("cnn-plain", 5000, 0.2), 15),
    Task("fashion-long", "development", _fashion("cnn-small", 2000), 40),
    _adamw("vit-adamw", "development", _fashion("vit", 3000), 10, 2e-3, warmup=0.1),
    Task("finetune", "development", FineTune(), 15, rate=0.01, batch_size=32),
    # Of three or four learning rates, the base's best on seeds 100 and 101.
    Task("digits-resnet-noise", "held-out", Images("digits", "resnet8", noise=0.4), 30, rate=0.02, batch_size=128),
    Task("fashion-mlp-noise", "held-out", _fashion("mlp", 2000, 0.3), 30, rate=0.02, batch_size=32),
    _adamw("vit-noise-adamw", "held-out", _fashion("vit", 2000, 0.3), 15, 1e-3, warmup=0.1),
    Task("finetune-noise", "held-out", FineTune(noise=0.4), 30, rate=0.003, batch_size=32),
    Task("chars-sgd", "held-out", Chars(), 3, rate=0.3, batch_size=32, warmup=0.1, digits=4),
)
TASKS: dict[str, Task] = {task.name: task for task in _ROWS}
HALVES = ("development", "held-out")


def of_half(half: str) -> list[str]:
    """Name the tasks of a part, or all."""
    return [name for name, task in TASKS.items() if half in (task.half, "all")]
