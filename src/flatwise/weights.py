"""Displaced weights that always come back, bit for bit.

``w + eps - eps`` is not ``w`` in floating point, so the weights are restored from a copy, in place, into the same
storage. What the copy costs is bytes, and three ways of taking it differ only in how many:

- *clone*: one foreach launch; for small tensors, and on accelerators whose allocator keeps memory at hand.
- *swap*: a large tensor on the CPU keeps its copy in the buffer of its first gradient, which is dead after the
  ascent. A fresh 40 MB buffer would cost five times the copy in page faults alone.
- *rows*: a gradient that lives in a few rows (an embedding) moves only those rows.

Every way writes the copy before it touches the weight, and a log is undone in reverse order. So an interrupt
between any two lines leaves a state from which :meth:`Displacement.undo` returns the exact weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatwise.nograd import no_grad
from flatwise.norms import COARSE, SMALL, accumulation_dtype, packs
from flatwise.rounding import Arrival, round_at_random
from flatwise.schedule import StepNoise
from flatwise.shards import DTYPE, Sharding, all_plain, local, sharding_of

CHUNK = 1 << 17
"""Elements moved at once by a swap: three such blocks stay in the second-level cache."""

MANY_ROWS = 1024
"""With fewer rows, a weight is no table of which a batch reads a part."""

SWAP_FROM = 1 << 19
"""Below this many elements, a fresh copy costs less than moving block by block."""

ROWS_FROM = 1 << 20
"""Below this many elements, looking for empty rows costs more than it saves."""


@dataclass(slots=True)
class Piece:
    """A parameter, or some of its rows, with the gradient that belongs to it.

    Attributes:
        param: the parameter, as real numbers (a complex one is seen through ``view_as_real``).
        grad: the gradient, shape of ``param`` or ``(len(rows), *param.shape[1:])``. It is consumed.
        owner: the parameter itself.
        source: the gradient as it was found in ``owner.grad``.
        rows: indices into the first dimension, or None for the whole parameter.
        owned: nobody else can see ``grad``, so its buffer may be reused.
        shared: somebody else still needs ``grad``, so it must not be written.
        over: how the parameter is cut over processes; ``param`` and ``grad`` are the parts that are here.
    """

    param: Tensor
    grad: Tensor
    owner: Tensor
    source: Tensor
    rows: Tensor | None = None
    owned: bool = False
    shared: bool = False
    over: Sharding | None = None

    def unshare(self) -> None:
        """Make ``grad`` writable."""
        if self.shared:
            self.grad, self.shared = self.grad.clone(), False

    def weight(self) -> Tensor:
        """Return the weights that ``grad`` belongs to, shape of ``grad``."""
        return self.param if self.rows is None else self.param.index_select(0, self.rows)


def _references_when_owned() -> int:
    """Count the Python references that a gradient has when nobody holds it but the one who took it."""
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = torch.zeros(1)
    grad = param.grad
    param.grad = None
    return sys.getrefcount(grad)


_OWNED = _references_when_owned()


def pieces_of(params: Iterable[Tensor], *, find_rows: bool, whole: bool = False, shared: bool = False) -> list[Piece]:
    """Pair parameters with their gradients, and take the gradients away from ``param.grad``.

    Args:
        params: parameters; those without a gradient or without elements are passed over.
        find_rows: reduce large gradients on the CPU that are zero in most rows to the rows that are not. Right only
            where a zero gradient means a zero perturbation and where squares decide what is zero (p = 2).
        whole: give every piece the whole parameter, also where the gradient is sparse.
        shared: the gradients are needed afterwards.

    Returns:
        One piece per parameter that has a gradient, also where this process holds none of its elements.
    """
    found: list[Piece] = []
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    params = list(params)
    plain = all_plain(params) and all_plain([grad for p in params if (grad := p.grad) is not None])
    for param in params:
        grad = param.grad
        if grad is None or not (count := param.numel()):
            continue
        param.grad = None
        if plain and count < SMALL:
            found.append(Piece(param, grad, param, grad, shared=shared))
            continue
        over = sharding_of(param)
        if local(param) is not param:
            weight, here = local(param.detach()), local(grad, param)
            if here.is_complex():
                weight, here = torch.view_as_real(weight), torch.view_as_real(here.resolve_conj())
            found.append(Piece(weight, here, param, grad, shared=shared, over=over))
            continue
        on_host = grad.device.type == "cpu"
        # DistributedDataParallel may hand out views of its buckets and write into them again in the second pass.
        owned = on_host and count >= SMALL and not distributed and not shared and sys.getrefcount(grad) <= _OWNED
        piece = _piece(param, grad, owned, find_rows and on_host, whole)
        piece.shared = shared
        found.append(piece)
        del grad
    return found


def _piece(param: Tensor, source: Tensor, owned: bool, find_rows: bool, whole: bool) -> Piece:
    grad = source
    if grad.is_sparse:
        grad = grad.coalesce()
        if grad.sparse_dim() == 1 and not grad.is_complex() and not whole:
            return Piece(param, grad.values().clone(), param, source, grad.indices()[0])
        grad = grad.to_dense()
    if param.is_complex():
        grad = torch.view_as_real(grad.resolve_conj())
        return Piece(torch.view_as_real(param.detach()), grad, param, source)
    if find_rows and grad.numel() >= ROWS_FROM and grad.dim() > 1 and grad.is_contiguous():
        rows = _nonzero_rows(grad)
        if rows is not None:
            return Piece(param, grad.index_select(0, rows), param, source, rows)
    return Piece(param, grad, param, source, owned=owned and may_hold_copy(grad, param))


def may_hold_copy(grad: Tensor, param: Tensor) -> bool:
    """Tell whether the buffer of a gradient that nobody else sees can, and should, take the copy of its parameter.

    Args:
        grad: on the CPU.
        param: same shape.

    Returns:
        Whether it is large, alike and whole.
    """
    return (
        grad.numel() >= SWAP_FROM
        and grad.dtype == param.dtype
        and grad.dtype not in COARSE
        and grad.is_contiguous()
        and param.is_contiguous()
        and grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
    )


def _nonzero_rows(grad: Tensor) -> Tensor | None:
    """Return the rows of ``grad`` that hold anything, or None where that is more than a quarter of them."""
    rows, flat = grad.shape[0], grad.flatten(1)
    sample = flat[:: max(1, rows // 64), :8]
    if rows < MANY_ROWS or int(sample.any(dim=1).sum()) * 2 > sample.shape[0]:
        return None  # dense: do not read it all to find that out
    norms = torch.linalg.vector_norm(flat, dim=1, dtype=accumulation_dtype(grad.dtype))
    nonzero = norms.nonzero()[:, 0]
    return nonzero if 4 * nonzero.numel() <= rows else None


class Displacement:
    """Weights that are away from where they belong, and the log that brings them back.

    Args:
        draws: round half-precision weights at random, with these.
    """

    def __init__(self, draws: StepNoise | None = None) -> None:
        self._log: list[_Whole | _Rows | _Swapped] = []
        self._draws = draws
        self.arrival: Arrival | None = None

    @no_grad
    def add(self, pieces: Sequence[Piece], factor: float | Tensor) -> None:
        """Move ``param`` to ``param + factor * grad`` for each piece, keeping exact copies.

        Args:
            pieces: what to move. Their gradients are consumed.
            factor: a Python number on the CPU; on an accelerator a 0-dim tensor, so that nothing waits for it.
        """
        whole: list[Piece] = []
        for piece in pieces:
            if piece.rows is not None:
                self._move_rows(piece, piece.rows, factor)
            elif piece.owned and isinstance(factor, float):
                self._swap(piece, factor)
            else:
                whole.append(piece)
        if whole:
            params = [piece.param for piece in whole]
            grads = [piece.grad for piece in whole]
            copies = self._keep(params, [piece.owner if piece.over is not None else None for piece in whole])
            # `alpha` would be rounded to the dtype of the weights, which ruins a small factor in half precision.
            if isinstance(factor, float) and COARSE.isdisjoint(map(DTYPE, params)):
                torch._foreach_add_(params, grads, alpha=factor)
            elif isinstance(factor, float) or self._draws is not None or self.arrival is not None:
                for ps, gs, before in packs(params, grads, copies):
                    self._move_coarse(ps, gs, before, factor)
            else:
                torch._foreach_mul_(grads, factor)
                torch._foreach_add_(params, grads)

    @no_grad
    def place(self, params: Sequence[Tensor], copies: Sequence[Tensor], offsets: Sequence[Tensor]) -> None:
        """Move ``param`` to ``copy + offset``; the caller has kept ``copies`` with :meth:`keep`."""
        if self._draws is None or COARSE.isdisjoint(map(DTYPE, params)):
            torch._foreach_copy_(list(params), list(copies))
            torch._foreach_add_(list(params), list(offsets))
            return
        for param, copy, offset in zip(params, copies, offsets, strict=True):
            exact = copy.to(accumulation_dtype(copy.dtype)) + offset
            if param.dtype in COARSE:
                param.copy_(round_at_random(exact, param.dtype, self._draws.generator(param.device)))
            else:
                param.copy_(exact)

    @no_grad
    def keep(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Copy ``params``, to be written back by :meth:`undo`, and return the copies."""
        return self._keep(list(params))

    def moved(self) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of the weights as they are now and as they were, same shapes."""
        return [pair for entry in self._log for pair in entry.moved()]

    def undo(self) -> None:
        """Write every copy back in place. Safe to call again after an interrupt, and when nothing was moved."""
        if self._log:
            self._undo()

    @no_grad
    def _undo(self) -> None:
        while self._log:
            self._log[-1].undo()
            self._log.pop()

    def _keep(self, params: list[Tensor], cut: Sequence[Tensor | None] = ()) -> list[Tensor]:
        copies = list(torch._foreach_clone(params)) if hasattr(torch, "_foreach_clone") else [p.clone() for p in params]
        self._log.append(_Whole(params, copies, cut))
        return copies

    def _move_coarse(
        self, params: list[Tensor], grads: list[Tensor], copies: list[Tensor], factor: float | Tensor
    ) -> None:
        """Move by eps in full precision, rounded once."""
        eps = [(g.double() if g.is_cpu else g.float()) * factor for g in grads]  # not every device has doubles
        coarse = params[0].dtype in COARSE
        if coarse and self._draws is not None:
            draws = self._draws.generator(params[0].device)
            for param, move in zip(params, eps, strict=True):
                param.copy_(round_at_random(param.float() + move.float(), param.dtype, draws))
        else:
            torch._foreach_add_(params, eps)
        if coarse and self.arrival is not None:
            self.arrival.add(copies, params, eps)

    def _move_rows(self, piece: Piece, rows: Tensor, factor: float | Tensor) -> None:
        kept = _Rows(piece.param, rows, piece.param.index_select(0, rows))
        self._log.append(kept)
        piece.param.index_copy_(0, rows, kept.copy + (piece.grad * factor).to(kept.copy.dtype))

    def _swap(self, piece: Piece, factor: float) -> None:
        kept = _Swapped(piece.param.view(-1), piece.grad.view(-1))
        self._log.append(kept)
        for w, g in zip(torch.split(kept.weight, CHUNK), torch.split(kept.copy, CHUNK), strict=True):
            displaced = torch.add(w, g, alpha=factor)
            g.copy_(w)
            kept.filled += w.numel()  # the copy of this block is complete: from here on it may be overwritten
            w.copy_(displaced)


@dataclass
class _Whole:
    """Copies of whole parameters, or of the parts that are here of those that are ``cut``."""

    params: list[Tensor]
    copies: list[Tensor]
    cut: Sequence[Tensor | None] = ()

    def undo(self) -> None:
        for index, owner in enumerate(self.cut):
            if owner is not None:  # fully_shard may move a part to other memory in its first forward pass (torch 2.9)
                here = local(owner.detach())
                self.params[index] = torch.view_as_real(here) if here.is_complex() else here
        torch._foreach_copy_(self.params, self.copies)

    def moved(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.params, self.copies, strict=True))


@dataclass
class _Rows:
    """Copies of some rows of a parameter."""

    param: Tensor
    rows: Tensor
    copy: Tensor

    def undo(self) -> None:
        self.param.index_copy_(0, self.rows, self.copy)

    def moved(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.param.index_select(0, self.rows), self.copy)]


@dataclass
class _Swapped:
    """A copy in the buffer of a gradient, complete up to ``filled`` elements."""

    weight: Tensor
    copy: Tensor
    filled: int = 0

    def undo(self) -> None:
        self.weight[: self.filled].copy_(self.copy[: self.filled])

    def moved(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.weight, self.copy)]
