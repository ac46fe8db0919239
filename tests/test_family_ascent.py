"""The ascents of the family: what they remember, and what they ask of the base."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.family_paths import Path, run_oracle
from tests.family_table import fast, oracle
from tests.family_world import BASES, DECAY, LR, MOMENTUM, base_of, batches, flat, network, reseed
from torch import Tensor
from torch.nn import functional as F

import flatwise
from flatwise.directions import PreviousGradient
from flatwise.memory import Memory
from oracles import family_ascent as paper


def test_msam_is_its_authors_form_with_weights_displaced_at_rest() -> None:
    rest: list[Any] = []

    def make_rule() -> Any:
        rule, at_rest = paper.msam_shifted(0.3, LR, MOMENTUM, DECAY)

        def recorded(shifted: Tensor, L: Any, base: Any) -> Tensor:
            shifted = rule(shifted, L, base)
            rest.append(at_rest(shifted))
            return shifted

        return recorded

    displaced = run_oracle(make_rule)
    path = fast("msam")
    path.assert_close(Path(rest, displaced.buffers))
    assert (displaced.weights[-1] - path.weights[-1]).norm() == pytest.approx(0.3)


NAN_STEP = 5


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "case", ["vasso", "vasso, 0.4", "fsam", "fsam, script", "stale", "msam", "random", "multi-step", "sam"]
)
def test_a_step_that_is_not_finite_is_as_if_it_never_was(case: str, base: str) -> None:
    data = batches()
    expected = oracle(case, base, data=data, skip=[NAN_STEP])
    x, y = data[NAN_STEP]
    data[NAN_STEP] = (torch.full_like(x, math.nan), y)
    path = fast(case, base, data=data)
    assert torch.equal(path.weights[NAN_STEP], path.weights[NAN_STEP - 1])
    path.assert_close(expected, buffers=False)  # the statistics have seen the batch, as without flatwise


@pytest.mark.parametrize("name", ["msam", "adaptive-msam"])
def test_a_base_without_momentum_is_refused_by_name(name: str) -> None:
    for base in (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adafactor):
        with pytest.raises(ValueError, match=f"momentum .* this {base.__name__} has none"):
            flatwise.create(name, base(network().parameters(), lr=0.1))
    both = [{"params": [torch.nn.Parameter(torch.ones(2))], "momentum": m} for m in (0.9, 0.0)]
    with pytest.raises(ValueError, match="SGD has none"):
        flatwise.create(name, torch.optim.SGD(both, lr=0.1))


def test_an_accelerators_withheld_gradient_is_not_remembered() -> None:
    """There the verdict is a tensor that nobody reads; here it is handed over by hand."""
    weight, memory, direction = torch.nn.Parameter(torch.ones(3)), Memory(), PreviousGradient()
    for verdict, grad, kept in ((False, math.nan, 0.0), (True, 2.0, 2.0), (False, math.inf, 2.0), (True, 3.0, 3.0)):
        weight.grad = torch.full((3,), grad)
        direction.learn([weight], memory, torch.tensor(verdict))
        assert torch.equal(next(direction.offer([weight], memory, None, 0, 0)).grad, torch.full((3,), kept))


def test_a_gradient_that_is_cleared_in_place_is_remembered() -> None:
    """``stale`` keeps a copy: what the user does with ``.grad`` between steps is not its business."""
    ends = []
    for set_to_none in (True, False):
        model = network(dtype=torch.float32)
        opt = flatwise.create("stale", base_of("sgd", model.parameters()))
        for step, (x, y) in enumerate(batches(6, torch.float32)):

            def closure(opt: Any = opt, model: Any = model, x: Any = x, y: Any = y, keep: bool = set_to_none) -> Tensor:
                opt.zero_grad(set_to_none=keep)
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            if not set_to_none and step:
                opt.zero_grad(set_to_none=False)
            reseed(step)
            opt.step(closure)
        ends.append(flat(model))
    assert torch.equal(*ends)
