"""How long a training is: its steps, the gradients in each, and the seconds of one, measured on this device."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cache
from statistics import median

import torch
from torch import nn
from torch.nn import functional

from flatwise.errors import UnknownNameError
from flatwise.lab.config import CompareConfig
from flatwise.lab.methods import parse_methods, wrap
from flatwise.lab.models import build_model
from flatwise.lab.train.config import TrainConfig

TOY_STEPS = 100
CPU_IMAGES, GPU_IMAGES = 4, 32
"""Images of a timed pass, where no m says how many there are."""


@dataclass(frozen=True)
class DataFacts:
    """What a data set asks of a network.

    Attributes:
        train: training images.
        classes: their classes.
        channels: 1 or 3.
        side: in pixels; 0 where the images have many sizes.
        bytes: size on disk, roughly, as it is downloaded.
    """

    train: int
    classes: int
    channels: int
    side: int
    bytes: float


DATA = {
    "cifar10": DataFacts(50_000, 10, 3, 32, 0.17e9),
    "cifar100": DataFacts(50_000, 100, 3, 32, 0.17e9),
    "svhn": DataFacts(604_388, 10, 3, 32, 1.6e9),
    "fashion-mnist": DataFacts(60_000, 10, 1, 28, 0.03e9),
    "imagenet": DataFacts(1_281_167, 1000, 3, 0, 150e9),
    "aircraft": DataFacts(6_667, 100, 3, 0, 2.8e9),
    "flowers": DataFacts(2_040, 102, 3, 0, 0.35e9),
    "pets": DataFacts(3_680, 37, 3, 0, 0.8e9),
    "cars": DataFacts(8_144, 196, 3, 0, 1.9e9),
    "birdsnap": DataFacts(47_386, 500, 3, 0, 3e9),
    "food101": DataFacts(75_750, 101, 3, 0, 5e9),
}
"""Training images as the fine-tuning literature counts them (Kornblith et al., CVPR 2019, table 1)."""


@dataclass(frozen=True)
class StepTime:
    """The measured cost of a step.

    Attributes:
        pass_seconds: forward and backward over a whole batch.
        passes: of these in a step.
        images: images of a timed pass; the time is scaled up to the batch.
        device: where it was timed.
    """

    pass_seconds: float
    passes: float
    images: int
    device: str

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.pass_seconds * self.passes


def facts(config: TrainConfig) -> DataFacts:
    """Look up what the data set of a training asks for.

    Args:
        config: its data set, one of the paper's.

    Returns:
        The facts, the side being the one that the network sees.

    Raises:
        UnknownNameError: not a data set of the paper.
    """
    if config.dataset not in DATA:
        raise UnknownNameError("data set of the paper", config.dataset, DATA)
    known = DATA[config.dataset]
    return replace(known, side=config.resolution or known.side)


def steps_of(config: TrainConfig) -> int:
    """Count the steps of a training.

    Args:
        config: the settings.

    Returns:
        Those stated, or those of all epochs, the last smaller batch of each left out.
    """
    if config.steps is not None:
        return config.steps
    size = config.train_size or facts(config).train
    return config.epochs * ((size - round(config.val_fraction * size)) // config.batch_size)


def passes_of(config: TrainConfig) -> float:
    """Count the gradients of a step, in units of a whole batch: 1 for the base, 2 for SAM.

    Args:
        config: its method is read.

    Returns:
        The mean over a short training of a toy with this method, as the method itself counts them: a window, an
        interval or several ascent steps are in it.
    """
    return _toy_passes(config.method, config.rho == 0)


@cache
def _toy_passes(method_text: str, nowhere: bool) -> float:
    method = parse_methods(CompareConfig(methods=method_text, rho=0.0 if nowhere else None))[0]
    if method.variant is None:
        return 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        toy = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        batch = (torch.randn(8, 4), torch.randint(2, (8,)))
        optimizer = wrap(method, torch.optim.SGD(toy.parameters(), lr=1e-3, momentum=0.9), TOY_STEPS, model=toy,
                         train_size=8 * TOY_STEPS, batch_size=8)  # fmt: skip
        reduction = "none" if optimizer.wants_sample_losses else "mean"
        total = 0.0
        for _ in range(TOY_STEPS):
            optimizer.step(lambda part: functional.cross_entropy(toy(part[0]), part[1], reduction=reduction), batch)
            total += optimizer.last.passes
    return total / TOY_STEPS


def measure_step(config: TrainConfig, device: str | None = None, *, images: int | None = None) -> StepTime:
    """Time a step of a training on random images of the right shape.

    One pass is timed over as many images as share a perturbation, or over few where all do, and scaled up to the batch;
    the base optimizer's own arithmetic, the data and the evaluations are left out, and all is one device's work.

    Args:
        config: the settings; the weights are random in any case.
        device: where; None: the GPU where there is one.
        images: images of a timed pass; None: ``m``, or 32 on a GPU, or 4 on a CPU.

    Returns:
        The time.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    usual = CPU_IMAGES if place == "cpu" else config.m or GPU_IMAGES
    count = max(2, min(images or usual, config.batch_size))
    data = facts(config)
    shape = (data.channels, data.side, data.side)
    seconds = _pass_seconds(config.model, shape, data.classes, count, config.precision, config.channels_last, place)
    name = torch.cuda.get_device_name() if place.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return StepTime(seconds * config.batch_size / count, passes_of(config), count, name)


@cache
def _pass_seconds(
    model: str, shape: tuple[int, int, int], classes: int, images: int, precision: str, channels_last: bool, device: str
) -> float:
    order = torch.channels_last if channels_last else torch.contiguous_format
    network = build_model(model, shape, classes, 0).to(device, memory_format=order)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(images, *shape, generator=generator).to(device, memory_format=order)
    labels = torch.randint(classes, (images,), generator=generator).to(device)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    times = []
    for _ in range(4):
        start = _now(device)
        with torch.autocast(device.partition(":")[0], kinds.get(precision), enabled=precision in kinds):
            loss = functional.cross_entropy(network(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        times.append(_now(device) - start)
        network.zero_grad()
    return median(times[1:])  # the first one also allocates


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
