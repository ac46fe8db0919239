"""flatwise: sharpness-aware training for PyTorch, exact to the bit.

``SAM`` wraps any ``torch.optim`` optimizer; ``create`` makes a method of the family by its name. The four slots of a
step (``GradientAscent`` with a ``Ball`` and a direction, a descent, ``Schedule``, ``Batching``) are there for those who
compose. ``flatwise.measure`` says how flat a minimum is; it is imported when it is first touched.
"""

from typing import Any

from flatwise.ascent import Ball, GradientAscent
from flatwise.batching import Batching
from flatwise.bsam import BSAM
from flatwise.descent import Descent, PerturbedGradient
from flatwise.directions import (
    AveragedGradient,
    Direction,
    FriendlyGradient,
    Gradient,
    Momentum,
    Noise,
    PreviousGradient,
)
from flatwise.frugal import Frugal
from flatwise.functional import FunctionalGradient
from flatwise.mixing import GradientNormPenalty, Renormalised, ReusedPart, SurrogateGap, WeightedSharpness
from flatwise.optimizer import SAM
from flatwise.radius import AutoRadius
from flatwise.record import StepRecord
from flatwise.schedule import AdaptiveSchedule, Schedule
from flatwise.true_gradient import true_gradient_wanted, true_gradients
from flatwise.variants import Variant, create, list_variants, variant_info

__all__ = [
    "BSAM",
    "SAM",
    "AdaptiveSchedule",
    "AutoRadius",
    "AveragedGradient",
    "Ball",
    "Batching",
    "Descent",
    "Direction",
    "FriendlyGradient",
    "Frugal",
    "FunctionalGradient",
    "Gradient",
    "GradientAscent",
    "GradientNormPenalty",
    "Momentum",
    "Noise",
    "PerturbedGradient",
    "PreviousGradient",
    "Renormalised",
    "ReusedPart",
    "Schedule",
    "StepRecord",
    "SurrogateGap",
    "Variant",
    "WeightedSharpness",
    "create",
    "list_variants",
    "true_gradient_wanted",
    "true_gradients",
    "variant_info",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "measure":
        import flatwise.measure

        return flatwise.measure
    raise AttributeError(f"module 'flatwise' has no attribute {name!r}")
