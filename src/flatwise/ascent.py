"""Where to look: from a gradient to a perturbation (the ``ascent`` slot).

The inner maximum of SAM, ``max L(w + eps)`` over ``||T^-1 eps||_p <= rho``, is solved to first order by the
dual-norm formula (Foret et al., ICLR 2021, eq. 2; with T, Kwon et al., ICML 2021, eq. 7). With 1/p + 1/q = 1,

    eps = rho * T * sign(Tg) * |Tg|^(q-1) / ||Tg||_q^(q-1)

p = 2 gives rho T^2 g / ||Tg||, p = inf gives rho T sign(g), p = 1 puts all of it on the largest |Tg|.
T = 1 is SAM, T = |w| + eta is ASAM; ``directions`` holds what may stand in for g.

:class:`Ball` holds the formula twice: :meth:`Ball.perturbation` as printed, for automatic differentiation, and
:meth:`Ball.climb`, which overwrites the gradient it is given and needs no copy. Tests hold one against the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from flatwise.directions import Direction, Gradient
from flatwise.nograd import no_grad
from flatwise.norms import accumulation_dtype, combine, filter_norms, joint_norm, packs, reduced
from flatwise.rounding import Rounding
from flatwise.shards import Sharding, shardings_of
from flatwise.weights import Displacement, Piece


@dataclass(frozen=True)
class Climb:
    """The direction of an ascent: ``eps = rho * scale * direction``, where the directions replaced the gradients.

    Attributes:
        scale: a number on the CPU, a 0-dim tensor on an accelerator; 0 where the gradient is zero or not finite, so
            that nothing moves.
        norm: the joint dual norm ``||Tg||_q``, 0-dim.
        group_norms: the dual norm of each group, 0-dim each.
    """

    scale: float | Tensor
    norm: Tensor
    group_norms: tuple[Tensor, ...]


@dataclass(frozen=True)
class Ball:
    """The set of perturbations ``||T^-1 eps||_p <= rho``.

    Attributes:
        p: order of the norm, 1 <= p <= inf.
        adaptive: what T is. False: 1. True: ``|w| + eta`` (ASAM). ``"filter"``: ``||f|| + eta``, where f is the slice
            of the first dimension that holds the weight (Kwon et al., ICML 2021, filter-wise; in a tensor of one
            dimension each weight is its own filter). ``"fisher"``: ``1 / sqrt(1 + eta g^2)``, the diagonal Fisher ball
            (Kim et al., ICML 2022).
        eta: offset in T, >= 0. Without it a zero weight is never perturbed. With ``"fisher"`` the weight of g^2.
        scope: ``"all"``: one norm over everything. ``"tensor"``: every tensor has a ball of its own.
        normalised: False leaves the norm out, ``eps = rho T^2 g``; p = 2 only.
    """

    p: float = 2.0
    adaptive: bool | Literal["filter", "fisher"] = False
    eta: float = 0.0
    scope: Literal["all", "tensor"] = "all"
    normalised: bool = True

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: if ``p < 1`` or ``eta`` is negative or not finite.
        """
        if not self.p >= 1:
            raise ValueError(f"p must be at least 1 (1, 2, float('inf') or any number between), got {self.p!r}")
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"eta must be a finite number >= 0, got {self.eta!r}")
        if self.eta and not self.adaptive:
            raise ValueError(
                f"eta={self.eta!r} has no effect without adaptive=True: pass adaptive=True, or leave eta out"
            )
        if self.adaptive not in (False, True, "filter", "fisher"):
            raise ValueError(f"adaptive must be True, False, 'filter' or 'fisher', got {self.adaptive!r}")
        if self.scope not in ("all", "tensor"):
            raise ValueError(f"scope must be 'all' or 'tensor', got {self.scope!r}")
        if not self.normalised and (self.p != 2 or self.scope != "all"):
            raise ValueError("normalised=False is eps = rho T^2 g, which is defined for p = 2 and scope='all'")

    @property
    def overwrites(self) -> bool:
        """Whether :meth:`climb` writes into the gradients it is given, on the CPU."""
        return self.p != 2 or bool(self.adaptive) or self.scope != "all"

    @property
    def q(self) -> float:
        """The dual order, 1/p + 1/q = 1."""
        if self.p == 1:
            return math.inf
        return 1.0 if math.isinf(self.p) else self.p / (self.p - 1)

    @no_grad
    def climb(
        self,
        weights: Sequence[Sequence[Tensor]],
        grads: Sequence[Sequence[Tensor]],
        over: Sequence[Sharding | None] | None = None,
    ) -> Climb:
        """Overwrite gradients with the direction of the perturbation.

        Args:
            weights: per group, the weights (read only where ``adaptive``).
            grads: per group, the gradients, shapes of the weights; overwritten, unless they turn out to be zero or not
                finite (on the CPU).
            over: per group, how its tensors are cut over processes. All processes must call it then.

        Returns:
            The scale and the norms; ``rho * scale * direction`` is the perturbation.
        """
        over = over or [None] * len(grads)
        group_norms = tuple(self._dual_norm(ws, gs, s) for ws, gs, s in zip(weights, grads, over, strict=True))
        norm = combine(group_norms, self.q)
        scale: float | Tensor
        if norm.device.type == "cpu":  # reading a number costs nothing here, and saves launches
            usable = 0 < float(norm) < math.inf
            scale = 1 / float(self._directed(weights, grads, norm, over)) if usable else 0.0
        else:
            fine = torch.isfinite(norm) & (norm > 0)
            scale = torch.where(fine, 1 / self._directed(weights, grads, torch.where(fine, norm, 1), over), 0)
        return Climb(scale, norm, group_norms)

    def _directed(
        self,
        weights: Sequence[Sequence[Tensor]],
        grads: Sequence[Sequence[Tensor]],
        norm: Tensor,
        over: Sequence[Sharding | None],
    ) -> Tensor:
        """Turn gradients into ``T sign(Tg) |Tg|^(q-1)``, up to the factor that is returned as the divisor."""
        if self.scope == "tensor":
            one = replace(self, scope="all")
            for ws, gs, s in zip(weights, grads, over, strict=True):
                for index, g in enumerate(gs):
                    g.mul_(one.climb([ws[index : index + 1]], [[g]], [s]).scale)
            return torch.ones_like(norm)
        if self.adaptive:
            self._times_t(weights, grads)
        divisor = self._profile(grads, norm, over)
        if self.adaptive:
            self._times_t(weights, grads)
        return divisor if self.normalised else torch.ones_like(norm)

    def _packs(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[tuple[list[Tensor], ...]]:
        """Pack tensors; whole ones, one by one, where T is a property of their rows."""
        if self.adaptive == "filter":
            return [([w], [g]) for w, g in zip(weights, grads, strict=True) if g.numel()]
        return packs(weights, grads)

    def _dual_norm(self, weights: Sequence[Tensor], grads: Sequence[Tensor], over: Sharding | None) -> Tensor:
        """Return ``||Tg||_q`` and leave the gradients alone: they may turn out to be of no use."""
        if not (self.adaptive and weights):
            return joint_norm(grads, self.q, [over] * len(grads))
        packed = self._packs(weights, grads)
        norms = [joint_norm(torch._foreach_mul(self.scaling(ws), gs), self.q) for ws, gs in packed]
        here = combine(norms, self.q) if norms else joint_norm(grads, self.q)
        return reduced(here, self.q, over, accumulation_dtype(grads[0].dtype))

    def scaling(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Return T for each tensor of weights (of gradients, for ``"fisher"``), in a shape that broadcasts."""
        if self.adaptive == "filter":
            scales = [filter_norms(w) for w in sources]
        elif self.adaptive == "fisher":
            return [(1 + self.eta * g.square()).rsqrt() for g in sources]
        else:
            scales = list(torch._foreach_abs(list(sources)))
        if self.eta:
            scales = list(torch._foreach_add(scales, self.eta))
        return scales

    def _times_t(self, weights: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor]]) -> None:
        for ws, gs in zip(weights, grads, strict=True):
            if not ws:
                continue  # these are not scaled
            for w_pack, g_pack in self._packs(ws, gs):
                torch._foreach_mul_(g_pack, self.scaling(w_pack))

    def _profile(self, grads: Sequence[Sequence[Tensor]], norm: Tensor, over: Sequence[Sharding | None]) -> Tensor:
        """Turn ``Tg`` into ``sign(Tg) |Tg|^(q-1)``, up to the factor that is returned as the divisor."""
        if self.p == 2:
            return norm
        if self.p == 1:
            return self._peaks(grads, norm, over)
        one = torch.ones_like(norm)
        for (pack,) in packs(g for gs in grads for g in gs):
            signs = torch._foreach_sign(pack)
            here = norm.to(pack[0].device)
            if math.isinf(self.p):
                torch._foreach_copy_(pack, signs)
            else:
                torch._foreach_div_(pack, here)
                torch._foreach_abs_(pack)
                torch._foreach_pow_(pack, self.q - 1)
                torch._foreach_mul_(pack, signs)
        return one

    @staticmethod
    def _peaks(grads: Sequence[Sequence[Tensor]], norm: Tensor, over: Sequence[Sharding | None]) -> Tensor:
        """Leave the signs of the largest elements, and return their number.

        Elements that tie for the largest share the radius; one of them alone would depend on the order.
        """
        peaks = torch.zeros_like(norm)
        for gs, sharding in zip(grads, over, strict=True):
            here = torch.zeros_like(norm)
            for (pack,) in packs(gs):
                for g in pack:
                    g.copy_(g.sign() * (g.abs() == norm.to(g.device)))
                    here += g.count_nonzero().to(here)
            peaks += here if sharding is None else sharding.reduce(here)
        return torch.where(peaks > 0, peaks, 1)

    def perturbation(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        rhos: Sequence[float],
        scaled: Sequence[bool] | None = None,
    ) -> list[Tensor]:
        """Return the perturbation as printed in the papers, differentiable in weights and gradients.

        Args:
            weights: the weights w.
            grads: the gradients g, same shapes, possibly with a graph.
            rhos: radius of each tensor's group.
            scaled: whether T is used for a tensor; for all by default.

        Returns:
            eps, same shapes. The scaling T is treated as a function of w (and g), as the ball is.
        """
        sources = grads if self.adaptive == "fisher" else weights
        use = [bool(self.adaptive)] * len(weights) if scaled is None else [bool(self.adaptive) and s for s in scaled]
        scales = [
            self._scaling_of(s) if u else torch.ones_like(w) for s, w, u in zip(sources, weights, use, strict=True)
        ]
        directions = [t * g for t, g in zip(scales, grads, strict=True)]
        if self.scope == "all":
            profile = self._whole_profile(directions)
        else:
            profile = [self._whole_profile([d])[0] for d in directions]
        return [rho * t * u for rho, t, u in zip(rhos, scales, profile, strict=True)]

    def _scaling_of(self, source: Tensor) -> Tensor:
        if self.adaptive == "fisher":
            return 1 / (1 + self.eta * source**2).sqrt()
        return (filter_norms(source) if self.adaptive == "filter" else source.abs()) + self.eta

    def _whole_profile(self, scaled: Sequence[Tensor]) -> list[Tensor]:
        """Return ``sign(s) |s|^(q-1) / ||s||_q^(q-1)``, over all tensors jointly."""
        if not self.normalised:
            return list(scaled)
        norm = torch.linalg.vector_norm(torch.cat([s.flatten() for s in scaled]), self.q)
        if not bool(norm):  # a tensor with a ball of its own, where nothing is uphill
            return [torch.zeros_like(s) for s in scaled]
        if self.p == 1:
            hits = [(s.abs() == norm).to(s) for s in scaled]
            count = torch.stack([h.sum() for h in hits]).sum()
            return [s.sign() * h / count for s, h in zip(scaled, hits, strict=True)]
        if self.p == 2:
            return [s / norm for s in scaled]
        # |s|^(q-1) has an infinite slope at 0 for p > 2; an element that is 0 has no share in the perturbation.
        safe = [torch.where(s == 0, norm.detach(), s).abs() for s in scaled]
        return [s.sign() * (a / norm) ** (self.q - 1) for s, a in zip(scaled, safe, strict=True)]


@dataclass(frozen=True)
class GradientAscent:
    """Climb to the surface of a ball, along the gradient or what stands in for it.

    Attributes:
        ball: the set searched.
        steps: gradient steps of the inner maximisation, n >= 1 (App. C.6 of the paper). Every step has the length
            of the radius and is followed by the projection onto the ball; one step is the paper's method.
        direction: what is climbed along.
        only: ``"all"`` parameters are perturbed, or those of ``"norm"`` layers alone (SAM-ON; Mueller et al., NeurIPS
            2023). The latter needs ``model=``.
        scaled: ``"all"`` parameters are scaled by T where the ball has one (the common convention), or only those with
            ``weight`` in their name, ``"weights"`` (the convention of ASAM's authors). The latter needs ``model=``.
        rounding: of ``w + eps`` where weights are float16 or bfloat16: ``"nearest"``, or ``"stochastic"``, drawn as a
            function of ``rounding_seed`` and the step.
        rounding_seed: of these draws.
    """

    ball: Ball = Ball()
    steps: int = 1
    direction: Direction = field(default_factory=Gradient)
    only: Literal["all", "norm"] = "all"
    scaled: Literal["all", "weights"] = "all"
    rounding: Rounding = "nearest"
    rounding_seed: int = 0

    def __post_init__(self) -> None:
        """Check what belongs together.

        Raises:
            ValueError: if ``steps`` is not a whole number >= 1, or the parts do not fit each other.
        """
        if self.only not in ("all", "norm"):
            raise ValueError(f"only must be 'all' or 'norm', got {self.only!r}")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {self.rounding!r}")
        if self.scaled not in ("all", "weights"):
            raise ValueError(f"scaled must be 'all' or 'weights', got {self.scaled!r}")
        if self.scaled != "all" and not self.ball.adaptive:
            raise ValueError(f"scaled={self.scaled!r} has no effect without adaptive=True")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"ascent_steps must be a whole number >= 1, got {self.steps!r}")
        ball, name = self.ball, type(self.direction).__name__
        plain = isinstance(self.direction, Gradient)
        if self.steps > 1 and not (plain and ball.normalised and ball.scope == "all" and ball.adaptive != "fisher"):
            raise ValueError(
                f"ascent_steps={self.steps} projects onto one ball that does not change, along gradients: it cannot be "
                f"combined with direction={name}, normalised=False, scope='tensor' or adaptive='fisher'"
            )
        if self.steps > 1 and self.scaled != "all":
            raise ValueError("ascent_steps > 1 scales all parameters: leave scaled at 'all'")
        if ball.adaptive == "fisher" and not self.direction.uses_gradient:
            raise ValueError(f"adaptive='fisher' is made of the gradient, which direction={name} does not compute")
        self.direction.check_ball(normalised=ball.normalised, adaptive=bool(ball.adaptive))


class ProjectedAscent:
    """The state of an inner maximisation of several steps: where it started and how far it has come."""

    def __init__(self, ball: Ball, displacement: Displacement) -> None:
        self._ball = ball
        self._displacement = displacement
        # By the parameter itself; a complex one is moved through a real view.
        self._params: dict[Tensor, Tensor] = {}
        self._starts: dict[Tensor, Tensor] = {}
        self._offsets: dict[Tensor, Tensor] = {}
        self._rhos: dict[Tensor, float] = {}

    @no_grad
    def advance(self, groups: Sequence[Sequence[Piece]], rhos: Sequence[float]) -> Climb:
        """Take one step of length rho along the gradient at the present point, and project onto the ball.

        Args:
            groups: pieces with the gradients at the present point; consumed.
            rhos: radius of each group.

        Returns:
            The climb of this step. The weights are moved.
        """
        new = [piece for pieces in groups for piece in pieces if piece.owner not in self._starts]
        if new:
            params = [piece.param for piece in new]
            owners = [piece.owner for piece in new]
            self._params.update(zip(owners, params, strict=True))
            self._starts.update(zip(owners, self._displacement.keep(params), strict=True))
        climb = self._ball.climb(
            [[self._starts[piece.owner] for piece in pieces] for pieces in groups],
            [[piece.grad for piece in pieces] for pieces in groups],
            [pieces[0].over for pieces in groups],
        )
        for pieces, rho in zip(groups, rhos, strict=True):
            for piece in pieces:
                scale = climb.scale if isinstance(climb.scale, float) else climb.scale.to(piece.grad.device)
                piece.grad.mul_(scale * rho)
                known = self._offsets.get(piece.owner)
                self._offsets[piece.owner] = piece.grad if known is None else known.add_(piece.grad)
                self._rhos[piece.owner] = rho
        self._project()
        moved = list(self._offsets)
        self._displacement.place(
            [self._params[p] for p in moved], [self._starts[p] for p in moved], list(self._offsets.values())
        )
        return climb

    def radius(self) -> Tensor:
        """Return ``||T^-1 eps||_p``, 0-dim, with every group's radius counted as its own."""
        return joint_norm(self._relative(), self._ball.p, shardings_of(self._offsets))

    def _relative(self, *, unit: bool = False) -> list[Tensor]:
        """Return ``T^-1 eps``, or ``T^-1 eps / rho`` with ``unit``."""
        result = []
        for param, offset in self._offsets.items():
            relative = offset / self._rhos[param] if unit else offset
            if self._ball.adaptive:
                (scale,) = self._ball.scaling([self._starts[param]])
                relative = torch.where(scale > 0, relative / scale, 0)
            result.append(relative)
        return result

    def _project(self) -> None:
        if math.isinf(self._ball.p):
            for param, offset in self._offsets.items():
                bound = torch.full_like(offset, self._rhos[param])
                if self._ball.adaptive:
                    bound.mul_(self._ball.scaling([self._starts[param]])[0])
                offset.clamp_(-bound, bound)
            return
        # For p = 2 pulling back along the ray is the projection; for other p it is the point of the ball on the ray.
        length = joint_norm(self._relative(unit=True), self._ball.p, shardings_of(self._offsets))
        for offset in self._offsets.values():
            offset.mul_(torch.where(length > 1, 1 / length, 1).to(offset.device))
