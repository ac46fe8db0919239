"""How flat a minimum is: sharpness, Hessian, landscape, bound, doctor.

Every measure takes ``model``, ``loss_fn(model, batch) -> scalar`` and ``data`` (one batch, or any iterable of
batches, read once), leaves everything as it was, and returns a frozen result that carries its conditions and cost.
"""

from flatwise.measure.bound import PacBayesBound, bounded_loss, pac_bayes_bound
from flatwise.measure.curvature import WarmStart
from flatwise.measure.density import hessian_density
from flatwise.measure.determinism import Determinism, determinism
from flatwise.measure.diagnosis import Diagnosis
from flatwise.measure.doctor import doctor
from flatwise.measure.eigenvalues import Eigenvalues
from flatwise.measure.groups import by_group
from flatwise.measure.hessian import hessian_eigenvalues
from flatwise.measure.landscape import landscape
from flatwise.measure.landscape_result import Landscape, Mark, Track
from flatwise.measure.quadrature import Density
from flatwise.measure.ranking import Ranking, compare_sharpness
from flatwise.measure.rows import Row, Sharpness
from flatwise.measure.samples import SamplesCurve, samples_curve
from flatwise.measure.sharpness import sharpness
from flatwise.measure.spectrum import Spectrum, spectrum
from flatwise.measure.suggest import RhoSuggestion, suggest_rho
from flatwise.measure.trace import Trace, hessian_trace
from flatwise.measure.track import Record, Tracker, track
from flatwise.measure.trajectory import Trajectory, TrajectoryRecorder

__all__ = [
    "Density",
    "Determinism",
    "Diagnosis",
    "Eigenvalues",
    "Landscape",
    "Mark",
    "PacBayesBound",
    "Ranking",
    "Record",
    "RhoSuggestion",
    "Row",
    "SamplesCurve",
    "Sharpness",
    "Spectrum",
    "Trace",
    "Track",
    "Tracker",
    "Trajectory",
    "TrajectoryRecorder",
    "WarmStart",
    "bounded_loss",
    "by_group",
    "compare_sharpness",
    "determinism",
    "doctor",
    "hessian_density",
    "hessian_eigenvalues",
    "hessian_trace",
    "landscape",
    "pac_bayes_bound",
    "samples_curve",
    "sharpness",
    "spectrum",
    "suggest_rho",
    "track",
]
