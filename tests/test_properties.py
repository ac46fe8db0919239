"""What holds for every choice: the forms of call agree, and weights come back, whatever the shapes and dtypes."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from flatwise import SAM
from oracles.perturbation import norm as exact_norm

INF = math.inf
STEPS = 20

# The forms of call


class Net(torch.nn.Module):
    """Everything that a second pass could get wrong: statistics, random masks, shared scales."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def by_closure(opt: SAM, model: Net, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    opt.step(closure)


def by_loss_fn(opt: SAM, model: Net, x: Tensor, y: Tensor) -> None:
    opt.step(lambda batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]), (x, y))


def by_two_calls(opt: SAM, model: Net, x: Tensor, y: Tensor) -> None:
    torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.first_step(zero_grad=True)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.second_step(zero_grad=True)


def by_block(opt: SAM, model: Net, x: Tensor, y: Tensor) -> None:
    opt.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    with opt.perturbed():
        torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.base_optimizer.step()


def by_perturb(opt: SAM, model: Net, x: Tensor, y: Tensor) -> None:
    opt.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    if opt.perturb():
        torch.nn.functional.cross_entropy(model(x), y).backward()
        opt.restore()
    opt.step()


FORMS = {"loss_fn": by_loss_fn, "two calls": by_two_calls, "block": by_block, "perturb": by_perturb}
BASES: dict[str, Any] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sam": {},
    "adaptive": {"adaptive": True, "eta": 0.01},
    "p=1": {"p": 1},
    "p=1.5": {"p": 1.5},
    "p=3, adaptive": {"p": 3, "adaptive": True},
    "p=inf": {"p": INF, "rho": 0.01},
    "every": {"every": 3},
    "no radius": {"rho": 0.0},
    "fresh masks": {"fresh_masks": True},
}


def trained(form: Any, base: str, options: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Net()
    opt = SAM(BASES[base](model.parameters()), **{"rho": 0.1, **options})
    for _ in range(STEPS):
        x, y = torch.randn(12, 6), torch.randint(3, (12,))
        form(opt, model, x, y)
    return {**model.state_dict(), "random state": torch.get_rng_state()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("base", list(BASES))
def test_the_forms_of_call_agree_bit_for_bit(base: str, options: dict[str, Any]) -> None:
    expected = trained(by_closure, base, options)
    for name, form in FORMS.items():
        got = trained(form, base, options)
        different = [key for key in expected if not torch.equal(got[key], expected[key])]
        assert not different, f"{name} differs from the closure in {different}"


def test_the_options_make_a_difference() -> None:
    ends = {name: trained(by_closure, "SGD", options)["layers.0.weight"] for name, options in OPTIONS.items()}
    names = list(ends)
    same = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if torch.equal(ends[a], ends[b])]
    assert not same


# Any shapes, dtypes, groups and sets of gradients

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
PARAMS = st.lists(st.tuples(SHAPES, DTYPES, st.sampled_from(["some", "some", "zero", "none"])), min_size=1, max_size=4)
GROUPS = st.lists(st.tuples(PARAMS, st.sampled_from([0.0, 0.05, 0.5, 2.0])), min_size=1, max_size=3)
ORDERS = st.sampled_from([1, 1.3, 1.5, 2, 3, 7, INF])

quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def build(groups: Any, seed: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    made = []
    for members, rho in groups:
        params = []
        for shape, dtype, kind in members:
            w = torch.nn.Parameter(torch.randn(shape).to(dtype))
            if kind != "none":
                w.grad = (torch.randn(shape) * (kind == "some")).to(dtype)
            params.append(w)
        made.append({"params": params, "rho": rho})
    return made


@quick
@given(groups=GROUPS, p=ORDERS, adaptive=st.booleans(), seed=st.integers(0, 1000))
def test_weights_move_by_the_radius_and_come_back(groups: Any, p: float, adaptive: bool, seed: int) -> None:
    made = build(groups, seed)
    everything = [(w, g["rho"]) for g in made for w in g["params"]]
    starts = [(w.detach().clone(), w.data_ptr(), None if w.grad is None else w.grad.clone()) for w, _ in everything]
    opt = SAM(torch.optim.SGD(made, lr=0.1), p=p, adaptive=adaptive)
    moved = opt.perturb()

    parts, expected, low = [], [], False
    for (w, rho), (start, _, grad) in zip(everything, starts, strict=True):
        if rho == 0 or grad is None:
            assert torch.equal(w.detach(), start)
            continue
        T = start.double().abs() if adaptive else torch.ones_like(start.double())
        eps = w.detach().double() - start.double()
        parts.append(torch.where(T > 0, eps / T / rho, 0).flatten())
        expected.append((T * grad.double()).flatten())
        low |= w.dtype in (torch.float16, torch.bfloat16)
    climbs = bool(parts) and bool(torch.cat(expected).any())
    if moved and not low:
        assert float(exact_norm(torch.cat(parts), p)) == pytest.approx(1.0, rel=1e-3)
    if not low:
        assert moved == climbs
    assert moved or not climbs or low

    opt.restore()
    for (w, _), (start, address, grad) in zip(everything, starts, strict=True):
        assert torch.equal(w.detach(), start)
        assert w.data_ptr() == address
        if not moved:
            assert grad is None or not grad.numel() or torch.equal(w.grad, grad)


@quick
@given(groups=GROUPS, p=ORDERS, steps=st.integers(1, 3), m=st.sampled_from([None, 2]), seed=st.integers(0, 1000))
def test_a_step_with_a_base_that_stands_still_changes_nothing(
    groups: Any, p: float, steps: int, m: int | None, seed: int
) -> None:
    made = build(groups, seed)
    params = [w for g in made for w in g["params"]]
    used = [
        w for w, (*_, kind) in zip(params, [member for ms, _ in groups for member in ms], strict=True) if kind != "none"
    ]
    starts = [(w.detach().clone(), w.data_ptr()) for w in params]
    opt = SAM(torch.optim.SGD(made, lr=0.0), p=p, ascent_steps=steps, micro_batch_size=m)

    def loss_fn(batch: Tensor) -> Tensor:
        return sum(((w.float() * batch.mean()).sin() + w.float() ** 2).sum() for w in used) + 0 * batch.sum()

    if not used:
        with pytest.raises(RuntimeError):
            opt.step(loss_fn, torch.tensor([0.5, 1.0, 2.0]))
    else:
        opt.step(loss_fn, torch.tensor([0.5, 1.0, 2.0]))
    for w, (start, address) in zip(params, starts, strict=True):
        assert torch.equal(w.detach(), start)
        assert w.data_ptr() == address


@quick
@given(groups=GROUPS, p=ORDERS, bad=st.sampled_from([INF, -INF, math.nan]), seed=st.integers(0, 1000))
def test_a_gradient_that_is_not_finite_moves_nothing(groups: Any, p: float, bad: float, seed: int) -> None:
    made = build(groups, seed)
    target = next((w for g in made for w in g["params"] if g["rho"] > 0 and w.grad is not None and w.numel()), None)
    if target is None:
        return
    target.grad.view(-1)[0] = bad
    starts = [w.detach().clone() for g in made for w in g["params"]]
    opt = SAM(torch.optim.SGD(made, lr=0.1), p=p)
    assert not opt.perturb()
    assert opt.last.reason == "non-finite gradient"
    opt.step()
    for w, start in zip([w for g in made for w in g["params"]], starts, strict=True):
        assert torch.equal(w.detach(), start)
