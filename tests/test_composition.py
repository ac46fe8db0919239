"""Any ascent with any descent, schedule and batching that make sense together; the others are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core_cases import Held, same
from tests.family_cases import BASES, NAMES, make, options_of
from tests.family_world import batches, flat, network
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

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


DIRECTIONS = [Gradient(), AveragedGradient(), FriendlyGradient(), Momentum(), PreviousGradient(), Noise()]
ONE_PASS = ("Momentum", "PreviousGradient", "Noise")
JOINING = ("GradientNormPenalty", "WeightedSharpness", "Renormalised", "SurrogateGap", "ReusedPart")


def word(slot: Any) -> str:
    """A short name of a slot: its class, and what sets it apart from others of the class."""
    mark = {
        PerturbedGradient: lambda s: "second order" if s.second_order else "",
        WeightedSharpness: lambda s: "decoupled" if s.decoupled else "",
        Batching: lambda s: " ".join(
            name
            for name in ("micro_batch_size", "ascent_fraction", "top_fraction", "rising_fraction")
            if getattr(s, name) not in (None, 1.0)
        ),
    }.get(type(slot), lambda s: "")(slot)
    return f"{type(slot).__name__} {mark}".strip()


def is_refused(direction: str, descent: str, schedule: str, batching: str) -> bool:
    """What makes no sense, said once more and apart from the source."""
    joins = descent.split()[0] in (*JOINING, "FunctionalGradient")
    one, second = direction in ONE_PASS, descent == "PerturbedGradient second order"
    micro, top = "micro" in batching, "top" in batching
    part = "ascent_fraction" in batching or "rising" in batching
    return any(
        (
            one and (joins or part or top or schedule == "AdaptiveSchedule"),
            second and (direction != "Gradient" or "rising" in batching),
            joins and part,
            micro and (descent in ("ReusedPart", "WeightedSharpness decoupled") or schedule == "AdaptiveSchedule"),
        )
    )


PAIRS = [
    *((x, d, Schedule(), Batching()) for x in DIRECTIONS for d in DESCENTS),
    *((x, PerturbedGradient(), s, Batching()) for x in DIRECTIONS for s in SCHEDULES),
    *((x, PerturbedGradient(), Schedule(), b) for x in DIRECTIONS for b in BATCHINGS),
    *((Gradient(), d, s, Batching()) for d in DESCENTS for s in SCHEDULES),
    *((Gradient(), d, Schedule(), b) for d in DESCENTS for b in BATCHINGS),
    *((Gradient(), PerturbedGradient(), s, b) for s in SCHEDULES for b in BATCHINGS),
]


@pytest.mark.parametrize(("direction", "descent", "schedule", "batching"), PAIRS, ids=word)
def test_no_pair_is_refused_that_makes_sense(direction: Any, descent: Any, schedule: Any, batching: Batching) -> None:
    model = network(dtype=torch.float32)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ball = Ball(normalised=not isinstance(direction, Noise))
    slots = {"ascent": GradientAscent(ball, direction=direction), "descent": descent, "schedule": schedule}
    if is_refused(word(direction), word(descent), word(schedule), word(batching)):
        with pytest.raises(
            ValueError, match=rf"direction=|second_order|{type(descent).__name__}|{type(schedule).__name__} "
        ):
            SAM(base, **slots, batching=batching, model=model)
        return
    opt = SAM(base, **slots, batching=batching, model=model)
    loss_fn = _loss_fn(model, batching.ranks)
    for batch in batches(4, torch.float32):
        start = flat(model)
        opt.step(loss_fn, batch)
        assert opt.last.updated
        assert flat(model).isfinite().all()
        assert not same(flat(model), start)
    _stays_at_w(model, opt, loss_fn, 4 * (5 if batching.micro_batch_size else 1))


def _loss_fn(model: nn.Module, ranks: bool) -> Any:
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none" if ranks else "mean")


def _stays_at_w(model: nn.Module, opt: Any, loss_fn: Any, most: int) -> None:
    """Stop a step in each of its calls; outside it the weights are w, in their places."""
    for stop in range(1, most):
        held, calls = Held(model.parameters()), 0

        def interrupted(batch: Any, stop: int = stop) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return loss_fn(batch)

        try:
            opt.step(interrupted, batches(1, torch.float32)[0])
        except KeyboardInterrupt:
            held.assert_exact()
            continue
        return


FLAT = {
    "p": st.sampled_from([0.5, 1, 1.5, 2, float("inf")]),
    "adaptive": st.sampled_from([False, True, "filter", "fisher", "rows"]),
    "eta": st.sampled_from([-1.0, 0.0, 0.1]),
    "scope": st.sampled_from(["all", "tensor", "row"]),
    "normalised": st.booleans(),
    "ascent_steps": st.sampled_from([0, 1, 2]),
    "only": st.sampled_from(["all", "norm"]),
    "scaled": st.sampled_from(["all", "weights"]),
    "alpha": st.sampled_from([-0.1, 0.0, 0.5, 1.5]),
    "gamma": st.sampled_from([0.0, 0.5, 1.0]),
    "decoupled": st.booleans(),
    "second_order": st.booleans(),
    "theta": st.sampled_from([0.0, 0.5]),
    "sigma": st.sampled_from([-1.0, 0.5]),
    "noise_seed": st.integers(0, 3),
    "every": st.sampled_from([0, 1, 2]),
    "window": st.sampled_from([(0.0, 1.0), (0.5, 1.0), (0.5, 0.5)]),
    "total_steps": st.sampled_from([0, 3]),
    "warmup_steps": st.sampled_from([-1, 0, 1]),
    "probability": st.sampled_from([0.0, 0.5, 1.5]),
    "rho_min": st.sampled_from([-0.1, 0.0, 0.05]),
    "micro_batch_size": st.sampled_from([0, 6, 50]),
    "ascent_fraction": st.sampled_from([0.0, 0.5, 1.0]),
    "top_fraction": st.sampled_from([0.5, 1.0, 2.0]),
    "rising_fraction": st.sampled_from([0.5, 1.0]),
    "rho": st.sampled_from([-1.0, 0.0, 0.02]),
    "mystery": st.just(1),
}


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(NAMES), data=st.data())
def test_flat_options_run_or_are_refused_by_name(name: str, data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(FLAT)), max_size=4, unique=True))
    options = {key: data.draw(FLAT[key], label=key) for key in keys}
    model = network(dtype=torch.float32)
    try:
        opt = flatwise.create(name, BASES["momentum"](model), **{**options_of(name, model), "model": model, **options})
    except (ValueError, TypeError) as error:
        # The message names an option that was given, or the direction that it does not fit.
        words = [*options, "direction="]
        if not any(text in str(error) for text in words):
            raise
        return
    assert "mystery" not in options
    batching = getattr(opt, "_batching", Batching())
    loss_fn = _loss_fn(model, batching.ranks)
    for batch in batches(3, torch.float32):
        opt.step(loss_fn, batch)
        assert flat(model).isfinite().all()
        assert opt.last.updated
    _stays_at_w(model, opt, loss_fn, 20)


@pytest.mark.parametrize("rule", ["ema", "swa"])
@pytest.mark.parametrize("name", ["sam", "msam", "looksam"])
def test_averages_of_torch_stack(name: str, rule: str) -> None:
    model = network(dtype=torch.float32)
    opt = make(name, model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if rule == "ema" else get_swa_multi_avg_fn())
    seen: list[torch.Tensor] = []
    for batch in batches(10, torch.float32):
        opt.step(_loss_fn(model, False), batch)
        average.update_parameters(model)
        seen.append(flat(model))
    expected = seen[0]
    for count, weights in enumerate(seen[1:], 2):
        share = 0.1 if rule == "ema" else 1 / count
        expected = torch.lerp(expected, weights, share)
    torch.testing.assert_close(flat(average.module), expected)
    before = flat(model), model[1].running_mean.clone()
    inputs = [x for x, _ in batches(10, torch.float32)]
    update_bn(inputs, average)
    # The statistics are those of the averaged weights over all batches, and the model that trains is left alone.
    means = [average.module[0](x).mean(0) for x in inputs]
    torch.testing.assert_close(average.module[1].running_mean, torch.stack(means).mean(0))
    assert same((flat(model), model[1].running_mean), before)
    opt.step(_loss_fn(model, False), batches(1, torch.float32)[0])
    assert opt.last.active or name == "looksam"
