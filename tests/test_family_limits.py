"""Where a method's options make it a simpler method, it is that one: bit for bit, in float64 and float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from tests.family_paths import Path, run_fast
from tests.family_world import BASES, FEATURES, SAMPLES, STEPS, batches, network
from torch import nn


def only_norm_layers() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Tanh(), nn.Dropout(0.3), nn.LayerNorm(FEATURES)).double()


def only_weights() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 5, bias=False), nn.Dropout(0.3), nn.RMSNorm(5), nn.Tanh(), nn.Linear(5, 3, bias=False)
    ).double()


def one_tensor() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(FEATURES, affine=False), nn.Linear(FEATURES, 3, bias=False)).double()


@dataclass(frozen=True)
class Limit:
    """A method with options, the method that these make it, and the radii at which the two are compared."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    rho: float = 0.2
    default: float | None = None
    """The radius of the other method, where that of this one is another."""
    make: Callable[[], nn.Module] = network
    known: str = "sam"


SAM_RHO = 0.05
KNOWN: dict[str, dict[str, Any]] = {"sam": {}, "asam": {"scaled": "all"}}
LIMITS = {
    "lp, p=2": Limit("lp", {"p": 2}),
    "asam, not adaptive": Limit("asam", {"adaptive": False, "eta": 0.0}, default=SAM_RHO),
    "asam of weights": Limit("asam", {"scaled": "weights", "model": True}, make=only_weights, known="asam"),
    "sam-on of norm layers": Limit("sam-on", {"model": True}, default=SAM_RHO, make=only_norm_layers),
    "fsam, sigma=0": Limit("fsam", {"sigma": 0.0}, default=SAM_RHO),
    "vasso, theta=1": Limit("vasso", {"theta": 1.0}, default=SAM_RHO),
    "one ascent step": Limit("multi-step", {"ascent_steps": 1}),
    "gsam, alpha=0": Limit("gsam", {"alpha": 0.0}, 0.3, SAM_RHO),  # at a constant learning rate the radius is rho
    "wsam, gamma=0.5": Limit("wsam", {"gamma": 0.5, "decoupled": False}, 0.3),
    "pgn, alpha=1": Limit("pgn", {"alpha": 1.0}, 0.3, SAM_RHO),
    "looksam, every=1": Limit("looksam", {"every": 1}, 0.3, SAM_RHO),
    "every step": Limit("every-k", {"every": 1}),
    "probability 1": Limit("bernoulli", {"probability": 1.0}),
    "no warm-up": Limit("warmup-off", {"warmup_steps": 0}),
    "the whole window": Limit("late", {"window": (0.0, 1.0), "total_steps": STEPS}),
    "ae-sam, always": Limit("ae-sam", {"total_steps": STEPS, "lambda_1": -1e9, "lambda_2": -1e9}),
    "one part": Limit("m-sam", {"micro_batch_size": SAMPLES}),
    "the ascent of all": Limit("quarter", {"ascent_fraction": 1.0}),
    "k-sam of all": Limit("k-sam", {"top_fraction": 1.0}),
    "esam-sds of all": Limit("esam-sds", {"rising_fraction": 1.0}),
}
SETTINGS = {
    "float64": (torch.float64, True),
    "float32": (torch.float32, True),
    "float32, default radius": (torch.float32, False),
}


def run(
    name: str, base: str, dtype: torch.dtype, make: Callable[[], nn.Module], steps: int = STEPS, **options: Any
) -> Path:
    return run_fast(name, options, base, data=batches(steps, dtype), make=lambda: make().to(dtype))


@cache
def known(
    name: str, base: str, dtype: torch.dtype, make: Callable[[], nn.Module], steps: int = STEPS, **rho: float
) -> Path:
    return run(name, base, dtype, make, steps, **KNOWN[name], **rho)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_is_reached_bit_for_bit(limit: str, base: str, setting: str) -> None:
    row, (dtype, given) = LIMITS[limit], SETTINGS[setting]
    ours = {"rho": row.rho} if given else {"rho": row.default} if row.default else {}
    expected = known(row.known, base, dtype, row.make, **({"rho": row.rho} if given else {}))
    run(row.name, base, dtype, row.make, **row.options, **ours).assert_equal(expected)
    plain = known(row.known, base, dtype, row.make, rho=0.0)
    assert not torch.allclose(plain.weights[-1], expected.weights[-1], rtol=1e-4), "the perturbation was a trifle"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("base", BASES)
def test_the_first_step_of_msam_is_that_of_its_base(base: str, dtype: torch.dtype) -> None:
    run("msam", base, dtype, network, 1, rho=0.2).assert_equal(known("sam", base, dtype, network, 1, rho=0.0))


@pytest.mark.parametrize("base", BASES)
def test_layerwise_on_one_tensor_is_sam_but_for_rounding(base: str) -> None:
    """It multiplies each gradient by 1 / norm and by rho, SAM by their quotient."""
    layerwise, sam = (run_fast(name, {"rho": 0.2}, base, make=one_tensor) for name in ("layerwise", "sam"))
    layerwise.assert_close(sam, 1e-14)
