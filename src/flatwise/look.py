"""One look around: away from the weights, a second pass, and exactly back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flatwise.ascent import Ball, Climb, GradientAscent, ProjectedAscent
from flatwise.descent import KeepGraph, second_order_term
from flatwise.guards import PassGuard
from flatwise.norms import COARSE, accumulation_dtype, joint_norm
from flatwise.passes import Closure, later_pass
from flatwise.record import StepRecord
from flatwise.weights import Displacement, Piece, pieces_of

_TINY = 2.0**100


class Look:
    """The displaced state between the two passes of a step.

    Args:
        groups: the parameter groups of the base optimizer.
        rhos: radius of each group; 0 leaves it out.
        ascent: where to look.
        guard: protects buffers and random state.
        record: takes what happened.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        rhos: Sequence[float],
        ascent: GradientAscent,
        guard: PassGuard,
        record: StepRecord,
    ) -> None:
        self._groups, self._rhos = groups, rhos
        self._ascent, self._guard, self._record = ascent, guard, record
        self._displacement = Displacement()
        self._path = ProjectedAscent(ascent.ball, self._displacement) if ascent.steps > 1 else None
        self.keep_random = False

    def displace(self) -> bool:
        """Move the weights along the gradients in ``.grad``, which are used up.

        Returns:
            True where the weights moved. On the CPU False where no gradient is usable; gradients are as before then.
        """
        ball = self._ascent.ball
        several = self._path is not None
        pairs = [(rho, g["params"]) for rho, g in zip(self._rhos, self._groups, strict=True) if rho > 0]
        found = [(rho, pieces_of(ps, find_rows=ball.p == 2 and not several, whole=several)) for rho, ps in pairs]
        found = [(rho, pieces) for rho, pieces in found if pieces]
        if not found:
            self._record._reason = "no gradient"
            return False
        rhos, groups = [rho for rho, _ in found], [pieces for _, pieces in found]
        if self._path is None:
            moved = self._displace_once(ball, groups, rhos)
        else:
            self._note(self._path.advance(groups, rhos), rhos)
            radius = self._path.radius()
            self._record._radius = lambda: float(radius)
            moved = True
        torch.clear_autocast_cache()  # autocast would go on using casts of the weights as they were
        return moved

    def _displace_once(self, ball: Ball, groups: list[list[Piece]], rhos: list[float]) -> bool:
        weights = [[piece.weight() for piece in pieces] if ball.adaptive else [] for pieces in groups]
        climb = ball.climb(weights, [[piece.grad for piece in pieces] for pieces in groups])
        self._note(climb, rhos)
        everything = [piece for pieces in groups for piece in pieces]
        scale = climb.scale
        if isinstance(scale, float):
            if scale == 0:
                for piece in everything:
                    piece.owner.grad = piece.source
                return False
            if scale > _TINY:  # a denormal gradient: its reciprocal norm would overflow as a float32 factor
                torch._foreach_mul_([piece.grad for piece in everything], _TINY)
                scale /= _TINY
        for pieces, rho in zip(groups, rhos, strict=True):
            if isinstance(scale, float):
                self._displacement.add(pieces, rho * scale)
                continue
            for device in {piece.param.device for piece in pieces}:
                here = [piece for piece in pieces if piece.param.device == device]
                self._displacement.add(here, scale.to(device) * rho)
        if not COARSE.isdisjoint({piece.param.dtype for piece in everything}):
            achieved = self._achieved(ball)
            self._record._radius = lambda: float(achieved)
        return True

    def _note(self, climb: Climb, rhos: Sequence[float]) -> None:
        record, ball = self._record, self._ascent.ball
        if record._norm is None:
            record._norm = climb.norm
        record._radius = _radius(ball, climb, rhos)

    @torch.no_grad()
    def _achieved(self, ball: Ball) -> Tensor:
        parts = []
        for now, before in self._displacement.moved():
            exact = before.to(accumulation_dtype(before.dtype))
            part = now.to(exact.dtype) - exact
            if ball.adaptive:
                (scale,) = ball.scaling([exact])
                part = torch.where(scale > 0, part / scale, 0)
            parts.append(part)
        return joint_norm(parts, ball.p)

    def drop_gradients(self) -> None:
        """Start a pass without gradients."""
        for group in self._groups:
            for param in group["params"]:
                param.grad = None

    def undo(self) -> None:
        """Bring the weights back. Safe to call again."""
        self._displacement.undo()
        torch.clear_autocast_cache()

    def close(self) -> None:
        """Bring weights, buffers and random state back. Safe to call again."""
        self.undo()
        self._guard.end(keep_random=self.keep_random)
        self._guard.leave_step()

    def add_second_order(self, closure: Closure) -> None:
        """Add the dropped term to the gradients in ``.grad``, by a third pass, at w.

        Args:
            closure: the closure of the first pass.

        Raises:
            RuntimeError: if the closure makes gradients that cannot be differentiated.
        """
        params = [p for g in self._groups for p in g["params"]]
        kept = [p.grad for p in params]
        self.drop_gradients()
        self._guard.rewind()
        with warnings.catch_warnings(), KeepGraph() as mode:
            warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
            later_pass(closure)
        if not mode.used:
            raise RuntimeError(
                "second_order=True differentiates the gradient, so the closure must call loss.backward() "
                "(not torch.autograd.backward or grad); or use opt.step(loss_fn, batch)"
            )
        rhos = [rho for g, rho in zip(self._groups, self._rhos, strict=True) for _ in g["params"]]
        terms = second_order_term(self._ascent.ball, params, rhos, kept)
        for param, grad, term in zip(params, kept, terms, strict=True):
            total = term if grad is None else grad if term is None else grad + term
            param.grad = None if total is None else total.detach()


def _radius(ball: Ball, climb: Climb, rhos: Sequence[float]) -> Callable[[], float]:
    """Return how to compute ``||T^-1 eps||_p`` from the norms of the groups, when somebody asks."""

    def radius() -> float:
        total = float(climb.norm)
        if not (math.isfinite(total) and total > 0):
            return 0.0
        shares = [float(n) / total for n in climb.group_norms]
        if ball.p == 1:
            return max(rho for rho, share in zip(rhos, shares, strict=True) if share == max(shares))
        if math.isinf(ball.p):
            return max(rho for rho, share in zip(rhos, shares, strict=True) if share > 0)
        powers = [rho**ball.p * share**ball.q for rho, share in zip(rhos, shares, strict=True)]
        return float(math.fsum(powers) ** (1 / ball.p))

    return radius
