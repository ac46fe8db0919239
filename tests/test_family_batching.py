"""The choices of data of the family: which samples, what of ties and single ones, and what wrong losses say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.family_cases import ranks
from tests.family_world import base_of, batches, flat, network, reseed
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise.batching import largest

RHO = 0.2
RANKING = {"k-sam": "top_fraction", "esam-sds": "rising_fraction"}


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
    model, sizes = linear(), list[int]()
    opt = flatwise.create(name, base_of("sgd", model.parameters()), rho=RHO, **options)

    def loss_fn(batch: Any) -> Tensor:
        sizes.append(len(batch[0]))
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    before = flat(model)
    opt.step(loss_fn, (x, y))
    assert opt.last.reason == "perturbed"
    assert not torch.equal(flat(model), before)
    assert flat(model).isfinite().all()
    last, seen = opt.last, list(sizes)
    opt.step(loss_fn, (x[:1], y[:1]))
    assert sizes[len(seen) :] == [1, 1, 1], "a single sample after many"
    return seen, last


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
    before = flat(model)
    with pytest.raises(ValueError, match=rf"loss_fn\(batch\) must return one loss for each of the 12 .* got {found}"):
        opt.step(lambda b: wrong(F.cross_entropy(model(b[0]), b[1], reduction="none")), (x, y))
    assert torch.equal(flat(model), before)
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1], reduction="none"), (x, y))
    assert opt.last.reason == "perturbed"


@pytest.mark.parametrize("name", ["quarter", *RANKING])
def test_statistics_and_random_state_are_those_of_the_pass_that_counts(name: str) -> None:
    """Of a plain pass over the whole batch; of the first quarter, for the statistics of ``quarter``."""
    model, plain, (x, y) = network(), network(), batches(1)[0]
    opt = flatwise.create(name, base_of("sgd", model.parameters()), rho=RHO)
    reseed(0)
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1], reduction="none" if ranks(name) else "mean"), (x, y))
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
