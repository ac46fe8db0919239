"""Choices of data of the family beside their oracles, and what they do with ties, single samples and wrong losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.family_paths import BASES, SAMPLES, Path, Problem, base_of, batches, flat, network, reseed, run_fast
from tests.family_paths import run_oracle as run
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise.batching import largest
from oracles import family_descent as paper

RHO = 0.2


def no_dropout() -> nn.Sequential:
    """For micro-batches, each of which draws masks of its own: ``test_family_oracles`` follows those."""
    model = network()
    model[5].p = 0.0
    return model


def begin_part(problem: Problem) -> None:
    """BatchNorm sees every part once, at w."""
    problem._counted = False


def m_sam(rho: float, m: int) -> Callable[..., Tensor]:
    rule = paper.m_sam(rho, m, begin_part)

    def without_the_counting_pass(w: Tensor, problem: Problem, base: Any) -> Tensor:
        problem._counted = True  # the oracle asks for the number of samples first
        return rule(w, problem, base)

    return without_the_counting_pass


# name -> method of flatwise, its options, the oracle, the oracle's options, the network.
CASES: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any], Any]] = {
    "m-sam": ("m-sam", {"micro_batch_size": 4}, m_sam, {"m": 4}, no_dropout),
    "m-sam, a smaller last part": ("m-sam", {"micro_batch_size": 5}, m_sam, {"m": 5}, no_dropout),
    "quarter": ("quarter", {}, paper.sub_batch, {"count": 3}, network),
    "quarter, 0.6": ("quarter", {"ascent_fraction": 0.6}, paper.sub_batch, {"count": 8}, network),
    "k-sam": ("k-sam", {}, paper.k_sam, {"count": 6}, network),
    "k-sam, 0.3": ("k-sam", {"top_fraction": 0.3}, paper.k_sam, {"count": 4}, network),
    "esam-sds": ("esam-sds", {}, paper.esam_sds, {"count": 6}, network),
    "esam-sds, 0.7": ("esam-sds", {"rising_fraction": 0.7}, paper.esam_sds, {"count": 9}, network),
}


def reduction(name: str) -> str:
    return "none" if name in ("k-sam", "esam-sds") else "mean"


def oracle(case: str, base: str = "sgd", factor: float = 1.0, **loop: Any) -> Path:
    _, _, method, settings, make = CASES[case]
    return run(lambda: method(factor * RHO, **settings), base, make=make, **loop)


def fast(case: str, base: str = "sgd", **loop: Any) -> Path:
    name, options, _, _, make = CASES[case]
    return run_fast(name, {"rho": RHO, **options}, base, make=make, reduction=reduction(name), **loop)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_follow_the_equations(case: str, base: str) -> None:
    fast(case, base).assert_close(oracle(case, base))


@pytest.mark.parametrize("case", CASES)
def test_the_comparison_sees_a_radius_that_is_off_by_a_thousandth(case: str) -> None:
    with pytest.raises(AssertionError, match="weights of step"):
        fast(case).assert_close(oracle(case, factor=1.001))


RANKING = {"k-sam": "top_fraction", "esam-sds": "rising_fraction"}
LIMITS: dict[str, dict[str, Any]] = {
    "m-sam": {"micro_batch_size": SAMPLES},
    "quarter": {"ascent_fraction": 1.0},
    "k-sam": {"top_fraction": 1.0},
    "esam-sds": {"rising_fraction": 1.0},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", LIMITS)
def test_on_all_samples_it_is_sam_bit_for_bit(name: str, base: str) -> None:
    ours, sam = run_fast(name, {"rho": RHO, **LIMITS[name]}, base), run_fast("sam", {"rho": RHO}, base)
    assert all(map(torch.equal, ours.weights, sam.weights))
    assert all(map(torch.equal, ours.buffers, sam.buffers))


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0, math.inf, math.nan]), min_size=1, max_size=40), st.data())
def test_the_number_chosen_is_exact_whatever_ties(values: list[float], data: st.DataObject) -> None:
    tenths = data.draw(st.integers(1, 10))
    index = largest(torch.tensor(values), tenths / 10).tolist()
    assert len(index) == -(-len(values) * tenths // 10) >= 1
    assert index == sorted(set(index))
    ranked = [(math.isnan(value), value if value == value else 0.0) for value in values]
    chosen, rest = [ranked[i] for i in index], [i for i in range(len(values)) if i not in index]
    for i in rest:
        assert ranked[i] <= min(chosen)
        assert all(j < i for j in index if ranked[j] == ranked[i]), "of equal ones the first"


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 3).double()


def sizes_seen(name: str, options: dict[str, Any], x: Tensor, y: Tensor) -> tuple[list[int], Any]:
    """How many samples each call of the loss function got."""
    model, sizes = linear(), []
    opt = flatwise.create(name, base_of("sgd", model.parameters()), rho=RHO, **options)

    def loss_fn(batch: Any) -> Tensor:
        sizes.append(len(batch[0]))
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    before = flat(model.parameters())
    opt.step(loss_fn, (x, y))
    assert opt.last.reason == "perturbed"
    assert not torch.equal(flat(model.parameters()), before)
    assert flat(model.parameters()).isfinite().all()
    return sizes, opt.last


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.99])
def test_where_all_losses_are_equal_there_is_still_a_batch(n: int, fraction: float) -> None:
    same, chosen = (torch.ones(n, 6).double(), torch.zeros(n, dtype=torch.long)), math.ceil(fraction * n)
    sizes, last = sizes_seen("k-sam", {"top_fraction": fraction}, *same)
    assert sizes == [n, chosen, chosen]
    assert last.closure_calls == 3
    assert last.passes == pytest.approx(2 * fraction)
    sizes, last = sizes_seen("esam-sds", {"rising_fraction": fraction}, *same)
    assert sizes == [n, n, chosen]
    assert last.closure_calls == 3
    assert last.passes == pytest.approx(1 + fraction)


def test_the_samples_chosen_are_those_named() -> None:
    """ESAM's second pass wants the samples whose loss rises, not those whose loss is high."""
    weight, order = nn.Parameter(torch.zeros(1)), torch.tensor([3.0, 0.0, 4.0, 1.0, 2.0])
    slopes = torch.tensor([0.0, 5.0, 1.0, 2.0, 0.5])
    for name, chosen in (("k-sam", [0, 2]), ("esam-sds", [1, 3])):
        seen: list[list[int]] = []
        opt = flatwise.create(name, torch.optim.SGD([weight], lr=0.0), **{RANKING[name]: 0.4})

        def loss_fn(index: Tensor, seen: list[list[int]] = seen) -> Tensor:
            seen.append(index.tolist())
            return order[index] + slopes[index] * weight

        opt.step(loss_fn, torch.arange(5))
        assert seen[-1] == chosen
        assert seen[0] == list(range(5))


