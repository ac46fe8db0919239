"""What the studies for two CPU cores share: sizes, arms, grids.

Every training is cut down from 200 epochs on 50,000 images to 15 on 2,700 (300 more are held out), so that all studies
together take about two hours on two cores. Nothing is augmented except where a study is about that: with so few steps
an augmented small network does not come to fit its images, and SAM has nothing to prevent.
"""

from __future__ import annotations

from dataclasses import replace

from flatwise.lab.paper.study import Arm, Claim, Fields

COMMON: Fields = {"dataset": "fashion-mnist", "train_size": 3000, "batch_size": 64, "epochs": 15, "augment": "none"}
SMALL: Fields = {**COMMON, "model": "cnn-small"}
PLAIN: Fields = {**COMMON, "model": "cnn-plain"}
WIDE: Fields = {**COMMON, "model": "wrn-10-1", "train_size": 2000, "epochs": 12}
CLEAN, NOISY = "clean labels", "40 % wrong labels"
KEPT = "1,2,4,6,8,10,12"

RATES: tuple[Fields, ...] = tuple({"lr": lr, "weight_decay": decay} for lr in (0.02, 0.1) for decay in (0.0005, 0.005))
RADII = (0.05, 0.1, 0.2, 0.5, 1.0)


def radii(*values: float) -> tuple[Fields, ...]:
    """List radii to choose from.

    Args:
        *values: the radii.

    Returns:
        The candidates.
    """
    return tuple({"rho": value} for value in values)


SGD = Arm("SGD", {"method": "base"}, RATES, twice=True, printed="sgd")
SAM = Arm("SAM", {"method": "sam"}, radii(*RADII), printed="sam")


def as_sam(name: str, method: str) -> Arm:
    """Make an arm that takes over what was chosen for SAM.

    Args:
        name: of the arm.
        method: of its training.

    Returns:
        The arm.
    """
    return Arm(name, {"method": method}, like="SAM")


SIZES = (
    "Fashion-MNIST instead of CIFAR-10, 2,700 images to train on and 300 held out instead of 50,000; 10,000 test it",
    "cnn-small (two convolutions, two linear layers, batch normalisation; 207,098 weights) instead of a residual "
    "network",
    "15 epochs of batch 64 instead of 200 of batch 256; no augmentation",
    "rho from 0.05, 0.1, 0.2, 0.5, 1 instead of 0.01 … 0.5: a smaller network takes a larger radius",
    "learning rate from 0.02, 0.1 and weight decay from 5e-4, 5e-3, chosen for SGD in each setting (two values each: "
    "the best may lie outside); SGD with the momentum of Nesterov, as in the official code",
)


def apart(*claims: Claim) -> tuple[Claim, ...]:
    """Judge claims about right labels, as they were made, apart from the same with wrong ones, where nobody made them.

    Args:
        *claims: made for right labels.

    Returns:
        Each twice.
    """
    beyond = [replace(c, text=f"{c.text}, with 40 % wrong labels", where=f"beyond {c.where}") for c in claims]
    return (*(replace(c, settings=(CLEAN,)) for c in claims), *(replace(c, settings=(NOISY,)) for c in beyond))
