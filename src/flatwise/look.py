"""One look around: away from the weights, a second pass, and exactly back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatwise.ascent import Ball, Climb, GradientAscent, ProjectedAscent
from flatwise.batching import Batching
from flatwise.descent import Descent, KeepGraph, Late, second_order_term
from flatwise.directions import Gradient
from flatwise.guards import PassGuard
from flatwise.memory import Memory
from flatwise.nograd import no_grad
from flatwise.norms import COARSE, IS_CPU, accumulation_dtype, combine, joint_norm, reduced
from flatwise.parallel import Ranks
from flatwise.passes import Closure, later_pass
from flatwise.radius import Gauge
from flatwise.record import StepRecord
from flatwise.rounding import Arrival, warn_if_swallowed
from flatwise.scaling import Scaling
from flatwise.schedule import Schedule, StepNoise
from flatwise.select import Selection
from flatwise.shards import DTYPE, Sharding, any_sharded, reshard
from flatwise.true_gradient import true_gradients
from flatwise.weights import Displacement, Piece, pieces_of

_TINY = 2.0**100
_ROUNDING = 1 << 20
"""Offset in the index of the micro-batch, so that rounding and noise of one seed are drawn apart."""


@dataclass
class Method:
    """The four answers, and what goes with them.

    Attributes:
        ascent: where to look.
        descent: what to step with.
        schedule: when, and how far.
        batching: on which samples.
        selection: which parameters.
        memory: what is remembered between steps.
        base: the base optimizer.
        scaling: of the loss.
        ranks: which processes share a perturbation.
        arrives: whether it is known that perturbations of half-precision weights arrive.
        looks: whether a step makes both passes although its direction needs no first one.
    """

    ascent: GradientAscent
    descent: Descent
    schedule: Schedule
    batching: Batching
    selection: Selection
    memory: Memory
    base: Optimizer
    scaling: Scaling
    ranks: Ranks
    arrives: bool = False
    looks: bool = False

    @property
    def one_pass(self) -> bool:
        """Whether a step needs no gradient at w."""
        return not (self.ascent.direction.uses_gradient or self.looks)

    def looking(self) -> Method:
        """Return the method of a step that measures its radius: with both passes, on the same samples."""
        ascent = self.ascent
        if not ascent.direction.uses_gradient and ascent.direction.stretch(self.base) is not None:
            ascent = replace(ascent, direction=Gradient())
        return replace(self, ascent=ascent, batching=replace(self.batching, ascent_fraction=1.0), looks=True)

    def params(self) -> list[Tensor]:
        """Return the parameters of all groups."""
        return [p for group in self.base.param_groups for p in group["params"]]

    def unscale(self) -> None:
        """Bring the gradients of the pass that has just ended to their true scale."""
        self.scaling.unscale(self.base.param_groups)

    def clear(self) -> None:
        """Remove all gradients."""
        for param in self.params():
            param.grad = None

    def has_gradients(self) -> bool:
        """Tell whether any parameter has a gradient."""
        return any(p.grad is not None for group in self.base.param_groups for p in group["params"])


class Look:
    """The displaced state between the two passes of a step.

    Args:
        method: the four slots.
        rhos: radius of each parameter group; 0 leaves it out.
        guard: protects buffers and random state.
        record: takes what happened.
        part: index of the micro-batch.
        gauge: compares the gradients of the two passes, in a step that measures its radius.
    """

    def __init__(
        self,
        method: Method,
        rhos: Sequence[float],
        guard: PassGuard,
        record: StepRecord,
        part: int = 0,
        gauge: Gauge | None = None,
    ) -> None:
        self._part, self._gauge = part, gauge
        self._method, self._ascent = method, method.ascent
        self._sharded = any_sharded(method.params())
        self._groups, self._rhos = method.base.param_groups, rhos
        self._guard, self._record = guard, record
        draws = None
        if self._ascent.rounding == "stochastic":
            draws = StepNoise(self._ascent.rounding_seed, record.step, part + _ROUNDING)
        self._displacement = Displacement(draws)
        several = self._ascent.steps > 1
        self._path = ProjectedAscent(self._ascent.ball, self._displacement) if several else None
        self._clean: list[Tensor | None] | None = None
        self.moved = self._away = self._closed = False
        self.keep_random = False

    @no_grad
    def displace(self) -> bool:
        """Move the weights, along the gradients in ``.grad`` (which are used up) or what stands in for them.

        Returns:
            True where the weights moved. On the CPU False where no gradient is usable; gradients are as before then.
        """
        direction, self._away = self._ascent.direction, True
        if self._gauge is not None and not self.moved:
            self._gauge.before(self._method.params(), self._method.base)
        if self._method.descent.needs_clean and self._clean is None:
            self._clean = [_held(p.grad) for p in self._method.params()]
        if not self._method.arrives:
            coarse = COARSE.intersection(map(DTYPE, self._method.params()))
            self._displacement.arrival = Arrival() if coarse else None
        if direction.streams:
            moved = self._stream()
        else:
            found = self._pieces()
            if not found:
                self._record._reason = "no gradient" if direction.uses_gradient else "no direction"
                return False
            rhos, groups, scaled = zip(*found, strict=True)
            if self._path is None:
                moved = self._displace_once(list(groups), rhos, scaled)
            else:
                self._note(self._path.advance(groups, rhos), rhos)
                radius = self._path.radius()
                self._record._radius = lambda: float(radius)
                moved = True
        self._weights_moved()
        self.moved = self.moved or moved
        if moved and not self._method.arrives:
            self._method.arrives = True
            if self._displacement.arrival is not None:
                warn_if_swallowed(self._displacement.arrival.share(), coarse)
                self._displacement.arrival = None
        return moved

    def _pieces(self) -> list[tuple[float, list[Piece], bool]]:
        """Return the radius, the pieces and whether they are scaled, of every part that has any."""
        ball, method = self._ascent.ball, self._method
        direction, several = self._ascent.direction, self._path is not None
        whole = several or direction.whole
        found = []
        for rho, group in zip(self._rhos, self._groups, strict=True):
            if rho <= 0:
                continue
            for params, scaled in method.selection.split(group["params"], adaptive=bool(ball.adaptive)):
                if direction.uses_gradient:
                    rows = ball.p == 2 and not whole
                    pieces = pieces_of(params, find_rows=rows, whole=whole, shared=self._clean is not None)
                else:
                    pieces = list(direction.offer(params, method.memory, method.base, self._record.step, self._part))
                found += [(rho, alike, scaled) for alike in _cut_alike(pieces)]
        return found

    def _displace_once(self, groups: list[list[Piece]], rhos: Sequence[float], scaled: Sequence[bool]) -> bool:
        ball, direction = self._ascent.ball, self._ascent.direction
        everything = groups[0] if len(groups) == 1 else [piece for pieces in groups for piece in pieces]
        norm = direction.turn(everything, self._method.memory)
        params = [piece.param for piece in everything]
        if ball.overwrites or not all(map(IS_CPU, params)):
            for piece in everything:
                piece.unshare()
        climb = ball.climb(
            [self._sources(pieces) if use else [] for pieces, use in zip(groups, scaled, strict=True)],
            [[piece.grad for piece in pieces] for pieces in groups],
            [pieces[0].over for pieces in groups],
        )
        self._note(climb, rhos, norm)
        scale = climb.scale
        if isinstance(scale, float):
            if scale == 0:
                for piece in everything:
                    if direction.uses_gradient:
                        piece.owner.grad = piece.source
                return False
            if scale > _TINY:  # a denormal gradient: its reciprocal norm would overflow as a float32 factor
                larger = torch._foreach_mul([piece.grad for piece in everything], _TINY)
                for piece, grad in zip(everything, larger, strict=True):
                    piece.grad, piece.owned, piece.shared = grad, False, False
                scale /= _TINY
        for pieces, rho in zip(groups, rhos, strict=True):
            if isinstance(scale, float):
                self._displacement.add(pieces, direction.sign * rho * scale)
                continue
            for device in {piece.param.device for piece in pieces}:
                here = [piece for piece in pieces if piece.param.device == device]
                self._displacement.add(here, scale.to(device) * (direction.sign * rho))
        coarse = not COARSE.isdisjoint(map(DTYPE, params))
        if coarse and all(use or not ball.adaptive for use in scaled) and ball.adaptive != "fisher":
            achieved = self._achieved(ball, everything)
            self._record._radius = lambda: float(achieved)
        return True

    def _sources(self, pieces: list[Piece]) -> list[Tensor]:
        """Return what the ball's T is made of."""
        if self._ascent.ball.adaptive == "fisher":
            return [piece.grad.clone() for piece in pieces]  # the gradient itself is about to be overwritten
        return [piece.weight() for piece in pieces]

    def _stream(self) -> bool:
        """Move tensor after tensor, each as soon as its direction is made."""
        method = self._method
        radius = {
            p: rho
            for rho, group in zip(self._rhos, self._groups, strict=True)
            for p in method.selection.moving(group["params"])
            if rho > 0
        }
        direction = self._ascent.direction
        norms: dict[Sharding | None, list[Tensor]] = {}
        for piece in direction.offer(list(radius), method.memory, method.base, self._record.step, self._part):
            rho = radius[piece.owner]
            norms.setdefault(piece.over, []).append(joint_norm([piece.grad]) * rho)
            factor: float | Tensor = rho
            if not piece.param.is_cpu:
                factor = torch.full((), rho, device=piece.param.device)
            self._displacement.add([piece], factor)
        if not norms:
            self._record._reason = "no direction"
            return False
        self._record._norm = length = combine(
            [reduced(combine(here, 2.0), 2.0, over, here[0].dtype) for over, here in norms.items()], 2.0
        )
        self._record._radius = lambda: float(length)
        return True

    def _note(self, climb: Climb, rhos: Sequence[float], norm: Tensor | None = None) -> None:
        record, ball = self._record, self._ascent.ball
        if record._norm is not None:  # of an earlier part of the batch, or an earlier step of the ascent
            record._norm = _unless_finite(climb.norm, record._norm)
        else:
            record._norm = climb.norm
            if self._ascent.direction.uses_gradient:
                record._gradient_norm = climb.norm if norm is None else norm
        record._radius = _radius(ball, climb, rhos)

    @no_grad
    def _achieved(self, ball: Ball, everything: Sequence[Piece]) -> Tensor:
        cut = {id(piece.param): piece.over for piece in everything}  # what is cut is moved as it is, in one piece
        parts, over = [], []
        for now, before in self._displacement.moved():
            exact = before.to(accumulation_dtype(before.dtype))
            part = now.to(exact.dtype) - exact
            if ball.adaptive:
                (scale,) = ball.scaling([exact])
                part = torch.where(scale > 0, part / scale, 0)
            parts.append(part)
            over.append(cut.get(id(now)))
        return joint_norm(parts, ball.p, over)

    @contextmanager
    def only_what_moves(self) -> Iterator[bool]:
        """Run the first pass without the gradients of parameters that do not move, where nothing else needs them.

        Yields:
            Whether gradients are left out. The second pass must run then, whatever the first one finds.
        """
        method = self._method
        cheap = (
            self._ascent.only != "all"
            and not (method.descent.needs_clean or method.schedule.needs_norm or method.descent.adds_term)
            and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        )
        moving = {p for p in method.selection.moving(self._method.params()) if p.requires_grad} if cheap else set()
        # Where all that would move is frozen, nothing would be left to differentiate.
        still = [p for p in self._method.params() if p.requires_grad and p not in moving] if moving else []
        try:
            try:
                for param in still:
                    param.requires_grad_(False)
                yield bool(still)
            finally:
                for param in still:
                    param.requires_grad_(True)
        finally:  # an interrupt can come between the lines of the one above
            for param in still:
                param.requires_grad_(True)

    def compare(self) -> None:
        """Compare the gradients in ``.grad``, those of the last pass, with those of the first, where that is wanted."""
        if self._gauge is not None and self.moved:
            self._gauge.after()

    def finish(self) -> Late | None:
        """Turn the gradients of the last pass into what the base optimizer sees, with the weights at w.

        Returns:
            What is to be taken from the weights after the base's step.
        """
        method = self._method
        combines = self.moved and self._clean is not None
        between = self._record._reason == "schedule" and method.schedule.in_phase(self._record.step)
        reuses = method.descent.reuses and between
        if not (combines or reuses) or not method.has_gradients():
            return None
        if self.moved and self._clean is not None:
            return method.descent.combine(method.params(), self._clean, method.memory)
        method.descent.reuse(method.params(), method.memory)
        return None

    def undo(self) -> None:
        """Bring the weights back. Safe to call again."""
        self._displacement.undo()
        if self._away:
            self._weights_moved()
            self._away = False

    def _weights_moved(self) -> None:
        """Make everybody forget copies of the weights as they were."""
        torch.clear_autocast_cache()
        if self._sharded:
            reshard(self._guard.modules())

    def close(self) -> None:
        """Bring weights, buffers and random state back. Safe to call again."""
        if self._closed:
            return
        self.undo()
        self._guard.close(keep_random=self.keep_random)
        self._closed = True

    def add_second_order(self, closure: Closure) -> None:
        """Add the dropped term to the gradients in ``.grad``, by a third pass, at w.

        Args:
            closure: the closure of the first pass.

        Raises:
            RuntimeError: if the closure makes gradients that cannot be differentiated.
        """
        params = self._method.params()
        kept = [p.grad for p in params]
        self._method.clear()
        self._guard.rewind()
        with warnings.catch_warnings(), KeepGraph() as mode, true_gradients():
            warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
            later_pass(closure)
        if not mode.used:
            raise RuntimeError(
                "second_order=True differentiates the gradient, so the closure must call loss.backward() "
                "(not torch.autograd.backward or grad); or use opt.step(loss_fn, batch)"
            )
        selection = self._method.selection
        radius: dict[Tensor, float] = {}
        scaled: set[Tensor] = set()
        for rho, group in zip(self._rhos, self._groups, strict=True):
            for part, use in selection.split(group["params"], adaptive=bool(self._ascent.ball.adaptive)):
                radius.update(dict.fromkeys(part, rho))
                scaled.update(part if use else ())
        rhos = [radius.get(p, 0.0) for p in params]
        terms = second_order_term(self._ascent.ball, params, rhos, kept, [p in scaled for p in params])
        for param, grad, term in zip(params, kept, terms, strict=True):
            total = term if grad is None else grad if term is None else grad + term
            param.grad = None if total is None else total.detach()


