"""Mixing: the papers' formulas, one draw for each image, and a gradient that is true where it must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

import flatwise
from flatwise.lab.models import build_model
from flatwise.lab.models.shake import ShakeDrop, ShakeShake, shake_drop, shake_shake, survival

torch.set_num_threads(1)

P = 0.6


def drawn(count: int, batch: int) -> list[Tensor]:
    """Return what the layers draw after ``torch.manual_seed(0)``, in float64."""
    torch.manual_seed(0)
    return list(torch.rand(count, batch, 1, 1, 1).double())


def shaken(a: Tensor, b: Tensor) -> Tensor:
    torch.manual_seed(0)
    return shake_shake(a, b)


def dropped(a: Tensor, b: Tensor) -> Tensor:
    torch.manual_seed(0)
    return shake_drop(a, P) + 0 * b


def shaken_oracle(a: Tensor, b: Tensor, *, backward: bool) -> Tensor:
    """Gastaldi (2017), eq. 2: x + alpha F(x, W1) + (1 - alpha) F(x, W2), with beta for alpha in the backward pass."""
    alpha, beta = drawn(2, len(a))
    return torch.stack(
        [(beta if backward else alpha)[i] * a[i] + (1 - (beta if backward else alpha)[i]) * b[i] for i in range(len(a))]
    )


def dropped_oracle(a: Tensor, b: Tensor, *, backward: bool) -> Tensor:
    """Yamada et al. (2018), eq. 6: (b + alpha - b alpha) F(x) forward, (b + beta - b beta) F(x) backward."""
    chance, alpha, beta = drawn(3, len(a))
    bernoulli = (chance < P).double()
    alpha = -1 + 2 * alpha
    other = beta if backward else alpha
    return (bernoulli + other - bernoulli * other) * a + 0 * b


Mix = Callable[[Tensor, Tensor], Tensor]
CASES = [(shaken, shaken_oracle), (dropped, dropped_oracle)]


def branches() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 6, 3, 2, 2, generator=generator, dtype=torch.float64).requires_grad_().unbind()
    return a.detach().requires_grad_(), b.detach().requires_grad_()


@pytest.mark.parametrize(("mix", "oracle"), CASES)
def test_forward_by_one_draw_and_backward_by_another(mix: Mix, oracle: Callable[..., Tensor]) -> None:
    a, b = branches()
    weights = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    mixed = mix(a, b)
    torch.testing.assert_close(mixed, oracle(a, b, backward=False), rtol=1e-15, atol=1e-15)
    gradients = torch.autograd.grad((mixed * weights).sum(), (a, b))
    expected = torch.autograd.grad((oracle(a, b, backward=True) * weights).sum(), (a, b))
    true = torch.autograd.grad((oracle(a, b, backward=False) * weights).sum(), (a, b))
    torch.testing.assert_close(gradients, expected, rtol=1e-14, atol=1e-14)
    assert not torch.allclose(gradients[0], true[0])


@pytest.mark.parametrize(("mix", "oracle"), CASES)
def test_a_true_gradient_is_the_derivative_of_the_same_output(mix: Mix, oracle: Callable[..., Tensor]) -> None:
    a, b = branches()
    plain = mix(a, b)
    state = torch.get_rng_state()
    with flatwise.true_gradients():
        assert torch.equal(mix(a, b), plain)
        assert torch.equal(torch.get_rng_state(), state)  # and as many numbers are drawn
        assert torch.autograd.gradcheck(mix, (a, b))
        assert torch.autograd.gradgradcheck(mix, (a, b))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(mix, (a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_the_mixture_to_the_bit_in_every_precision(dtype: torch.dtype) -> None:
    a, b = (t.detach().to(dtype) for t in branches())
    torch.manual_seed(0)
    alpha = torch.rand(2, 6, 1, 1, 1)[0].to(dtype)
    expected = alpha * a + (1 - alpha) * b
    assert torch.equal(shaken(a.requires_grad_(), b.requires_grad_()), expected)
    assert expected.dtype is dtype


def test_each_image_has_draws_of_its_own_and_of_the_papers_ranges() -> None:
    torch.manual_seed(0)
    ones = torch.ones(4000, 2, 3, 3)
    alpha = shake_shake(ones, 0 * ones)
    factor = shake_drop(ones, P)
    for coefficients in (alpha, factor):
        assert (coefficients == coefficients[:, :1, :1, :1]).all()
    alpha, factor = alpha[:, 0, 0, 0], factor[:, 0, 0, 0]
    assert alpha.unique().numel() > 3900
    assert 0 <= alpha.min() < 0.01
    assert 0.99 < alpha.max() < 1
    kept = factor == 1
    assert kept.float().mean().item() == pytest.approx(P, abs=5 * (P * (1 - P) / 4000) ** 0.5)
    assert -1 <= factor.min() < -0.99
    assert factor[~kept].mean().item() == pytest.approx(0, abs=5 / (3 * 1600) ** 0.5)
    assert factor[~kept].std().item() == pytest.approx(1 / 3**0.5, rel=0.05)


def test_the_backward_draws_of_shake_drop_are_positive_where_alpha_may_not_be() -> None:
    torch.manual_seed(0)
    ones = torch.ones(4000, 1, 1, 1, requires_grad=True)
    factor = shake_drop(ones, P)
    (beta,) = torch.autograd.grad(factor.sum(), ones)
    assert torch.equal(beta == 1, factor == 1)  # the same b
    rest = beta[factor != 1]
    assert 0 <= rest.min() < 0.01
    assert rest.mean().item() == pytest.approx(0.5, abs=0.05)


def test_evaluation_uses_the_expectations() -> None:
    a, b = torch.randn(2, 5, 3, 2, 2).unbind()
    assert torch.equal(ShakeShake().eval()(a, b), (a + b) / 2)
    drop = ShakeDrop(P).eval()
    assert torch.equal(drop(a), P * a)
    assert "survival=0.6" in repr(drop)
    torch.manual_seed(0)
    many = torch.stack([torch.stack([shake_shake(a, b), shake_drop(a, P)]) for _ in range(4000)])
    error = many.std(0) / 4000**0.5
    expected = torch.stack([(a + b) / 2, P * a])
    assert ((many.mean(0) - expected).abs() < 5 * error).all()


def test_survival_falls_linearly_to_one_half() -> None:
    assert [survival(layer, 4) for layer in (1, 2, 3, 4)] == [0.875, 0.75, 0.625, 0.5]
    model = build_model("pyramidnet-20-9-shakedrop", (3, 8, 8), 10, seed=0)
    found = [m.survival for m in model.modules() if isinstance(m, ShakeDrop)]
    assert found == pytest.approx([1 - layer / 12 for layer in range(1, 7)])
    plain = build_model("pyramidnet-20-9", (3, 8, 8), 10, seed=0)
    assert not any(isinstance(m, ShakeDrop) for m in plain.modules())
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["shakeshake-8-2x4d", "pyramidnet-11-8-shakedrop"])
def test_a_network_draws_in_training_only(name: str) -> None:
    model = build_model(name, (3, 8, 8), 10, seed=0)
    x = torch.randn(4, 3, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    state = torch.get_rng_state()
    assert torch.equal(model(x), model(x))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["shakeshake-8-2x4d", "pyramidnet-11-8-shakedrop"])
def test_a_network_under_functional_call_is_itself(name: str) -> None:
    model = build_model(name, (3, 8, 8), 10, seed=0)
    x, params = torch.randn(4, 3, 8, 8), dict(model.named_parameters())
    buffers = dict(model.named_buffers())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(3)
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        return torch.func.functional_call(model, {**weights, **copies}, (x,)).square().sum()  # type: ignore[no-any-return]

    torch.manual_seed(3)
    expected = torch.autograd.grad(model(x).square().sum(), list(params.values()))
    torch.testing.assert_close(tuple(torch.func.grad(loss)(params).values()), expected)
