"""SAM-ON: the first pass makes gradients of the normalisation layers alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.core_cases import assert_same, snapshot
from tests.family_world import BASES, FEATURES, base_of, batches, flat, network, reseed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import flatwise


def norm_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, FEATURES, bias=False),
        nn.LayerNorm(FEATURES),
        nn.Tanh(),
        nn.Linear(FEATURES, FEATURES, bias=False),
        nn.BatchNorm1d(FEATURES),
        nn.Tanh(),
        nn.Linear(FEATURES, FEATURES, bias=False),
    ).double()


def step_of(model: nn.Module, opt: Any, step: int = 0) -> None:
    reseed(step)
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batches()[step])


NORMS = {"1.weight", "1.bias", "4.weight", "4.bias"}


def test_the_first_pass_makes_no_gradients_of_weights_that_stay() -> None:
    model, counts = norm_net(), {}
    for name, param in model.named_parameters():
        counts[name] = 0

        def count(grad: Tensor, name: str = name) -> None:
            counts[name] += 1

        param.register_hook(count)
    opt = flatwise.create("sam-on", base_of("sgd", model.parameters()), model=model)
    step_of(model, opt)
    assert counts == {name: 2 if name in NORMS else 1 for name in counts}
    assert opt.last.reason == "perturbed"
    assert all(p.requires_grad for p in model.parameters())


def test_the_first_pass_asks_for_gradients_of_norm_layers_alone() -> None:
    model, asked = norm_net(), []
    opt = flatwise.create("sam-on", base_of("sgd", model.parameters()), model=model)

    def loss_fn(batch: Any) -> Tensor:
        asked.append({name for name, p in model.named_parameters() if p.requires_grad})
        return F.cross_entropy(model(batch[0]), batch[1])

    opt.step(loss_fn, batches(1)[0])
    assert asked == [NORMS, {name for name, _ in model.named_parameters()}]


@pytest.mark.parametrize(("name", "products"), [("sam", 16), ("sam-on", 13)])
def test_the_first_pass_is_cheaper_by_what_it_leaves_out(name: str, products: int) -> None:
    """Three matrices: 3 products forward, 3 for their gradients, 2 for those of their inputs. SAM-ON leaves out 3."""
    model = norm_net()
    opt = flatwise.create(name, base_of("sgd", model.parameters()), model=model)
    with FlopCounterMode(display=False) as counter:
        step_of(model, opt)
    one = 2 * len(batches()[0][0]) * FEATURES * FEATURES
    assert counter.get_total_flops() == products * one


def test_a_broken_first_pass_gives_the_gradients_back() -> None:
    model = norm_net()
    opt = flatwise.create("sam-on", base_of("sgd", model.parameters()), model=model)

    def broken(batch: Any) -> Tensor:
        raise KeyError("broken")

    with pytest.raises(KeyError):
        opt.step(broken, batches()[0])
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("why", ["zero", "frozen"])
def test_where_norm_layers_cannot_move_the_step_is_the_bases(why: str, base: str) -> None:
    """With the last matrix zero no gradient reaches them, but that matrix has one, which the first pass left out."""
    model = network()
    with torch.no_grad():
        model[-1].weight.zero_()
    if why == "frozen":
        model[1].requires_grad_(False)
    plain, start = copy.deepcopy(model), flat(model)
    opt = flatwise.create("sam-on", base_of(base, model.parameters()), model=model)
    step_of(model, opt)
    assert opt.last.reason == {"zero": "zero gradient", "frozen": "no gradient"}[why]
    assert opt.last.passes == {"zero": 2, "frozen": 1}[why]
    assert not opt.last.active
    reference = base_of(base, plain.parameters())
    x, y = batches()[0]
    reseed(0)
    F.cross_entropy(plain(x), y).backward()
    reference.step()
    assert_same(snapshot(model), snapshot(plain))
    assert not torch.equal(flat(model), start)
    step_of(model, opt, 1)  # the last matrix is not zero any more
    assert opt.last.active == (why == "zero")