def scalar(loss: Tensor) -> Any:
    return loss.mean()


def column(loss: Tensor) -> Any:
    return loss[:, None]


def number(loss: Tensor) -> Any:
    return 0.5


@pytest.mark.parametrize(("wrong", "found"), [(scalar, r"shape \(\)"), (column, r"shape \(12, 1\)"), (number, "float")])
@pytest.mark.parametrize("name", RANKING)
def test_a_loss_that_is_not_one_for_each_sample_is_named(name: str, wrong: Any, found: str) -> None:
    model, (x, y) = network(), batches(1)[0]
    opt = flatwise.create(name, base_of("sgd", model.parameters()))
    before = flat(model.parameters())
    with pytest.raises(ValueError, match=rf"loss_fn\(batch\) must return one loss for each of the 12 .* got {found}"):
        opt.step(lambda b: wrong(F.cross_entropy(model(b[0]), b[1], reduction="none")), (x, y))
    assert torch.equal(flat(model.parameters()), before)
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1], reduction="none"), (x, y))
    assert opt.last.reason == "perturbed"


@pytest.mark.parametrize("name", ["quarter", *RANKING])
def test_statistics_and_random_state_are_those_of_the_pass_that_counts(name: str) -> None:
    """Of a plain pass over the whole batch; of the first quarter, for the statistics of ``quarter``."""
    model, plain, (x, y) = network(), network(), batches(1)[0]
    opt = flatwise.create(name, base_of("sgd", model.parameters()), rho=RHO)
    reseed(0)
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1], reduction=reduction(name)), (x, y))
    after = torch.get_rng_state()
    reseed(0)
    plain(x)
    assert torch.equal(after, torch.get_rng_state())
    if name == "quarter":
        plain = network()
        plain(x[:3])
    for (key, got), want in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, want), key


@pytest.mark.parametrize("name", RANKING)
def test_the_loss_that_is_returned_is_that_of_the_whole_batch(name: str) -> None:
    model, plain, (x, y) = network(), network(), batches(1)[0]
    opt = flatwise.create(name, base_of("sgd", model.parameters()), rho=RHO)
    reseed(0)
    loss = opt.step(lambda b: F.cross_entropy(model(b[0]), b[1], reduction="none"), (x, y))
    reseed(0)
    assert float(loss) == pytest.approx(F.cross_entropy(plain(x), y).item(), abs=1e-12)
    assert math.isfinite(opt.last.loss)
    assert opt.last.perturbed_loss > opt.last.loss
