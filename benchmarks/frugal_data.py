"""What the tasks of ``frugal.py`` train and how they judge it: real images and real text, fixed by the seed alone."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from flatwise.lab.data import ImageData, load_data
from flatwise.lab.models import build_model
from flatwise.lab.split import make_split, with_noise
from flatwise.seeds import derive, stream
from frugal_models import TinyViT
from suggest_rho_chars import Transformer

EVALUATION_BATCH = 512
SYMBOLS = 128
# Modules that every supported Python has as single files; the test is of other modules, not of the same ones' ends.
TEXT = (
    "argparse", "ast", "calendar", "configparser", "contextlib", "csv", "dataclasses", "difflib", "dis", "fractions",
    "ftplib", "functools", "gzip", "inspect", "ipaddress", "locale", "mailbox", "pickle", "subprocess", "typing",
)  # fmt: skip
TEST_TEXT = ("shutil", "statistics", "tempfile", "textwrap", "traceback")


@dataclass(frozen=True, eq=False)
class Material:
    """A task with a seed.

    Attributes:
        model: with its first weights.
        inputs: training samples.
        labels: theirs; for text one for each character.
        score: of the trained model, more is better.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    score: Callable[[nn.Module], float]


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Return the mean loss, or with ``reduction="none"`` that of each sample."""
    losses = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)
    return losses if reduction == "mean" else losses.view(len(labels), -1).mean(1)


@torch.no_grad()
def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part) for part in inputs.split(EVALUATION_BATCH)])


def _accuracy(inputs: Tensor, labels: Tensor) -> Callable[[nn.Module], float]:
    """Score by the accuracy in percent."""
    return lambda model: 100 * float((_logits(model, inputs).argmax(1) == labels).double().mean())


@dataclass(frozen=True)
class Images:
    """A network of the lab on images; split, wrong labels and weights are the lab's own of that seed.

    Attributes:
        dataset: of the lab.
        model: a network of the lab, or "vit".
        size: images, of which a tenth is held out (and not looked at here).
        noise: share of wrong labels.
        halved: whether a pixel is the mean of 2 × 2: a quarter of the time.
    """

    dataset: str
    model: str
    size: int | None = None
    noise: float = 0.0
    halved: bool = False

    def __call__(self, seed: int) -> Material:
        """Build the task of a seed."""
        data = _images(self.dataset, self.halved)
        split = make_split(data, seed, train_size=self.size, validation_share=0.1, label_noise=self.noise)
        shape = tuple(data.train_inputs.shape[1:])
        if self.model == "vit":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(seed, "weights"))
                model: nn.Module = TinyViT(shape[-1], data.classes)
        else:
            model = build_model(self.model, shape, data.classes, derive(seed, "weights"))
        return Material(model, split.inputs, split.labels, _accuracy(data.test_inputs, data.test_labels))


@lru_cache(maxsize=4)
def _images(name: str, halved: bool) -> ImageData:
    data = load_data(name)
    if not halved:
        return data
    inputs = {part: functional.avg_pool2d(getattr(data, part), 2) for part in ("train_inputs", "test_inputs")}
    return replace(data, **inputs)


@dataclass(frozen=True)
class FineTune:
    """``cnn-small`` learns the odd classes of Fashion-MNIST, then with a new last layer the even ones from few images.

    A pixel is the mean of 2 × 2. The first training is part of the seed: it is made anew, always the same, once in
    each process.

    Attributes:
        size: images of the even classes.
        pretrain_size: images of the odd ones, whose labels are right.
        pretrain_epochs: of the first training.
        noise: share of wrong labels among the even ones.
    """

    size: int = 500
    pretrain_size: int = 4000
    pretrain_epochs: int = 4
    noise: float = 0.0

    def __call__(self, seed: int) -> Material:
        """Build the task of a seed."""
        data = _images("fashion-mnist", True)
        inputs, labels = _classes(seed, 0, self.size)
        if self.noise:
            labels = with_noise(labels, self.noise, 5, stream(seed, "noise"))
        shape = tuple(data.train_inputs.shape[1:])
        model = build_model("cnn-small", shape, 5, derive(seed, "weights"))
        model.load_state_dict(_pretrained(seed, self.pretrain_size, self.pretrain_epochs))
        head = build_model("cnn-small", shape, 5, derive(seed, "new head"))[-1]  # type: ignore[index]
        model[-1].load_state_dict(head.state_dict())  # type: ignore[index]
        even = data.test_labels % 2 == 0
        return Material(model, inputs, labels, _accuracy(data.test_inputs[even], data.test_labels[even] // 2))


def _classes(seed: int, remainder: int, size: int) -> tuple[Tensor, Tensor]:
    """Draw images of the classes of one parity."""
    data = _images("fashion-mnist", True)
    order = torch.randperm(len(data.train_labels), generator=stream(seed, "split"))
    chosen = order[data.train_labels[order] % 2 == remainder][:size]
    return data.train_inputs[chosen], data.train_labels[chosen] // 2


@lru_cache(maxsize=8)
def _pretrained(seed: int, size: int, epochs: int) -> dict[str, Tensor]:
    """Train on the odd classes: SGD, batches of 64, learning rate 0.05 falling linearly to 0."""
    inputs, labels = _classes(seed, 1, size)
    model = build_model("cnn-small", tuple(inputs.shape[1:]), 5, derive(seed, "pretraining"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (len(labels) // 64)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max(steps, 1))
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=stream(seed, "pretraining order", epoch))
        for indices in order.split(64)[: len(labels) // 64]:
            optimizer.zero_grad()
            cross_entropy(model(inputs[indices]), labels[indices]).backward()
            optimizer.step()
            schedule.step()
    return model.state_dict()


@dataclass(frozen=True)
class Chars:
    """A small transformer predicts the next character of the standard library's sources.

    It is scored by minus its loss; one that diverged, as one that guesses.
    """

    context: int = 32
    width: int = 32
    size: int | None = 6400

    def __call__(self, seed: int) -> Material:
        """Build the task of a seed."""
        training, test = _text(TEXT), _text(TEST_TEXT)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "weights"))
            model = Transformer(SYMBOLS, self.context, self.width)
        inputs, labels = _windows(training, self.context)
        # A part of the windows, spread over all modules, so that every one is met several times.
        chosen = torch.randperm(len(labels), generator=stream(0, "text"))[: self.size]
        inputs, labels = inputs[chosen], labels[chosen]
        test_inputs, test_labels = _windows(test, self.context)
        # Every third window of the test modules: they are judged in a second rather than in three.
        test_inputs, test_labels = test_inputs[::3], test_labels[::3]

        def score(model: nn.Module) -> float:
            loss = float(cross_entropy(_logits(model, test_inputs), test_labels))
            return -min(loss, math.log(SYMBOLS)) if math.isfinite(loss) else -math.log(SYMBOLS)

        return Material(model, inputs, labels, score)


def text_digest() -> str:
    """Name the text: another version of Python has another one."""
    return hashlib.sha256(_read(TEXT) + b"\0" + _read(TEST_TEXT)).hexdigest()[:12]


def _read(modules: tuple[str, ...]) -> bytes:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join((folder / f"{name}.py").read_text("utf-8").encode("ascii", "replace") for name in modules)


@lru_cache(maxsize=2)
def _text(modules: tuple[str, ...]) -> Tensor:
    return torch.tensor(list(_read(modules)))


def _windows(text: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Cut a text into rows that do not overlap, and the characters that follow each."""
    rows = text.unfold(0, context + 1, context)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
