"""The space of the weights: vectors of all of them, and what the processes that share the work agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatwise.norms import accumulation_dtype


class Space:
    """The weights that a measure is about.

    Args:
        chosen: the parameters, by name.
        group: a ``torch.distributed`` group whose processes share the work; None: this process alone.

    Attributes:
        names: of the parameters.
        params: the parameters.
        device: where vectors are.
        dtype: of vectors: the widest in which sums over the parameters are taken.
        group: the processes.
    """

    def __init__(self, chosen: Mapping[str, Tensor], group: Any) -> None:
        self.names, self.params, self.group = list(chosen), list(chosen.values()), group
        self.device = self.params[0].device
        self.dtype = max((accumulation_dtype(p.dtype) for p in self.params), key=lambda d: d.itemsize)

    @property
    def weights(self) -> int:
        """The number of weights that the measure is about."""
        return sum(p.numel() for p in self.params)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and speaks for all."""
        return self.group is None or torch.distributed.get_rank(self.group) == 0

    def flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Put tensors shaped as the parameters into one vector.

        Args:
            tensors: one for each parameter; None stands for zeros.

        Returns:
            Shape (weights,).
        """
        rows = [
            torch.zeros(p.numel(), dtype=self.dtype, device=self.device)
            if t is None
            else t.detach().reshape(-1).to(device=self.device, dtype=self.dtype)
            for t, p in zip(tensors, self.params, strict=True)
        ]
        return torch.cat(rows)

    def shaped(self, vector: Tensor) -> list[Tensor]:
        """Cut a vector into tensors shaped, typed and placed as the parameters.

        Args:
            vector: shape (weights,).

        Returns:
            One for each parameter; views where nothing has to be converted.
        """
        rows = torch.split(vector, [p.numel() for p in self.params])
        return [r.view(p.shape).to(device=p.device, dtype=p.dtype) for r, p in zip(rows, self.params, strict=True)]

    def summed(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes.

        Args:
            tensor: the same shape everywhere.

        Returns:
            The sum, the same bits on every process.
        """
        if self.group is None:
            return tensor
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def smallest(self, number: int) -> int:
        """Let every process come to the same number.

        Args:
            number: of this process.

        Returns:
            The smallest of all.
        """
        if self.group is None:
            return number
        value = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MIN, group=self.group)
        return int(value)
