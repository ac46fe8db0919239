"""``flatwise doctor``: is SAM on, of the right size, and what does it cost?"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from flatwise.commands.flags import POSITIONAL

CONTINUES = False
DESCRIPTION = "Take some steps on a copy, and say whether SAM is on, too small, fine or too large, and what to change."


@dataclass(frozen=True)
class Settings:
    """What is looked at: a problem of your own, or one of the lab's.

    Attributes:
        problem: module:function, whose function returns (model, loss_fn, data, optimizer); the lab's flags below are
            for a problem of the lab's.
        method: one of flatwise variants, with options, as in flatwise compare.
        rho: radius (default: the method's).
        optimizer: the base optimizer.
        dataset: the images; "digits" comes with scikit-learn.
        model: the network.
        lr: learning rate (default: 0.05 for sgd, 0.001 for adamw).
        batch_size: images in a step.
        label_noise: share of the training labels that are made wrong.
        data_root: folder in which to look for fashion-mnist.
        steps: how many are taken.
        seed: decides everything that is drawn.
        quiet: no progress.
    """

    problem: str | None = field(default=None, metadata={POSITIONAL: "?"})
    method: str = "sam"
    rho: float | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    dataset: Literal["digits", "fashion-mnist"] = "digits"
    model: Literal["mlp", "cnn-small", "cnn-plain", "resnet8", "resnet20"] = "cnn-small"
    lr: float | None = None
    batch_size: int = 64
    label_noise: float = 0.4
    data_root: str | None = None
    steps: int = 150
    seed: int = 0
    quiet: bool = False


def run(settings: Settings) -> int:
    """Look, and print the diagnosis.

    Args:
        settings: what is looked at.

    Returns:
        The exit code.
    """
    from flatwise.lab.subjects import own_problem
    from flatwise.lab.table import console_for
    from flatwise.measure import doctor

    if settings.problem is not None:
        model, loss_fn, data, optimizer = own_problem(settings.problem, 4)
    else:
        model, loss_fn, data, optimizer = _of_the_lab(settings)
    found = doctor(
        model, loss_fn, data, optimizer, steps=settings.steps, seed=settings.seed, progress=not settings.quiet
    )
    console_for(sys.stdout).print(str(found), markup=False)
    return 0


def _of_the_lab(settings: Settings) -> tuple[Any, Any, Any, Any]:
    import torch
    from torch.nn import functional

    from flatwise.errors import UserError
    from flatwise.lab.config import CompareConfig
    from flatwise.lab.data import load_data
    from flatwise.lab.loop import Trainer
    from flatwise.lab.methods import parse_methods
    from flatwise.seeds import stream

    config = CompareConfig(
        methods=settings.method,
        rho=settings.rho,
        optimizer=settings.optimizer,
        dataset=settings.dataset,
        model=settings.model,
        lr=settings.lr,
        batch_size=settings.batch_size,
        label_noise=settings.label_noise,
    )
    methods = parse_methods(config)
    if len(methods) != 1:
        raise UserError(f"--method takes one method, not {settings.method!r}")
    trainer = Trainer(config, methods[0], settings.seed, load_data(config.dataset, settings.data_root))

    def loss_fn(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        inputs, labels = batch
        return functional.cross_entropy(model(inputs), labels, reduction=trainer.reduction)

    shuffled = stream(settings.seed, "order", 0)
    order = torch.randperm(len(trainer.split.labels), generator=shuffled)
    parts = torch.split(order, trainer.batch_size)[: trainer.steps_per_epoch]
    return trainer.model, loss_fn, [trainer.batch(part, shuffled) for part in parts], trainer.optimizer
