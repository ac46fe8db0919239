"""Steps a second of the lab's loop against a bare PyTorch loop over the same model and data.

Run ``python benchmarks/lab_throughput.py``. The two loops train an epoch in turns in one process with one thread; each
ratio compares the two epochs of one turn, and the median over the turns is reported with its quartiles. The goal
is 0.95 of the bare loop. The second column also counts what the lab does after each epoch: it reads the validation
part and writes a checkpoint and a line.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional

from flatwise.lab.checkpoint import Checkpoint, save_checkpoint
from flatwise.lab.config import CompareConfig
from flatwise.lab.data import load_data
from flatwise.lab.loop import Trainer, score
from flatwise.lab.methods import Method
from flatwise.lab.models import build_model

TURNS = 31
GOAL = 0.95


class BareLoop:
    """What one would write by hand: shuffle, slice, forward, backward, step."""

    def __init__(self, config: CompareConfig, trainer: Trainer) -> None:
        self.model = build_model(config.model, trainer.data.train_inputs.shape[1:], 10, seed=0)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.inputs, self.labels, self.size = trainer.split.inputs, trainer.split.labels, trainer.batch_size
        self.steps = trainer.steps_per_epoch

    def epoch(self) -> None:
        """Train one epoch."""
        order = torch.randperm(len(self.labels))
        for step in range(self.steps):
            chosen = order[step * self.size : (step + 1) * self.size]
            inputs, labels = self.inputs[chosen], self.labels[chosen]
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(inputs), labels)
            loss.backward()
            self.optimizer.step()


def measure(config: CompareConfig, folder: Path) -> None:
    # The same learning rate throughout, so that neither loop meets easier numbers.
    trainer = Trainer(config, Method("sgd", None), 0, load_data(config.dataset, config.data_root))
    bare = BareLoop(config, trainer)
    loop_ratios, whole_ratios, rates = [], [], []
    trainer.train_epoch(0)
    bare.epoch()
    for turn in range(TURNS):
        seconds = {}
        for name in ("lab", "bare") if turn % 2 else ("bare", "lab"):
            start = time.perf_counter()
            if name == "bare":
                bare.model.train()
                bare.epoch()
            else:
                trainer.train_epoch(0)
                seconds["loop"] = time.perf_counter() - start
                score(trainer.predict(trainer.split.validation_inputs), trainer.split.validation_labels)
                state = Checkpoint("", trainer.model.state_dict(), trainer.optimizer.state_dict(), [], 0, 0.0)
                save_checkpoint(folder / "checkpoint", state)
            seconds[name] = time.perf_counter() - start
        loop_ratios.append(seconds["bare"] / seconds["loop"])
        whole_ratios.append(seconds["bare"] / seconds["lab"])
        rates.append(trainer.steps_per_epoch / seconds["bare"])
    low, middle, high = statistics.quantiles(loop_ratios, n=4)
    verdict = "reached" if middle >= GOAL else "missed"
    print(
        f"{config.dataset:13} {config.model:9} bare {statistics.median(rates):7.1f} steps/s   lab/bare {middle:.3f} "
        f"({low:.3f}-{high:.3f})   with validation and checkpoint {statistics.median(whole_ratios):.3f}   "
        f"goal {GOAL} {verdict}"
    )


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for model in ("cnn-small", "mlp", "resnet8"):
            measure(CompareConfig(model=model, lr=0.01), Path(folder))


if __name__ == "__main__":
    main()
