"""Which parameters are perturbed, and which are scaled: what needs the model, not only its parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import Module

from flatwise.ascent import GradientAscent


@dataclass
class Selection:
    """Parameters by what is done with them. None stands for all; saved with the optimizer, as the parameters are.

    Attributes:
        perturbed: those that move.
        scaled: those that the ball's T applies to.
    """

    perturbed: list[Tensor] | None = None
    scaled: list[Tensor] | None = None
    _moving: set[Tensor] | None = field(default=None, repr=False)
    _scaling: set[Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Index the lists."""
        self._moving = None if self.perturbed is None else set(self.perturbed)
        self._scaling = None if self.scaled is None else set(self.scaled)

    def moving(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Return those that move."""
        if self._moving is None:
            return list(params)
        return [p for p in params if p in self._moving]

    def split(self, params: Iterable[Tensor], *, adaptive: bool) -> list[tuple[list[Tensor], bool]]:
        """Return those that move in parts, each with whether it is scaled."""
        moving = self.moving(params)
        if not adaptive or self._scaling is None:
            return [(moving, adaptive)]
        return [([p for p in moving if (p in self._scaling) == scaled], scaled) for scaled in (True, False)]


def is_norm_layer(module: Module) -> bool:
    """Tell a normalisation layer by its class: BatchNorm, LayerNorm, GroupNorm, RMSNorm and their like."""
    kind = type(module)
    return "norm" in kind.__name__.lower() and not kind.__module__.startswith("torch.nn.utils")


def select(ascent: GradientAscent, model: Module | None) -> Selection:
    """Find the parameters that an ascent speaks of.

    Args:
        ascent: where to look.
        model: the module that holds them.

    Returns:
        The selection.

    Raises:
        ValueError: if a model is needed and missing, or has no such parameter.
    """
    if ascent.only == "all" and ascent.scaled == "all":
        return Selection()
    if model is None:
        option = f"only={ascent.only!r}" if ascent.only != "all" else f"scaled={ascent.scaled!r}"
        raise ValueError(f"{option} must know which parameter belongs to what: pass model=model")
    perturbed: list[Tensor] | None = None
    scaled: list[Tensor] | None = None
    if ascent.only == "norm":
        perturbed = [p for m in model.modules() if is_norm_layer(m) for p in m.parameters(recurse=False)]
        if not perturbed:
            raise ValueError("only='norm' perturbs normalisation layers, and this model has none with parameters")
    if ascent.scaled == "weights":
        scaled = [p for name, p in model.named_parameters() if "weight" in name]
    return Selection(perturbed, scaled)
