"""The processes of a training and their devices, through Hugging Face Accelerate.

Every process has an equal, consecutive share of each global batch, so that together they see the samples that a
single process sees. ``torchrun`` and ``accelerate launch`` start them; gradients are summed by
``DistributedDataParallel``, or with ``accelerate launch --use_fsdp --fsdp_version 2`` by FSDP2, which also cuts the
weights over the processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from flatwise.errors import TrainingError, UserError
from flatwise.integrations.accelerate import refuse_engine
from flatwise.lab.train.config import TrainConfig

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
Answer = TypeVar("Answer")


class World:
    """This process among those that train together.

    Args:
        config: its ``precision`` and ``perturbation`` are read.
        trackers: names of Accelerate's trackers.
        project: the folder that they write to.

    Raises:
        UserError: the processes cannot do what the settings ask for.
    """

    def __init__(self, config: TrainConfig, trackers: list[str] | None = None, project: str | None = None) -> None:
        self.accelerator = _accelerator(config, trackers or [], project)
        self.size: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        self.sharded = self.size > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        self.local = self.size > 1 and config.perturbation == "local"
        """Whether each process has a perturbation of its own."""
        if self.sharded:
            if os.environ.get("FSDP_VERSION", "1") != "2":
                raise UserError("only FSDP2 leaves room for a second pass: add --fsdp_version 2 to accelerate launch")
            if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
                raise UserError("weights on the CPU are not supported: leave --fsdp_offload_params out")
            if self.local:
                raise UserError("FSDP2 sums every gradient over all processes: add --perturbation global")

    @property
    def scaler(self) -> Any:
        """What scales the loss, or None."""
        return self.accelerator.scaler

    @property
    def sync_ascent(self) -> bool | None:
        """The core's word for whether processes share a perturbation; None where there is one process."""
        return None if self.size == 1 else not self.local

    def prepare(self, model: nn.Module) -> nn.Module:
        """Put the model into its precision, and into what sums gradients over processes.

        Args:
            model: the network, on its device.

        Returns:
            What is called in a pass.
        """
        if self.sharded:
            return _fully_sharded(model, self.device)
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

    def gather(self, values: Tensor) -> Tensor:
        """Join what the processes have, in their order; every process must call it.

        Args:
            values: of one shape on all of them.

        Returns:
            All of them, along the first dimension.
        """
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def mean(self, values: Tensor) -> Tensor:
        """Average over the processes; every process must call it.

        Args:
            values: of one shape on all of them.

        Returns:
            The average.
        """
        if self.size == 1:
            return values
        total = values.detach().clone()
        distributed.all_reduce(total)
        return total / self.size

    @torch.no_grad()
    def spread(self, tensors: list[Tensor]) -> None:
        """Give all processes what the first has; every process must call it.

        Args:
            tensors: whole on each process; those of the first are sent.
        """
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def first(self, work: Callable[[], Answer]) -> Answer:
        """Let the first process do what only one may, and tell all of them what came of it.

        Args:
            work: what to do.

        Returns:
            What it returned, on every process.

        Raises:
            UserError: it was raised there; all processes raise it.
            TrainingError: likewise.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = work()
            except UserError as error:
                distributed.broadcast_object_list([None, (str(error), error.exit_code)])
                raise
        distributed.broadcast_object_list(outcome)
        if outcome[1] is not None:
            text, code = outcome[1]
            if code == 1:
                raise TrainingError(text)
            raise UserError(text)
        answer: Answer = outcome[0]
        return answer


def _accelerator(config: TrainConfig, trackers: list[str], project: str | None) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise UserError("flatwise train needs Accelerate: pip install 'flatwise[lab]'") from error
    # Its state outlives it, and refuses another precision: two trainings in one process must not meet.
    AcceleratorState._reset_state()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        # Processes meet on a CPU only where Accelerate is told that it is one.
        cpu=started > 1 and not torch.accelerator.is_available(),
        mixed_precision=PRECISIONS[config.precision],
        log_with=trackers or None,
        project_dir=project,
    )
    if accelerator.num_processes != started:
        raise UserError(
            f"{started} processes were started, and Accelerate lets {accelerator.num_processes} of them train "
            f"together on {accelerator.device.type}: start them with ACCELERATE_USE_CPU=true, or start one"
        )
    try:
        refuse_engine(accelerator)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16, or fp32")
    return accelerator


def _fully_sharded(model: nn.Module, device: torch.device) -> nn.Module:
    """Cut the weights over all processes: those of each block of a sequence together, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for sequence in model.modules():
        if isinstance(sequence, nn.Sequential | nn.ModuleList):
            for block in sequence:
                # A block has parts; and what is inside a block that is cut already stays with it.
                if any(True for _ in block.children()) and not isinstance(block, nn.Sequential | nn.ModuleList):
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
