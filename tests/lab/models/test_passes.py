"""Shake-Shake and ShakeDrop in a sharpness-aware step: one mixture for both passes, a true gradient in the first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.start import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise.lab.models import build_model, shake

torch.set_num_threads(1)

NAMES = ["shakeshake-8-2x4d", "pyramidnet-11-8-shakedrop"]
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6)


def network(name: str) -> nn.Module:
    return build_model(name, (3, 8, 8), 10, seed=0)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loss_of(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


class Watch:
    """Notes what the layers draw, and the weights and gradients of every pass."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.draws: list[tuple[Tensor, ...]] = []
        self.passes: list[tuple[list[tuple[Tensor, ...]], dict[str, Tensor], dict[str, Tensor]]] = []
        draw = shake.draws

        def note(count: int, like: Tensor) -> tuple[Tensor, ...]:
            self.draws.append(numbers := draw(count, like))
            return numbers

        monkeypatch.setattr(shake, "draws", note)

    def closure(self, opt: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            opt.zero_grad()
            self.draws = []
            loss = loss_of(self.model)((X, Y))
            loss.backward()
            params = dict(self.model.named_parameters())
            weights = {name: p.detach().clone() for name, p in params.items()}
            grads = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
            self.passes.append((self.draws, weights, grads))
            return loss

        return run


def oracle(
    name: str,
    weights: dict[str, Tensor],
    draws: list[tuple[Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
    *,
    true: bool,
) -> dict[str, Tensor]:
    """Differentiate a network whose mixtures have the coefficients given, by plain operations.

    Where forward and backward differ, a hook on each branch exchanges the coefficients of its gradient.
    """
    left = iter(draws)

    def scaled(branch: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        output = forward * branch.clone()
        if true:
            return output
        leaf = branch * 1
        output = forward.detach() * leaf
        if output.requires_grad:
            leaf.register_hook(lambda grad: torch.where(forward == 0, 0, grad / forward) * backward)
        return output

    def mix(a: Tensor, b: Tensor) -> Tensor:
        alpha, beta = next(left)
        return scaled(a, alpha, beta) + scaled(b, 1 - alpha, 1 - beta)

    def drop(branch: Tensor, survival: float) -> Tensor:
        chance, alpha, beta = next(left)
        b = (chance < survival).float()
        alpha = 2 * alpha - 1
        return scaled(branch, b + alpha - b * alpha, b + beta - b * beta)

    with monkeypatch.context() as patch:
        patch.setattr(shake, "shake_shake", mix)
        patch.setattr(shake, "shake_drop", drop)
        model = network(name)
        model.load_state_dict(weights, strict=False)
        F.cross_entropy(model(X), Y).backward()
    return {label: p.grad for label, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_both_passes_mix_alike_forward_and_the_first_backward_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(name)
    opt = flatwise.SAM(sgd(model), rho=0.05)
    watch = Watch(model, monkeypatch)
    torch.manual_seed(1)
    opt.step(watch.closure(opt))
    (first_draws, w, g), (second_draws, perturbed, g2) = watch.passes
    assert len(first_draws) == 3
    for mine, its in zip(first_draws, second_draws, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))
    assert any(not torch.equal(w[n], perturbed[n]) for n in w)
    close = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(g, oracle(name, w, first_draws, monkeypatch, true=True), **close)
    torch.testing.assert_close(g2, oracle(name, perturbed, second_draws, monkeypatch, true=False), **close)
    other = oracle(name, perturbed, second_draws, monkeypatch, true=True)
    assert any(not torch.allclose(g2[n], other[n], rtol=1e-2, atol=1e-4) for n in g2)


@pytest.mark.parametrize("name", NAMES)
def test_plain_training_has_the_layers_own_backward_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(name)
    opt = sgd(model)
    watch = Watch(model, monkeypatch)
    opt.step(watch.closure(opt))  # type: ignore[arg-type]
    ((draws, w, g),) = watch.passes
    torch.testing.assert_close(g, oracle(name, w, draws, monkeypatch, true=False), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_random_state_after_a_step_is_that_of_one_plain_pass(name: str) -> None:
    states = []
    for make in (sgd, lambda model: flatwise.SAM(sgd(model), rho=0.05)):
        model = network(name)
        opt: Any = make(model)
        torch.manual_seed(1)

        def closure(model: nn.Module = model, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            loss = loss_of(model)((X, Y))
            loss.backward()
            return loss

        opt.step(closure)
        states.append((torch.get_rng_state(), torch.rand(3)))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


@pytest.mark.parametrize("name", NAMES)
def test_a_radius_of_zero_is_the_base_to_the_bit(name: str) -> None:
    ends = []
    for make in (sgd, lambda model: flatwise.SAM(sgd(model), rho=0.0)):
        model = network(name)
        opt: Any = make(model)
        torch.manual_seed(1)
        for _ in range(3):

            def closure(model: nn.Module = model, opt: Any = opt) -> Tensor:
                opt.zero_grad()
                loss = loss_of(model)((X, Y))
                loss.backward()
                return loss

            opt.step(closure)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_fresh_masks_mix_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(NAMES[0])
    opt = flatwise.SAM(sgd(model), rho=0.05, fresh_masks=True)
    watch = Watch(model, monkeypatch)
    opt.step(watch.closure(opt))
    assert not torch.equal(watch.passes[0][0][0][0], watch.passes[1][0][0][0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_both_passes_mix_alike(name: str, backend: str) -> None:
    torch.compiler.reset()
    model = network(name)
    compiled = torch.compile(model, backend=backend)
    opt = flatwise.SAM(sgd(model), rho=1e-30, model=model)  # so small that w + eps is w
    outputs = []
    grads = []

    def closure() -> Tensor:
        opt.zero_grad()
        outputs.append(output := compiled(X))
        loss = F.cross_entropy(output, Y)
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        return loss

    torch.manual_seed(1)
    opt.step(closure)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(grads[0], grads[1], rtol=1e-2, atol=1e-4)
    if backend != "inductor":  # which draws numbers of its own
        plain = network(name)
        torch.manual_seed(1)
        torch.testing.assert_close(plain(X), outputs[0], rtol=1e-5, atol=1e-5)
        for wanted, found in ((True, grads[0]), (False, grads[1])):
            plain = network(name)
            torch.manual_seed(1)
            with flatwise.true_gradients() if wanted else torch.enable_grad():
                F.cross_entropy(plain(X), Y).backward()
            expected = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


def _train_on_rank(rank: int, name: str) -> dict[str, Tensor]:
    model = network(name)
    ddp = nn.parallel.DistributedDataParallel(model)
    opt = flatwise.SAM(sgd(model), rho=0.05, model=ddp)
    torch.manual_seed(rank)
    half = slice(3 * rank, 3 * rank + 3)
    for _ in range(2):
        opt.step(loss_of(ddp), (X[half], Y[half]))
    return {label: p.detach() for label, p in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_in_two_processes_the_replicas_stay_equal(name: str, tmp_path: Path) -> None:
    first, second = on_ranks(_train_on_rank, tmp_path, name)
    assert all(torch.equal(first[key], second[key]) for key in first)
    start = dict(network(name).named_parameters())
    assert not torch.equal(first["head.weight"], start["head.weight"])
