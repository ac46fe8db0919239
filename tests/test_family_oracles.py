"""Every method of the family beside its oracle, for 50 steps, with BatchNorm and dropout, under two base optimizers."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from tests.family_paths import run_oracle
from tests.family_table import ASCENTS, BATCHINGS, CASES, DEFAULT, DESCENTS, SCHEDULES, Radius, fast, oracle
from tests.family_world import BASES, STEPS, batches, flat, network, reseed
from torch.nn import functional as F

import flatwise
from oracles import family_ascent, family_descent

ROWS = [(case, rho) for case, row in CASES.items() for rho in row.radii]


@pytest.mark.supports("plain loop", "equal to hand-written SAM")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("case", "rho"), ROWS)
def test_fifty_steps(case: str, rho: Radius, base: str) -> None:
    fast(case, base, rho).assert_close(oracle(case, base, rho))


@pytest.mark.parametrize(("case", "rho"), ROWS)
def test_the_comparison_sees_a_radius_that_is_off_by_a_thousandth(case: str, rho: Radius) -> None:
    path, expected = fast(case, rho=rho), oracle(case, rho=rho, factor=1.001)
    with pytest.raises(AssertionError, match="weights of step"):
        path.assert_close(expected)
    assert (path.weights[-1] - expected.weights[-1]).abs().max() > 1e-7


@pytest.mark.parametrize(
    ("cases", "steps"),
    [({**ASCENTS, **DESCENTS, **BATCHINGS}, 8), (SCHEDULES, STEPS)],
    ids=["without schedules", "schedules"],
)
def test_the_cases_differ_from_each_other_and_from_sam(cases: dict[str, object], steps: int) -> None:
    """Cases in which an option made no difference would prove nothing."""
    ends = {case: oracle(case, steps=steps).weights[-1] for case in cases if case != "sam"}
    for rho in {radius for case in cases for radius in CASES[case].radii[-1:] if radius != DEFAULT}:
        ends[f"sam, {rho}"] = run_oracle(lambda rho=rho: family_ascent.sam(rho), steps=steps).weights[-1]
    assert not [(a, b) for a, b in combinations(ends, 2) if torch.allclose(ends[a], ends[b], rtol=0, atol=1e-7)]


@pytest.mark.parametrize("name", flatwise.list_variants())
def test_every_row_of_the_registry_has_an_oracle(name: str) -> None:
    assert name in {row.name for row in CASES.values()}, (
        f"no oracle for {name!r}: write the paper's equations into tests/oracles/, and a case into family_table.py"
    )


def test_bsam_of_parameters_alone_follows_its_oracle() -> None:
    """With a learning rate and a weight decay that no base gives."""
    model = network()
    opt = flatwise.create("bsam", model.parameters(), train_size=600, lr=0.05, weight_decay=0.01, rho=0.05)
    settings = {**CASES["bsam"].settings, "lr": 0.05, "delta": 0.01}
    expected = run_oracle(lambda: family_descent.bsam(0.05, **settings))
    for step, batch in enumerate(batches()):
        reseed(step)
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch)
        torch.testing.assert_close(flat(model), expected.weights[step], rtol=0, atol=1e-10)
