"""The processes of a training and their devices, through Hugging Face Accelerate.

Every process has an equal, consecutive share of each global batch, so that together they see the samples that a
single process sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flatwise.errors import UserError
from flatwise.lab.train.config import TrainConfig

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class World:
    """This process among those that train together.

    Args:
        config: its ``precision`` is read.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.accelerator = _accelerator(config)
        self.size: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device

    @property
    def scaler(self) -> Any:
        """What scales the loss, or None."""
        return self.accelerator.scaler

    def prepare(self, model: nn.Module) -> nn.Module:
        """Put the model on the device, into its precision, and into what sums gradients over processes.

        Args:
            model: the network.

        Returns:
            What is called in a pass.
        """
        prepared: nn.Module = self.accelerator.prepare_model(model)
        return prepared

    def share(self, indices: Tensor) -> Tensor:
        """Take this process's part of a global batch.

        Args:
            indices: the global batch.

        Returns:
            An equal, consecutive part of it.
        """
        part = len(indices) // self.size
        return indices[self.rank * part : (self.rank + 1) * part]


def _accelerator(config: TrainConfig) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise UserError("flatwise train needs Accelerate: pip install 'flatwise[lab]'") from error
    # Its state outlives it, and refuses another precision: two trainings in one process must not meet.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=PRECISIONS[config.precision])
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16, or fp32")
    return accelerator
