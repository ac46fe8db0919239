"""What each method needs at the peak of a step, and keeps between steps, in copies of the parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.test_memory import deep, measure, wide

import flatwise

# The copy of w is one. Where the gradient at w, or a direction made beside it, is kept, that is one more;
# so is the next value of an average, which counts only once the step is made.
PEAK = {
    "usam": 1, "layerwise": 1, "filterwise": 1, "msam": 1, "adaptive-msam": 2, "stale": 1, "random": 1, "vasso": 2,
    "fsam": 3, "fisher": 1, "pgn": 2, "wsam": 2, "stable": 2, "gsam": 2, "looksam": 2.3, "every-k": 1, "bernoulli": 1,
}  # fmt: skip
KEPT = {"stale": 1, "vasso": 1, "fsam": 1, "looksam": 1}


@pytest.mark.parametrize("make", [deep, wide])
@pytest.mark.parametrize("name", PEAK)
def test_copies_of_the_weights(name: str, make: Any) -> None:
    model = make()
    base = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    options = {"rho_min": 0.1} if name == "gsam" else {"every": 1} if name in ("looksam", "every-k") else {}
    opt = flatwise.create(name, base, **options)
    size = sum(p.nbytes for p in model.parameters())
    base_peak, _, gradients = measure(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
    peak, kept, _ = measure(model, opt)
    assert kept - gradients <= 0.02 * size, "the second step on allocates nothing that stays"
    remembered = sum(t.nbytes for entries in opt._memory.save(opt.param_groups).values() for t in entries.values())
    assert remembered == KEPT.get(name, 0) * size
    assert (peak - base_peak) / size <= PEAK[name] + 0.15
