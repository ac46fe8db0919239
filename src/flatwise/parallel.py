"""Many processes: which ranks share a perturbation, and when ``DistributedDataParallel`` sums gradients.

With ``sync_ascent=True`` the first gradient is that of the global batch, so there is one perturbation for all ranks,
and two sums of gradients a step. With ``False`` every rank climbs along the gradient of its own samples (m-sharpness,
as in the SAM paper's experiments), and there is one sum. With a number n, n consecutive ranks share a perturbation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn import Module

from flatwise.nograd import no_grad
from flatwise.norms import kinds_of
from flatwise.passes import removed
from flatwise.shards import is_sharded, local, sharding_of

SyncAscent = bool | int | None

NO_WRAPPER = """sync_ascent=False keeps the first gradient on its rank, so flatwise must know the module that sums \
gradients: pass model=ddp_model, the DistributedDataParallel module itself"""


def ranks() -> int:
    """Return the number of processes of the training."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


class Ranks:
    """How the processes of a training share a perturbation.

    Args:
        sync: True or None for all of them, False for none, n for every n consecutive ones.
        modules: returns the outermost modules.
    """

    def __init__(self, sync: SyncAscent, modules: Callable[[], list[Module]]) -> None:
        self._sync, self._modules = sync, modules
        self._begun = False
        self._group: Any = None
        self._warm: set[int] = set()

    @property
    def local(self) -> bool:
        """Whether ranks climb along gradients of their own."""
        return self._sync is not True and self._sync is not None and ranks() > self._size

    @property
    def _size(self) -> int:
        return int(self._sync) or 1 if self._sync is not None else 1

    def begin(self) -> None:
        """Say, once and on the first rank, what is done; and make the groups.

        Raises:
            RuntimeError: if the module that sums gradients is not known.
            ValueError: if the number of ranks cannot be divided so.
        """
        if self._begun or ranks() == 1:
            return
        if ranks() % self._size:
            raise ValueError(f"sync_ascent={self._size} must divide the number of ranks, which is {ranks()}")
        if self.local:
            if not self.wrappers():
                raise RuntimeError(NO_WRAPPER)
            if self._size > 1:
                self._group, _ = distributed.new_subgroups(self._size)
        self._begun = True
        if distributed.get_rank() == 0:
            what = "one perturbation for the global batch, two sums of gradients a step"
            if self.local and self._size > 1:
                what = f"one perturbation for every {self._size} ranks"
            elif self.local:
                what = "one perturbation for each rank (m-sharpness), one sum of gradients a step"
            print(f"flatwise: {ranks()} ranks, sync_ascent={self._sync is None or self._sync}: {what}", file=sys.stderr)

    def wrappers(self) -> list[Any]:
        """Return the modules that sum gradients."""
        kind = torch.nn.parallel.DistributedDataParallel
        return [module for root in self._modules() for module in root.modules() if isinstance(module, kind)]

    def cold(self) -> set[int]:
        """Return the wrappers that must see a pass with sums before they can do one without (``static_graph``)."""
        return {id(module) for module in self.wrappers() if module.static_graph} - self._warm

    def warmed(self) -> None:
        """Note that they have seen one."""
        self._warm |= self.cold()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Do not sum gradients inside: forward and backward must both be there."""
        cold = self.cold()
        with ExitStack() as stack:
            for module in self.wrappers():
                if id(module) not in cold:
                    stack.enter_context(module.no_sync())
            yield

    @no_grad
    def agreed(self, norm: Tensor | None, device: torch.device) -> Tensor:
        """Return the norm of this rank's first gradient; NaN on all ranks where that of one is not finite.

        Args:
            norm: None on a rank that has no gradient, which must answer the others all the same; it counts as 0.
            device: of the parameters.

        Returns:
            The norm, 0-dim.
        """
        norm = torch.zeros((), device=device) if norm is None else norm
        bad = (~torch.isfinite(norm)).to(torch.float32)
        distributed.all_reduce(bad)
        return torch.where(bad > 0, torch.full_like(norm, float("nan")), norm)

    @no_grad
    def share(self, params: Sequence[Tensor]) -> None:
        """Average the gradients of the ranks that share a perturbation.

        Args:
            params: parameters with gradients in ``.grad``.
        """
        if self._group is None:
            return
        for grads in kinds_of([p.grad for p in params if p.grad is not None]):
            flat = _flatten_dense_tensors(grads)  # type: ignore[no-untyped-call]
            distributed.all_reduce(flat, group=self._group)
            flat.div_(self._size)
            parts = _unflatten_dense_tensors(flat, grads)  # type: ignore[no-untyped-call]
            torch._foreach_copy_(grads, list(parts))


@contextmanager
def spoiled_unless(finite: Tensor, params: Sequence[Tensor]) -> Iterator[None]:
    """Make the gradients of a pass NaN on every rank unless ``finite`` on this one.

    Args:
        finite: a verdict on the first gradient of this rank.
        params: all parameters; each is watched, since a pass may not reach it.

    Yields:
        Nothing.
    """

    def spoil(grad: Tensor) -> Tensor:
        return grad.masked_fill(~finite.to(grad.device), float("nan"))

    with ExitStack() as stack:
        for param in params:
            if param.requires_grad:
                stack.enter_context(removed(partial(param.register_hook, spoil)))
        yield


@no_grad
def assert_replicas_equal(params: Iterable[Tensor]) -> None:
    """Check that all ranks hold the same weights, bit for bit; every rank must call it.

    What is sent is what is compared: the model, once. Of parameters that are cut over processes, replicas are compared.

    Args:
        params: ``model.parameters()``, or ``model.state_dict().values()`` to check buffers too.

    Raises:
        RuntimeError: on every rank, if one of them differs from the first.
    """
    tensors = list(params)
    if ranks() == 1:
        return
    differs = torch.zeros(len(tensors))
    for index, tensor in enumerate(tensors):
        here = local(tensor.detach())
        for group in _replicas(tensor):
            first = here.clone(memory_format=torch.contiguous_format)
            distributed.broadcast(first, src=distributed.get_global_rank(group, 0), group=group)
            if not torch.equal(_bytes(first), _bytes(here)):  # in bytes a NaN is itself
                differs[index] = 1
    device = local(tensors[0]).device if tensors else torch.device("cpu")
    differs = differs.to(device)
    distributed.all_reduce(differs)
    wrong = [str(index) for index, count in enumerate(differs.tolist()) if count]
    if wrong:
        raise RuntimeError(
            f"the replicas of the weights differ between ranks, in tensor{'s' * (len(wrong) > 1)} "
            f"{', '.join(wrong[:5])}{' and more' if len(wrong) > 5 else ''} of {len(tensors)}: seed all ranks alike "
            "before the model is made, or let DistributedDataParallel send the weights"
        )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _replicas(tensor: Tensor) -> list[Any]:
    """Return the groups of ranks that should hold the same part of a tensor."""
    if not is_sharded(tensor):
        return [distributed.group.WORLD]
    cut = sharding_of(tensor)
    cut_along = {dim for dim, _ in cut.cut} if cut is not None else set()
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return [mesh.get_group(dim) for dim in range(mesh.ndim) if dim not in cut_along]
