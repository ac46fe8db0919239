"""Where curves go beside the run's folder: TensorBoard, Weights & Biases, MLflow, all through Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from flatwise.errors import UnknownNameError, UserError

MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
"""Each tracker and the modules of which one must be there."""


def usable_trackers(text: str, notice: Callable[[str], object]) -> list[str]:
    """Read the names of the trackers, and check that they are installed.

    Args:
        text: names separated by commas, or "none".
        notice: is given a sentence where tensorboard, the default, is not installed.

    Returns:
        The names.

    Raises:
        UnknownNameError: no such tracker.
        UserError: one that was asked for is not installed.
    """
    usable = []
    for name in (word.strip() for word in text.split(",")):
        if name in ("", "none"):
            continue
        if name not in MODULES:
            raise UnknownNameError("tracker", name, ("none", *MODULES))
        if any(find_spec(module) is not None for module in MODULES[name]):
            usable.append(name)
        elif name == "tensorboard":  # the default must not keep anybody from training
            notice("no curves for TensorBoard, which is not installed (pip install tensorboard, or --tracker none)")
        else:
            raise UserError(f"--tracker {name} needs it: pip install {name}")
    return usable
