"""What fetching and augmenting a batch costs, as a share of a training step.

Run ``python benchmarks/loader_cost.py``. The step is one of SGD on a ResNet-20, 128 images of 3 x 32 x 32 pixels, two
threads; a step of SAM takes twice as long, so the share is half of what stands here. The images lie in memory as uint8.
Each turn measures the step and, for each augmentation, a batch that is fetched by random indices, augmented and
normalised, in a new order; a ratio compares the two times of one turn. The goal is 5 % of the step. The last two rows
are mixing, which comes on top.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from flatwise.lab.augment import build_pipeline, mix, sample_keys
from flatwise.lab.models import build_model

GOAL = 0.05
BATCH, IMAGES, CLASSES = 128, 50_000, 10
AUGMENTATIONS = (
    "none", "basic", "basic+cutout", "basic+cutout+autoaugment", "basic+randaugment", "inception",
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """CIFAR-10's."""

    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)
    flips: bool = True
    padding: int = 4
    policy: str = "cifar"


def training_step(images: torch.Tensor, labels: torch.Tensor) -> Callable[[int], object]:
    model: nn.Module = build_model("resnet20", (3, 32, 32), CLASSES, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def step(turn: int) -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def loading(words: str, images: torch.Tensor) -> Callable[[int], object]:
    pipeline = build_pipeline([word for word in words.split("+") if word != "none"], Facts())
    generator = torch.Generator().manual_seed(0)

    def load(turn: int) -> torch.Tensor:
        indices = torch.randint(IMAGES, (BATCH,), generator=generator)
        return pipeline(images.index_select(0, indices), sample_keys(0, turn, indices))

    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    generator = torch.Generator().manual_seed(0)
    # noise over a smooth ground: equalize and autocontrast have work to do
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator) // 4
    images += torch.randint(0, 192, (IMAGES, 3, 1, 1), dtype=torch.uint8, generator=generator)
    inputs, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,))
    work = {"step": training_step(inputs, labels)} | {words: loading(words, images) for words in AUGMENTATIONS}
    work["mixup"] = lambda turn: mix(inputs, labels, CLASSES, mixup=1.0, key=turn)
    work["cutmix"] = lambda turn: mix(inputs, labels, CLASSES, cutmix=1.0, key=turn)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    order = list(work)
    for turn in range(-3, settings.turns):
        random.Random(turn).shuffle(order)
        for name in order:
            start = time.perf_counter()
            work[name](turn)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    fastest = min(seconds["step"])
    print(
        f"ResNet-20, SGD, batch {BATCH}, {settings.threads} threads, {settings.turns} turns: a step takes "
        f"{1e3 * statistics.median(seconds['step']):.0f} ms (fastest {1e3 * fastest:.0f} ms)"
    )
    for name, times in seconds.items():
        if name != "step":
            ratios = [mine / step for mine, step in zip(times, seconds["step"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            verdict = "reached" if middle <= GOAL else "missed"
            print(
                f"{name:25} {1e3 * statistics.median(times):6.2f} ms   share {100 * middle:5.2f} % "
                f"({100 * low:.2f}-{100 * high:.2f})   fastest {1e3 * min(times):6.2f} ms, "
                f"{100 * min(times) / fastest:5.2f} %   goal {100 * GOAL:.0f} % {verdict}"
            )


if __name__ == "__main__":
    main()
