"""flatwise: sharpness-aware training for PyTorch, exact to the bit.

``SAM`` wraps any ``torch.optim`` optimizer. The four slots of a step (``GradientAscent``, ``PerturbedGradient``,
``Schedule``, ``Batching``) are there for those who compose; ``create`` makes a method by its name.
"""

from flatwise.ascent import Ball, GradientAscent
from flatwise.batching import Batching
from flatwise.descent import PerturbedGradient
from flatwise.optimizer import SAM
from flatwise.record import StepRecord
from flatwise.schedule import Schedule
from flatwise.variants import Variant, create, list_variants, variant_info

__all__ = [
    "SAM",
    "Ball",
    "Batching",
    "GradientAscent",
    "PerturbedGradient",
    "Schedule",
    "StepRecord",
    "Variant",
    "create",
    "list_variants",
    "variant_info",
]
__version__ = "0.1.0"
