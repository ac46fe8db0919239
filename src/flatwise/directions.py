"""What is climbed along: the gradient, or what stands in for it (part of the ``ascent`` slot).

A direction either turns the gradient of a first pass (``uses_gradient``), or offers one of its own, so that no first
pass is needed and a step costs one gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from flatwise.memory import Memory
from flatwise.nograd import no_grad
from flatwise.norms import COARSE, filter_norms, joint_norm
from flatwise.schedule import StepNoise
from flatwise.shards import Sharding, all_plain, local, sharding_of, shardings_of
from flatwise.weights import Piece, may_hold_copy


@dataclass(frozen=True)
class Direction:
    """Base of all directions.

    Attributes:
        uses_gradient: whether a first pass is needed.
        whole: whether the direction must see whole tensors (it remembers something of their shape).
        sign: of the perturbation along the direction.
        streams: whether tensors are moved one after the other as they are made, so that only one is alive.
        remembers: names of what is kept for each parameter between steps.
    """

    uses_gradient: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    sign: ClassVar[float] = 1.0
    streams: ClassVar[bool] = False
    remembers: ClassVar[tuple[str, ...]] = ()

    def check_ball(self, *, normalised: bool, adaptive: bool) -> None:
        """Raise a ValueError if the direction does not fit a ball."""

    def check_base(self, base: Optimizer) -> None:
        """Raise a ValueError if the direction does not fit a base optimizer."""

    def stretch(self, base: Optimizer) -> float | None:
        """Return how many times as far as along the gradient to go, where ``rho="auto"`` looks along the gradient.

        None: it looks along the direction itself.
        """
        return None

    def bound(self, model: Module | None) -> Direction:
        """Return the direction with what it needs of the model; raise a ValueError where that is not there."""
        return self

    def turn(self, pieces: Sequence[Piece], memory: Memory) -> Tensor | None:
        """Replace the gradients in the pieces by the direction.

        Args:
            pieces: everything that is perturbed, with its gradient.
            memory: what the method remembers.

        Returns:
            The norm of the gradients, where it was needed.
        """
        return None

    def offer(self, params: Sequence[Tensor], memory: Memory, base: Optimizer, step: int, part: int) -> Iterator[Piece]:
        """Make pieces with the direction, without a first pass.

        Args:
            params: what is perturbed.
            memory: what the method remembers.
            base: the base optimizer.
            step: index of the step.
            part: index of the micro-batch.

        Returns:
            The pieces; nothing where there is no direction yet.
        """
        return iter(())

    def learn(self, params: Sequence[Tensor], memory: Memory, finite: Tensor | bool | None) -> None:
        """Take from ``.grad`` what the next step needs, after the last pass.

        Args:
            params: all parameters.
            memory: what the method remembers.
            finite: whether the gradients are; on the CPU those that are not have been removed.
        """


@dataclass(frozen=True)
class Gradient(Direction):
    """The gradient at w: SAM (Foret et al., ICLR 2021)."""


def real(tensor: Tensor) -> Tensor:
    """Return a dense real view of a gradient or weight, of the part that is here (a sparse one is made dense)."""
    dense = tensor.to_dense() if tensor.is_sparse else local(tensor)
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense


def momentum_of(state: Mapping[str, Any]) -> Tensor | None:
    """Return the running average of gradients in a base optimizer's state of a parameter; None where it has none."""
    value = state.get("momentum_buffer", state.get("exp_avg"))
    return value if isinstance(value, Tensor) and value.numel() else None


