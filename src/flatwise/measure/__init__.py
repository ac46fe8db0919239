"""How flat a minimum is: sharpness, Hessian, landscape, bound, doctor.

Every measure takes ``model``, ``loss_fn(model, batch) -> scalar`` and ``data`` (one batch, or any iterable of
batches, read once), leaves everything as it was, and returns a frozen result that carries its conditions and cost.
"""

from flatwise.measure.density import Density, hessian_density
from flatwise.measure.determinism import Determinism, determinism
from flatwise.measure.groups import by_group
from flatwise.measure.hessian import Eigenvalues, hessian_eigenvalues
from flatwise.measure.samples import SamplesCurve, samples_curve
from flatwise.measure.spectrum import Spectrum, spectrum
from flatwise.measure.trace import Trace, hessian_trace

__all__ = [
    "Density",
    "Determinism",
    "Eigenvalues",
    "SamplesCurve",
    "Spectrum",
    "Trace",
    "by_group",
    "determinism",
    "hessian_density",
    "hessian_eigenvalues",
    "hessian_trace",
    "samples_curve",
    "spectrum",
]
