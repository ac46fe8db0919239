"""The tasks of the lab, as ``suggest_rho.py`` trains them: the same trainer, splits and batches as the board's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flatwise.lab.config import CompareConfig
from flatwise.lab.data import load_data
from flatwise.lab.loop import Batch, Trainer, score
from flatwise.lab.methods import parse_methods
from flatwise.measure import RhoSuggestion, suggest_rho
from flatwise.seeds import stream


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class LabTask:
    """A task of the lab; the score is the test accuracy in percent."""

    config: CompareConfig
    digits: int = 2

    def _trainer(self, method: str | None, rho: Any, seed: int) -> Trainer:
        config = replace(self.config, methods="base" if method is None else f"{method}:rho={rho}")
        return Trainer(config, parse_methods(config)[0], seed, load_data(config.dataset, config.data_root))

    def train(self, method: str | None, rho: Any, seed: int) -> float:
        """Train, and return the score."""
        trainer = self._trainer(method, rho, seed)
        for epoch in range(trainer.epochs):
            trainer.train_epoch(epoch)
        data = trainer.data
        return 100 * score(trainer.predict(data.test_inputs), data.test_labels).accuracy

    def suggest(self, method: str, seed: int) -> RhoSuggestion:
        """Probe the start of the training."""
        trainer = self._trainer(None, None, seed)

        def batches() -> Iterator[Batch]:
            """The batches of the training, in its order."""
            epoch = 0
            while True:
                order = torch.randperm(len(trainer.split.labels), generator=stream(seed, "order", epoch))
                shifts = stream(seed, "augmentation", epoch)
                for indices in torch.split(order, trainer.batch_size)[: trainer.steps_per_epoch]:
                    yield trainer.batch(indices, shifts)
                epoch += 1

        options = {"eta": 0.01} if method == "asam" else {}
        return suggest_rho(
            trainer.model, loss_fn, batches(), trainer.base, total_steps=trainer.total_steps, method=method, seed=seed,
            progress=False, **options,
        )  # fmt: skip
