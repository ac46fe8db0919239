"""Several closures are one batch, and clipping acts on what the base optimizer sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(12) % 3
SPLITS = ((0, 4), (4, 8), (8, 12))


def network(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def part_of(model: nn.Module, start: int, stop: int, before: Callable[[], None] = lambda: None) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        before()
        loss = F.cross_entropy(model(X[start:stop]), Y[start:stop]) * ((stop - start) / len(X))
        loss.backward()
        return loss

    return closure


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def make(name: str, model: nn.Module, **options: Any) -> Any:
    return flatwise.create(name, sgd(model), rho=0.3, **({"model": model} if name == "functional" else {}), **options)


@pytest.mark.supports("plain loop", "gradient accumulation")
@pytest.mark.parametrize("name", ["sam", "asam", "multi-step", "msam", "stale", "pgn", "gsam", "looksam", "functional"])
@pytest.mark.parametrize("splits", [SPLITS, ((0, 7), (7, 12)), ((0, 12),)], ids=str)
def test_one_perturbation_for_all_is_that_of_the_whole_batch(name: str, splits: Any) -> None:
    model, whole = network(), network()
    opt, reference = make(name, model), make(name, whole)
    for _ in range(6):
        loss = opt.step([part_of(model, *split) for split in splits])
        expected = reference.step(lambda b: F.cross_entropy(whole(b[0]), b[1]), (X, Y))
        assert float(loss) == pytest.approx(float(expected), abs=1e-12)
        assert opt.last.perturbed_loss == pytest.approx(reference.last.perturbed_loss, abs=1e-12, nan_ok=True)
        assert opt.last.passes == reference.last.passes
    assert torch.allclose(weights(model), weights(whole), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sam", "asam", "msam", "pgn", "stale"])
def test_one_perturbation_each_is_m_sharpness(name: str) -> None:
    model, whole = network(norm=True), network(norm=True)
    opt, reference = make(name, model), make(name, whole, micro_batch_size=4)
    for _ in range(6):
        opt.step([part_of(model, *split) for split in SPLITS], each=True)
        reference.step(lambda b: F.cross_entropy(whole(b[0]), b[1]), (X, Y))
    assert torch.allclose(weights(model), weights(whole), rtol=0, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(model.buffers(), whole.buffers(), strict=True))
    assert opt.last.passes == pytest.approx(reference.last.passes)
    assert opt.last.loss == pytest.approx(reference.last.loss, abs=1e-12, nan_ok=True)
    one = make(name, network(norm=True))
    assert not torch.allclose(weights(model), weights(network(norm=True)))
    del one


def test_statistics_are_those_of_one_pass_over_each_micro_batch() -> None:
    model, plain = network(norm=True), network(norm=True)
    make("sam", model).step([part_of(model, *split) for split in SPLITS])
    for start, stop in SPLITS:
        plain(X[start:stop])
    assert all(map(torch.equal, model.buffers(), plain.buffers()))


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("name", ["sam", "msam"])
def test_a_closure_that_clears_is_named(name: str, to_none: bool) -> None:
    model = network()
    opt = make(name, model)
    opt.step([part_of(model, *SPLITS[0])])
    before = weights(model)
    clear = lambda: opt.zero_grad(set_to_none=to_none)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"cleared the gradients of those before it.*\n.*zero_grad|Leave zero_grad"):
        opt.step([part_of(model, *split, clear) for split in SPLITS])
    assert torch.equal(weights(model), before)


def test_what_is_no_list_of_closures_is_named() -> None:
    model = network()
    opt = make("sam", model)
    with pytest.raises(TypeError, match="a list of at least one closure"):
        opt.step([])
    with pytest.raises(TypeError, match="a list of at least one closure"):
        opt.step([1.0])
    with pytest.raises(TypeError, match="several closures make a batch"):
        opt.step(part_of(model, 0, 4), each=True)
    with pytest.raises(ValueError, match="keeps one part for the whole batch"):
        make("looksam", model).step([part_of(model, 0, 4)], each=True)


def test_accumulation_with_a_scaler() -> None:
    model, plain = network().float(), network().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def part(net: nn.Module, split: tuple[int, int], scaled: bool) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = F.cross_entropy(net(X[slice(*split)].float()), Y[slice(*split)]) / 3
            (scaler.scale(loss) if scaled else loss).backward()
            return loss

        return closure

    for each in (False, True):
        make("sam", model, grad_scaler=scaler).step([part(model, s, True) for s in SPLITS], each=each)
        scaler.update()
        make("sam", plain).step([part(plain, s, False) for s in SPLITS], each=each)
    assert torch.equal(weights(model), weights(plain))


# Clipping


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


@pytest.mark.supports("plain loop", "clipping of the last gradient")
@pytest.mark.parametrize("largest", [0.01, 0.1, 100.0])
def test_the_last_gradient_is_clipped_and_the_first_is_not(largest: float) -> None:
    model, hand = network(), network()
    base = sgd(hand)
    opt = flatwise.SAM(sgd(model), 0.3, max_grad_norm=largest)
    for _ in range(4):
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (X, Y))
        first = torch.autograd.grad(loss_of(hand), list(hand.parameters()))
        norm = torch.cat([g.flatten() for g in first]).norm()
        kept = [p.detach().clone() for p in hand.parameters()]
        with torch.no_grad():
            for p, g in zip(hand.parameters(), first, strict=True):
                p.add_(0.3 * g / norm)
        base.zero_grad()
        loss_of(hand).backward()
        with torch.no_grad():
            for p, w in zip(hand.parameters(), kept, strict=True):
                p.copy_(w)
        total = torch.nn.utils.clip_grad_norm_(hand.parameters(), largest)
        base.step()
        assert opt.last.gradient_norm == pytest.approx(float(norm), rel=1e-12)
        assert opt.last.update_norm == pytest.approx(float(total), rel=1e-12)
    assert torch.allclose(weights(model), weights(hand), rtol=0, atol=1e-13)


def by_two_calls(opt: Any, model: nn.Module) -> None:
    opt.zero_grad()
    loss_of(model).backward()
    opt.first_step()
    loss_of(model).backward()
    opt.second_step()


def by_framework(opt: Any, model: nn.Module) -> None:
    opt.zero_grad()
    loss_of(model).backward()
    if opt.perturb():
        loss_of(model).backward()
    opt.restore()
    opt.step()


def by_batch(opt: Any, model: nn.Module) -> None:
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (X, Y))


@pytest.mark.parametrize("form", [by_two_calls, by_framework])
def test_every_form_clips(form: Callable[[Any, nn.Module], None]) -> None:
    model, other = network(), network()
    opt, reference = (flatwise.SAM(sgd(m), 0.3, max_grad_norm=0.05) for m in (model, other))
    for _ in range(3):
        form(opt, model)
        by_batch(reference, other)
    assert torch.equal(weights(model), weights(other))
    assert opt.last.update_norm == reference.last.update_norm > 0.05


def test_the_norm_is_over_all_groups_and_survives_a_copy() -> None:
    import copy

    model = network()
    groups = [{"params": [p]} for p in model.parameters()]
    opt = flatwise.SAM(torch.optim.SGD(groups, lr=1.0), 0.0, max_grad_norm=0.01)
    before = weights(model)
    by_batch(opt, model)
    assert float((weights(model) - before).norm()) == pytest.approx(0.01, rel=1e-3)
    assert copy.deepcopy(opt)._max_grad_norm == 0.01
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_grad_norm must be > 0"):
            flatwise.SAM(sgd(model), 0.1, max_grad_norm=wrong)


def test_a_gradient_that_is_not_finite_is_withheld_before_it_is_clipped() -> None:
    model = network()
    opt, before = flatwise.SAM(sgd(model), 0.3, max_grad_norm=1.0), weights(model)
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]) * float("inf"), (X, Y))
    assert torch.equal(weights(model), before)
    assert not opt.last.updated