def _unless_finite(norm: Tensor, known: Tensor) -> Tensor:
    """Return the known norm, or the new one where that is not finite: a step is as good as its worst part."""
    if norm.is_cpu:
        return known if math.isfinite(float(norm)) else norm
    return torch.where(torch.isfinite(norm), known.to(norm.device), norm)


def _held(grad: Tensor | None) -> Tensor | None:
    """Return a gradient that the next pass does not overwrite, as it does the views of DistributedDataParallel."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return grad.clone() if together and grad is not None and grad._is_view() else grad


def _cut_alike(pieces: list[Piece]) -> list[list[Piece]]:
    """Part pieces by how they are cut over processes."""
    kinds = dict.fromkeys(piece.over for piece in pieces)
    if len(kinds) == 1:
        return [pieces]
    return [[piece for piece in pieces if piece.over == kind] for kind in kinds]


def _radius(ball: Ball, climb: Climb, rhos: Sequence[float]) -> Callable[[], float]:
    """Return how to compute ``||T^-1 eps||_p`` from the norms of the groups, when somebody asks."""

    def radius() -> float:
        total = float(climb.norm)
        if not (math.isfinite(total) and total > 0):
            return 0.0
        if not ball.normalised:
            return math.hypot(*(rho * float(n) for rho, n in zip(rhos, climb.group_norms, strict=True)))
        if ball.scope == "tensor":  # a product of balls: the largest of its norms
            return max(rho for rho, n in zip(rhos, climb.group_norms, strict=True) if float(n) > 0)
        shares = [float(n) / total for n in climb.group_norms]
        if ball.p == 1:
            return max(rho for rho, share in zip(rhos, shares, strict=True) if share == max(shares))
        if math.isinf(ball.p):
            return max(rho for rho, share in zip(rhos, shares, strict=True) if share > 0)
        powers = [rho**ball.p * share**ball.q for rho, share in zip(rhos, shares, strict=True)]
        return float(math.fsum(powers) ** (1 / ball.p))

    return radius
