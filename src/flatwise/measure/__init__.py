"""How flat a minimum is: sharpness, Hessian, landscape, bound, doctor.

Every measure takes ``model``, ``loss_fn(model, batch) -> scalar`` and ``data`` (one batch, or any iterable of
batches, read once), leaves everything as it was, and returns a frozen result that carries its conditions and cost.
"""

from flatwise.measure.diagnosis import Diagnosis
from flatwise.measure.doctor import doctor
from flatwise.measure.suggest import RhoSuggestion, suggest_rho

__all__ = ["Diagnosis", "RhoSuggestion", "doctor", "suggest_rho"]
