"""Every method of the family beside its oracle, for 50 steps, with BatchNorm and dropout, under two base optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.family_cases import ranks
from tests.family_world import STEPS, AdamW, Momentum, World, batches, flat, network
from torch.nn import functional as F

import flatwise
from oracles import family

INF = float("inf")

# name, options of flatwise, oracle, options of the oracle
ORACLES: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
    ("sam", {}, family.ball, {}),
    ("asam", {}, family.ball, {"adaptive": True, "eta": 0.01}),
    ("asam", {"scaled": "weights", "model": True}, family.ball, {"adaptive": True, "eta": 0.01, "scaled": "weights"}),
    ("usam", {}, family.usam, {}),
    ("lp", {"p": 1.5}, family.ball, {"p": 1.5}),
    ("lp", {"p": INF, "rho": 0.01}, family.ball, {"p": INF}),
    ("lp", {"p": 1}, family.ball, {"p": 1}),
    ("sam-on", {"model": True}, family.sam_on, {}),
    ("layerwise", {}, family.layerwise, {}),
    ("filterwise", {}, family.filterwise, {}),
    ("msam", {"rho": 0.3}, family.msam, {}),
    ("adaptive-msam", {"rho": 0.3}, family.msam, {"adaptive": True, "eta": 0.01}),
    ("stale", {}, family.stale, {}),
    ("random", {"rho": 0.05}, family.noise, {}),
    ("vasso", {}, family.vasso, {}),
    ("fsam", {}, family.fsam, {}),
    ("fisher", {}, family.fisher, {}),
    ("multi-step", {}, family.multi_step, {}),
    ("pgn", {}, family.pgn, {}),
    ("wsam", {}, family.wsam, {}),
    ("wsam", {"decoupled": False, "gamma": 0.8}, family.wsam, {"decoupled": False, "gamma": 0.8}),
    ("stable", {}, family.stable, {}),
    ("gsam", {}, family.gsam, {"rho_min": 0.1}),
    ("second-order", {}, family.second_order, {}),
    ("functional", {"model": True}, family.functional, {}),
    ("looksam", {}, family.looksam, {}),
    ("looksam", {"every": 3, "alpha": 0.3}, family.looksam, {"every": 3, "alpha": 0.3}),
    ("every-k", {}, family.every_k, {}),
    ("late", {"total_steps": STEPS}, family.late, {"total_steps": STEPS}),
    ("warmup-off", {"warmup_steps": 7}, family.warmup_off, {"warmup_steps": 7}),
    ("bernoulli", {}, family.bernoulli, {}),
    ("ae-sam", {"total_steps": STEPS}, family.ae_sam, {"total_steps": STEPS}),
    ("m-sam", {"micro_batch_size": 5}, family.m_sam, {"m": 5}),
    ("quarter", {}, family.quarter, {}),
    ("k-sam", {}, family.k_sam, {}),
    ("esam-sds", {}, family.esam_sds, {}),
]


def lr_of(name: str) -> Any:
    """A learning rate that falls, where the method looks at it."""
    return (lambda t: 0.05 * (1 - t / (2 * STEPS))) if name == "gsam" else 0.05


def train(name: str, options: dict[str, Any], base: Any, lr: Any) -> tuple[list[torch.Tensor], Any, Any]:
    """Train with flatwise; return the weights after each step, the model and the optimizer."""
    model = network()
    if options.get("model") is True:
        options = {**options, "model": model}
    opt = flatwise.create(name, base.make(model, lr(0) if callable(lr) else lr), **options)
    reduction = "none" if ranks(name) else "mean"

    def loss_fn(batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)

    path = []
    for t, batch in enumerate(batches()):
        if callable(lr):
            opt.param_groups[0]["lr"] = lr(t)
        torch.manual_seed(1000 + t)
        opt.step(loss_fn, batch)
        path.append(flat(model))
    return path, model, opt


def follow(oracle: Any, options: dict[str, Any], rho: float, base: Any, lr: Any) -> tuple[list[torch.Tensor], Any]:
    """Train with the oracle; return the weights after each step, and BatchNorm's statistics."""
    world, w, path = World(lr), flat(network()), []
    mean, var = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    step = oracle(world, rho, **options)
    for t, (x, y) in enumerate(batches()):
        world.begin(t)
        g, seen, rest = step(t, w, x, y, world)
        for weights, samples in seen if isinstance(seen, list) else [(seen, x)]:
            mean, var = world.statistics(weights, samples, mean, var)
        w = base.step(world, t, w, g) - world.lr(t) * rest
        path.append(w)
    return path, (mean, var)


@pytest.mark.parametrize("base", [Momentum, AdamW])
@pytest.mark.parametrize(
    ("name", "options", "oracle", "settings"), ORACLES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_fifty_steps(name: str, options: dict[str, Any], oracle: Any, settings: dict[str, Any], base: Any) -> None:
    lr = lr_of(name)
    rho = options.get("rho", flatwise.variant_info(name).rho)
    path, model, _ = train(name, options, base(), lr)
    expected, (mean, var) = follow(oracle, settings, rho, base(), lr)
    for t, (got, want) in enumerate(zip(path, expected, strict=True)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10, msg=lambda m, t=t: f"step {t}: {m}")
    torch.testing.assert_close(model[1].running_mean, mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(model[1].running_var, var, rtol=0, atol=1e-10)


def test_bsam_for_fifty_steps() -> None:
    model = network()
    opt = flatwise.create("bsam", model.parameters(), train_size=600, lr=0.05, weight_decay=0.01, rho=0.05)
    path = family.bsam(World(), flat(model), batches(), 0.05, lr=0.05, size=600, decay=0.01)
    for t, (batch, expected) in enumerate(zip(batches(), path, strict=True)):
        torch.manual_seed(1000 + t)
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch)
        torch.testing.assert_close(flat(model), expected, rtol=0, atol=1e-10, msg=lambda m, t=t: f"step {t}: {m}")


def test_every_method_has_an_oracle() -> None:
    named = {name for name, *_ in ORACLES} | {"bsam"}
    assert named == set(flatwise.list_variants()), "give the new method an oracle, and a row in ORACLES"


@pytest.mark.parametrize(
    ("name", "options", "oracle", "settings"), ORACLES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_the_comparison_could_fail(name: str, options: dict[str, Any], oracle: Any, settings: dict[str, Any]) -> None:
    """Another radius is seen."""
    rho = options.get("rho", flatwise.variant_info(name).rho)
    path, *_ = train(name, options, Momentum(), lr_of(name))
    expected, _ = follow(oracle, settings, 1.01 * rho, Momentum(), lr_of(name))
    assert (path[-1] - expected[-1]).abs().max() > 1e-7
