"""Any ascent with any descent, schedule and batching that make sense together; the others are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.family_world import batches, flat, network
from torch.nn import functional as F

import flatwise
from flatwise import (
    SAM,
    AdaptiveSchedule,
    AveragedGradient,
    Ball,
    Batching,
    FriendlyGradient,
    FunctionalGradient,
    Gradient,
    GradientAscent,
    GradientNormPenalty,
    Momentum,
    Noise,
    PerturbedGradient,
    PreviousGradient,
    Renormalised,
    ReusedPart,
    Schedule,
    SurrogateGap,
    WeightedSharpness,
)

DESCENTS = [
    PerturbedGradient(), PerturbedGradient(second_order=True), GradientNormPenalty(), WeightedSharpness(),
    WeightedSharpness(decoupled=False), Renormalised(), SurrogateGap(), ReusedPart(), FunctionalGradient(),
]  # fmt: skip
SCHEDULES = [
    Schedule(), Schedule(every=2), Schedule(probability=0.5), Schedule(warmup_steps=1), Schedule(rho_min=0.01),
    Schedule(window=(0.5, 1.0), total_steps=4), AdaptiveSchedule(total_steps=4),
]  # fmt: skip
BATCHINGS = [Batching(), Batching(6), Batching(ascent_fraction=0.5), Batching(top_fraction=0.5),
             Batching(rising_fraction=0.5), Batching(6, top_fraction=0.5)]  # fmt: skip


@st.composite
def slots(draw: Any) -> dict[str, Any]:
    direction = draw(
        st.sampled_from([Gradient(), AveragedGradient(), FriendlyGradient(), Momentum(), PreviousGradient(), Noise()])
    )
    return {
        "ball": {
            "p": draw(st.sampled_from([1, 1.5, 2, float("inf")])),
            "adaptive": draw(st.sampled_from([False, True, "filter", "fisher"])),
            "scope": draw(st.sampled_from(["all", "tensor"])),
            "normalised": draw(st.booleans()),
        },
        "ascent": {
            "direction": direction,
            "steps": draw(st.sampled_from([1, 1, 2])),
            "only": draw(st.sampled_from(["all", "norm"])),
            "scaled": draw(st.sampled_from(["all", "all", "weights"])),
        },
        "descent": draw(st.sampled_from(DESCENTS)),
        "schedule": draw(st.sampled_from(SCHEDULES)),
        "batching": draw(st.sampled_from(BATCHINGS)),
    }


@settings(max_examples=400, deadline=None)
@given(chosen=slots())
def test_it_runs_or_is_refused_by_name(chosen: dict[str, Any]) -> None:
    model = network(dtype=torch.float32)
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rest = {k: chosen[k] for k in ("descent", "schedule", "batching")}
    try:
        ascent = GradientAscent(ball=Ball(**chosen["ball"]), **chosen["ascent"])
        opt = SAM(base, rho=0.02, ascent=ascent, model=model, **rest)
    except ValueError as error:
        named = ("normalised", "scaled", "ascent_steps", "second_order", "direction", "micro_batch", "fraction")
        if not any(word in str(error) for word in named):
            raise
        return
    reduction = "none" if chosen["batching"].ranks else "mean"
    calls = 0

    def loss_fn(batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)

    for batch in batches(4, torch.float32):
        before = calls
        opt.step(loss_fn, batch)
        assert opt.last.closure_calls == calls - before
        assert flat(model).isfinite().all()
        assert opt.last.updated
    # Outside the step the weights are w: a step that raises at its last call leaves them.
    before_step, last = flat(model), calls - before

    def interrupted(batch: Any) -> torch.Tensor:
        nonlocal last
        last -= 1
        if not last:
            raise KeyboardInterrupt
        return loss_fn(batch)

    try:
        opt.step(interrupted, batches(1, torch.float32)[0])
    except KeyboardInterrupt:
        assert torch.equal(flat(model), before_step)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "looksam",
            {"ascent": GradientAscent(direction=Momentum())},
            "ReusedPart uses the gradient at w, which direct",
        ),
        ("gsam", {"ascent_fraction": 0.5}, "SurrogateGap joins two gradients of the same samples"),
        ("pgn", {"rising_fraction": 0.5}, "GradientNormPenalty joins two gradients of the same samples"),
        ("looksam", {"micro_batch_size": 4}, "ReusedPart keeps one part for the whole batch"),
        ("wsam", {"micro_batch_size": 4}, "decoupled WeightedSharpness acts once"),
        ("ae-sam", {"micro_batch_size": 4, "total_steps": 9}, "AdaptiveSchedule decides once"),
        ("msam", {"ascent_fraction": 0.5}, "direction=Momentum has one pass"),
        ("msam", {"ascent_steps": 2}, "cannot be combined with direction=Momentum"),
        ("msam", {"adaptive": "fisher"}, "made of the gradient, which direction=Momentum does not compute"),
        ("usam", {"p": 3}, "defined for p = 2"),
        ("layerwise", {"ascent_steps": 2}, "scope='tensor'"),
        ("second-order", {"ascent_steps": 2}, "one ascent step"),
        ("vasso", {"descent": PerturbedGradient(second_order=True)}, "climbs along something else"),
        ("sam", {"scaled": "weights"}, "no effect without adaptive=True"),
        ("asam", {"scaled": "weights"}, "pass model=model"),
        ("random", {"normalised": True}, "normalised=False"),
        ("sam", {"only": "bias"}, "only must be 'all' or 'norm'"),
        ("quarter", {"top_fraction": 0.5}, "use one of them"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    base = torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=words):
        flatwise.create(name, base, **options)


def test_msam_needs_a_momentum() -> None:
    with pytest.raises(
        ValueError, match="needs a base optimizer that has one, and this SGD has none: give it momentum"
    ):
        flatwise.create("msam", torch.optim.SGD(network().parameters(), lr=0.1))


def test_a_functional_gradient_needs_the_model() -> None:
    with pytest.raises(ValueError, match="pass model=model"):
        SAM(torch.optim.SGD(network().parameters(), lr=0.1), descent=FunctionalGradient())