def joint_gradient_norm(params: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients in ``.grad``, 0-dim."""
    found = [(p, p.grad) for p in params if p.grad is not None]
    return joint_norm([real(local(g, p)) for p, g in found], over=shardings_of(p for p, _ in found))


def _known_bad(norm: Tensor) -> bool:
    """Tell whether the gradients hold infinity or NaN, where knowing it costs nothing."""
    return norm.device.type == "cpu" and not math.isfinite(float(norm))


def _unless_bad(norm: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return ``new``, and on an accelerator ``old`` where the norm is not finite, so that no average is spoiled."""
    return new if norm.device.type == "cpu" else torch.where(torch.isfinite(norm.to(new.device)), new, old)


@dataclass(frozen=True)
class AveragedGradient(Direction):
    """The running average of gradients: VaSSO (Li and Giannakis, NeurIPS 2023).

    ``m <- (1 - theta) m + theta g``, from m = 0; the direction is m. theta = 1 is SAM.

    Attributes:
        theta: share of the new gradient, 0 < theta <= 1.
    """

    theta: float = 0.9
    whole: ClassVar[bool] = True
    remembers: ClassVar[tuple[str, ...]] = ("average",)

    def __post_init__(self) -> None:
        """Check theta.

        Raises:
            ValueError: if it is out of its range.
        """
        if not 0 < self.theta <= 1:
            raise ValueError(f"theta must be in (0, 1], got {self.theta!r}")

    @no_grad
    def turn(self, pieces: Sequence[Piece], memory: Memory) -> Tensor | None:  # noqa: D102
        norm = joint_norm([piece.grad for piece in pieces], over=[piece.over for piece in pieces])
        if _known_bad(norm):
            return norm
        for piece in pieces:
            average = memory.zeros(piece.owner, "average", piece.grad)
            grad = piece.grad.to(average.dtype)
            new = _unless_bad(norm, torch.lerp(average, grad, self.theta), average)
            memory.set(piece.owner, "average", new)
            piece.grad, piece.owned, piece.shared = new.to(piece.grad.dtype), False, True
        return norm


@dataclass(frozen=True)
class FriendlyGradient(Direction):
    """The gradient minus its running average: F-SAM (Li et al., CVPR 2024).

    ``d = g - sigma m``, then ``m <- lmbda m + (1 - lmbda) g`` with the gradient itself, as the authors' code does. On
    the first step m is the gradient and d = g. sigma = 0 is SAM.

    Attributes:
        sigma: share of the average that is taken away.
        lmbda: decay of the average, 0 <= lmbda < 1. The authors' class has 0.9, their script 0.6.
    """

    sigma: float = 1.0
    lmbda: float = 0.9
    whole: ClassVar[bool] = True
    remembers: ClassVar[tuple[str, ...]] = ("average",)

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: if one is out of its range.
        """
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ValueError(f"sigma must be a finite number >= 0, got {self.sigma!r}")
        if not 0 <= self.lmbda < 1:
            raise ValueError(f"lmbda must be in [0, 1), got {self.lmbda!r}")

    @no_grad
    def turn(self, pieces: Sequence[Piece], memory: Memory) -> Tensor | None:  # noqa: D102
        norm = joint_norm([piece.grad for piece in pieces], over=[piece.over for piece in pieces])
        if _known_bad(norm):
            return norm
        for piece in pieces:
            first = memory.get(piece.owner, "average") is None
            average = memory.zeros(piece.owner, "average", piece.grad)
            grad = piece.grad.to(average.dtype)
            if first:
                memory.set(piece.owner, "average", _unless_bad(norm, grad, average).clone())
                continue
            direction = torch.sub(grad, average, alpha=self.sigma).to(piece.grad.dtype)
            memory.set(piece.owner, "average", _unless_bad(norm, torch.lerp(grad, average, self.lmbda), average))
            piece.grad, piece.owned, piece.shared = direction, False, False
        return norm


@dataclass(frozen=True)
class Momentum(Direction):
    """Against the base optimizer's momentum: MSAM (Becker, Altrock, Risse, arXiv 2401.12033).

    ``eps = -rho v / ||v||`` with the momentum before the update. The minus is essential: further along the last update
    is uphill on the new batch. Outside a step the weights are w, not the displaced ones of the authors' code.
    """

    uses_gradient: ClassVar[bool] = False
    sign: ClassVar[float] = -1.0

    def stretch(self, base: Optimizer) -> float | None:
        """Return 6, or 1 where the steps are not along the momentum but along one that is rescaled (the Adam family).

        Both were found by trying (docs/frugal.md).
        """
        return 1.0 if any("betas" in group for group in base.param_groups) else 6.0

    def check_base(self, base: Optimizer) -> None:  # noqa: D102
        if not all(group.get("momentum") or "betas" in group for group in base.param_groups):
            raise ValueError(
                f"climbing against the momentum needs a base optimizer that has one, and this {type(base).__name__} "
                "has none: give it momentum=0.9, or use one of the Adam family"
            )

    def offer(  # noqa: D102
        self, params: Sequence[Tensor], memory: Memory, base: Optimizer, step: int, part: int
    ) -> Iterator[Piece]:
        states = base.state
        found = [(param, state, momentum_of(state)) for param in params if (state := states.get(param))]
        plain = all_plain(params) and all_plain([value for _, _, value in found if value is not None])
        for param, state, value in found:
            if value is None and not {"momentum_buffer", "exp_avg"} & state.keys():
                raise RuntimeError(
                    "climbing against the momentum reads 'momentum_buffer' or 'exp_avg' in the base's state, and this "
                    f"{type(base).__name__} keeps {', '.join(sorted(map(str, state)))}: "
                    "use SGD with momentum, or one of the Adam family"
                )
            if value is not None and plain:
                yield Piece(param, value, param, value, shared=True)
            elif value is not None:
                yield Piece(real(param.detach()), real(value), param, value, shared=True, over=sharding_of(param))


@dataclass(frozen=True)
class PreviousGradient(Direction):
    """The gradient that the last step computed (at its w + eps): AsyncSAM, S2-SAM.

    Jo, Lim, Lee (arXiv 2503.11147) on one device; S2-SAM (NeurIPS 2024).
    """

    uses_gradient: ClassVar[bool] = False
    remembers: ClassVar[tuple[str, ...]] = ("gradient",)

    def offer(  # noqa: D102
        self, params: Sequence[Tensor], memory: Memory, base: Optimizer, step: int, part: int
    ) -> Iterator[Piece]:
        for param in params:
            value = memory.get(param, "gradient")
            if value is not None and param.numel():
                yield Piece(real(param.detach()), value, param, value, shared=True, over=sharding_of(param))

    @no_grad
    def learn(self, params: Sequence[Tensor], memory: Memory, finite: Tensor | bool | None) -> None:  # noqa: D102
        for param in params:
            if param.grad is None:
                continue
            grad, known = real(local(param.grad, param)), memory.get(param, "gradient")
            if isinstance(finite, Tensor):  # an accelerator's verdict is not read: a withheld step teaches nothing
                last = torch.zeros_like(grad) if known is None else known
                grad = torch.where(finite.to(grad.device), grad, last)
            memory.keep(param, "gradient", grad)


@dataclass(frozen=True)
class Noise(Direction):
    """Gaussian noise, ``eps = rho ||f|| xi``: LPF-SGD (Bisla, Wang, Choromanska, AISTATS 2022), RWP.

    f is the slice of the first dimension that holds the weight; in a tensor of one dimension each weight is its own.
    The noise of a step is drawn from a generator seeded by ``noise_seed`` and the step, so that it is the same on every
    replica and after resuming, costs no state, and leaves torch's random state alone.

    Attributes:
        noise_seed: seed of the noise.
        filter_scaled: False leaves ``||f||`` out.
    """

    noise_seed: int = 0
    filter_scaled: bool = True
    uses_gradient: ClassVar[bool] = False
    streams: ClassVar[bool] = True

    def check_ball(self, *, normalised: bool, adaptive: bool) -> None:  # noqa: D102
        if normalised or adaptive:
            raise ValueError(
                "noise has its own length: give its ball normalised=False, and leave adaptive out "
                "(filter_scaled=True is its scaling)"
            )

    @torch.no_grad()
    def offer(  # noqa: D102
        self, params: Sequence[Tensor], memory: Memory, base: Optimizer, step: int, part: int
    ) -> Iterator[Piece]:
        draws: dict[Sharding | None, StepNoise] = {}
        for param in params:
            weight, over = real(param.detach()), sharding_of(param)
            if not param.numel():
                continue
            # The parts of a tensor that is cut over processes have noise of their own, its replicas the same; so what
            # is cut otherwise is drawn from another generator, of which every process has drawn as much.
            cut = over if over is not None and over.parts > 1 else None
            if cut not in draws:
                place = 0 if cut is None else 1 + cut.index + (len(draws) << 32)
                draws[cut] = StepNoise(self.noise_seed, step, part, place)
            generator = draws[cut].generator(weight.device)
            dtype = torch.float32 if weight.dtype in COARSE else weight.dtype
            noise = torch.randn(weight.shape, generator=generator, dtype=dtype, device=weight.device)
            if self.filter_scaled:
                noise *= filter_norms(weight)
            noise = noise.to(weight.dtype)
            owned = weight.is_cpu and over is None and may_hold_copy(noise, weight)
            yield Piece(weight, noise, param, noise, owned=owned, over=over)
