"""The ascents of the family in their limits: bit for bit SAM, and what normalisation layers alone cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core_cases import assert_same, snapshot
from tests.family_paths import BASES, FEATURES, Path, base_of, batches, network, reseed, run_fast
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import flatwise


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


# name, options, model, what it is the limit of
LIMITS: dict[str, tuple[str, dict[str, Any], Callable[[], nn.Module], tuple[str, dict[str, Any]]]] = {
    "fsam, sigma=0": ("fsam", {"sigma": 0.0}, network, ("sam", {})),
    "vasso, theta=1": ("vasso", {"theta": 1.0}, network, ("sam", {})),
    "sam-on of norm layers": ("sam-on", {"model": True}, only_norm_layers, ("sam", {})),
    "one ascent step": ("multi-step", {"ascent_steps": 1}, network, ("sam", {})),
    "p=2": ("lp", {"p": 2}, network, ("sam", {})),
    "asam of weights": ("asam", {"scaled": "weights", "model": True}, only_weights, ("asam", {"scaled": "all"})),
    "msam on the first step": ("msam", {}, network, ("sam", {"rho": 0.0})),
}


def assert_equal(got: Path, expected: Path) -> None:
    for ours, theirs in ((got.weights, expected.weights), (got.buffers, expected.buffers)):
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(a, b), f"step {step}: {(a - b).abs().max():.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_is_reached_bit_for_bit(limit: str, base: str, dtype: torch.dtype) -> None:
    name, options, make, (known, known_options) = LIMITS[limit]
    steps = 1 if name == "msam" else 50
    data = [(x.to(dtype), y) for x, y in batches(steps)]
    loop: dict[str, Any] = {"base": base, "data": data, "make": lambda: make().to(dtype)}
    expected = run_fast(known, {"rho": 0.2, **known_options}, **loop)
    assert_equal(run_fast(name, {"rho": 0.2, **options}, **loop), expected)
    if name != "msam":  # and the perturbation was not a trifle
        plain = run_fast(known, {**known_options, "rho": 0.0}, **loop)
        assert not torch.allclose(plain.weights[-1], expected.weights[-1], rtol=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_layerwise_on_one_tensor_is_sam_but_for_rounding(base: str) -> None:
    """It multiplies each gradient by 1 / norm and by rho, SAM by their quotient."""
    layerwise, sam = (run_fast(name, {"rho": 0.2}, base, make=one_tensor) for name in ("layerwise", "sam"))
    layerwise.assert_close(sam, 1e-14)


# SAM-ON


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


def test_the_first_pass_makes_no_gradients_of_weights_that_stay() -> None:
    model, counts = norm_net(), {}
    for name, param in model.named_parameters():
        counts[name] = 0

        def count(grad: Tensor, name: str = name) -> None:
            counts[name] += 1

        param.register_hook(count)
    opt = flatwise.create("sam-on", base_of("sgd", model.parameters()), model=model)
    step_of(model, opt)
    norms = {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert counts == {name: 2 if name in norms else 1 for name in counts}
    assert opt.last.reason == "perturbed"
    assert all(p.requires_grad for p in model.parameters())


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
        model[2].requires_grad_(False)
    plain = copy.deepcopy(model)
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
    step_of(model, opt, 1)  # the last matrix is not zero any more
    assert opt.last.active == (why == "zero")
