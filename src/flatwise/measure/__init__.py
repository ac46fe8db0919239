"""How flat a minimum is: sharpness, Hessian, landscape, bound, doctor.

Every measure takes ``model``, ``loss_fn(model, batch) -> scalar`` and ``data`` (one batch, or any iterable of
batches, read once), leaves everything as it was, and returns a frozen result that carries its conditions and cost.
"""

from flatwise.measure.density import Density, hessian_density
from flatwise.measure.determinism import Determinism, determinism
from flatwise.measure.diagnosis import Diagnosis
from flatwise.measure.doctor import doctor
from flatwise.measure.hessian import Eigenvalues, hessian_eigenvalues
from flatwise.measure.landscape import landscape
from flatwise.measure.landscape_result import Landscape, Mark, Track
from flatwise.measure.rows import Row, Sharpness
from flatwise.measure.sharpness import sharpness
from flatwise.measure.trace import Trace, hessian_trace
from flatwise.measure.trajectory import Trajectory, TrajectoryRecorder

__all__ = [
    "Density",
    "Determinism",
    "Diagnosis",
    "Eigenvalues",
    "Landscape",
    "Mark",
    "Row",
    "Sharpness",
    "Trace",
    "Track",
    "Trajectory",
    "TrajectoryRecorder",
    "determinism",
    "doctor",
    "hessian_density",
    "hessian_eigenvalues",
    "hessian_trace",
    "landscape",
    "sharpness",
]
