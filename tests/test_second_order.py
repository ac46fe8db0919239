"""The term that SAM drops: closed forms with a dense Hessian, and differentiation through the perturbation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flatwise import SAM
from oracles.perturbation import epsilon_hat
from oracles.step import gradient

INF = math.inf
RHO = 0.2
x, y = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3), torch.linspace(-2, 1, 6, dtype=torch.float64)
SIZES = (12, 4, 1)


def loss_at(w: Tensor) -> Tensor:
    first, second, offset = w.split(SIZES)
    return ((torch.tanh(x @ first.view(3, 4)) @ second + offset - y) ** 2).mean()


def start() -> Tensor:
    return torch.randn(sum(SIZES), dtype=torch.float64)


def step_gradient(w: Tensor, radii: tuple[float, ...] = (RHO,) * 3, **options: float) -> Tensor:
    """Return the gradient that flatwise gives to the base optimizer."""
    parts = [torch.nn.Parameter(part.clone()) for part in w.split(SIZES)]
    groups = [{"params": [part], "rho": rho} for part, rho in zip(parts, radii, strict=True)]
    opt = SAM(groups, torch.optim.SGD, lr=0.0, second_order=True, **options)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_at(torch.cat(parts))
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.last.passes == 3
    assert opt.last.closure_calls == 3
    return torch.cat([part.grad for part in parts])


def derivatives(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradient and dense Hessian."""
    return gradient(loss_at, w), torch.autograd.functional.hessian(loss_at, w)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_the_closed_form() -> None:
    """(rho / ||g||) H (I - gg'/||g||^2) g'."""
    w = start()
    g, H = derivatives(w)
    unit = g / g.norm()
    there = gradient(loss_at, w + RHO * unit)
    term = RHO / g.norm() * H @ (there - unit * (unit @ there))
    assert term.norm() > 1e-3 * there.norm()
    close(step_gradient(w), there + term)


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_the_closed_form_of_the_adaptive_ball(eta: float) -> None:
    """d eps = rho (diag(sign(w) s) / n + T (I - ss'/n^2) (diag(sign(w) g) + TH) / n) with s = Tg, n = ||s||."""
    w = start()
    g, H = derivatives(w)
    T, sign = torch.diag(w.abs() + eta), torch.diag(w.sign())
    s = T @ g
    n = s.norm()
    eye = torch.eye(len(w), dtype=w.dtype)
    tangent = eye - torch.outer(s, s) / n**2
    jacobian = RHO / n * (sign @ torch.diag(s) + T @ tangent @ (sign @ torch.diag(g) + T @ H))
    there = gradient(loss_at, w + RHO * T @ s / n)
    close(step_gradient(w, adaptive=True, eta=eta), there + jacobian.T @ there)


def test_the_closed_form_of_box_and_diamond() -> None:
    """Their corners do not move with w; where the ball is adaptive they move with |w|."""
    w = start()
    g, _ = derivatives(w)
    j = g.abs().argmax()
    corner = torch.zeros_like(w).index_fill(0, j, 1.0)
    for p, eps in ((INF, RHO * g.sign()), (1, RHO * corner * g.sign())):
        close(step_gradient(w, p=p), gradient(loss_at, w + eps))
    j = (w * g).abs().argmax()
    corner = torch.zeros_like(w).index_fill(0, j, 1.0)
    for p, where in ((INF, torch.ones_like(w)), (1, corner)):
        there = gradient(loss_at, w + RHO * where * w.abs() * g.sign())
        close(step_gradient(w, p=p, adaptive=True), there + RHO * where * w.sign() * g.sign() * there)


BALLS = [
    pytest.param({"p": p, **scaling}, id=f"p={p}{name}")
    for p in (1, 1.2, 1.5, 2, 3, 8, INF)
    for name, scaling in (("", {}), (" adaptive", {"adaptive": True}), (" eta", {"adaptive": True, "eta": 0.1}))
]


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("radii", [(RHO,) * 3, (0.3, 0.05, 0.7)], ids=["one radius", "groups"])
def test_it_is_the_gradient_of_the_perturbed_loss(ball: dict[str, float], radii: tuple[float, ...]) -> None:
    """With the term, the step sees the exact derivative of w -> L(w + eps_hat(w))."""
    w = start()
    close(step_gradient(w, radii, **ball), total_derivative(w, radii, ball))


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("radii", [(0.3, 0.0, 0.7), (0.0, 0.4, 0.0)], ids=str)
def test_it_is_that_gradient_also_for_weights_without_a_radius(
    ball: dict[str, float], radii: tuple[float, ...]
) -> None:
    """They do not move, but the perturbation of the others depends on them."""
    w = start()
    close(step_gradient(w, radii, **ball), total_derivative(w, radii, ball))


def total_derivative(w: Tensor, radii: tuple[float, ...], ball: dict[str, float]) -> Tensor:
    rho = torch.cat([torch.full((n,), r, dtype=w.dtype) for n, r in zip(SIZES, radii, strict=True)])
    w = w.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_at(w), w, create_graph=True)
    (total,) = torch.autograd.grad(loss_at(w + epsilon_hat(w, g, rho, **ball)), w)
    return total


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, INF], ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
def test_weights_that_the_loss_does_not_use_do_no_harm(p: float, adaptive: bool) -> None:
    """A unit that is never active has a zero gradient and zero rows in the Hessian; it is as if it were absent."""
    results = []
    for size in (3, 5):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 0.3, 0.7], dtype=torch.float64)[:size].clone())
        opt = SAM(torch.optim.SGD([w], lr=0.1), RHO, p=p, adaptive=adaptive, second_order=True)

        def closure(w: Tensor = w, opt: SAM = opt) -> Tensor:
            opt.zero_grad()
            loss = (w[:3] ** 4).sum()
            loss.backward()
            return loss

        opt.step(closure)
        assert opt.last.reason == "perturbed"
        results.append(w.detach())
    assert torch.equal(results[1][3:], torch.tensor([0.3, 0.7], dtype=torch.float64))
    close(results[1][:3], results[0])


def test_a_linear_loss_has_no_such_term() -> None:
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    opt = SAM(torch.optim.SGD([w], lr=1.0), RHO, second_order=True)
    opt.step(lambda batch: (w * batch).sum(), torch.tensor([1.0, 2.0]))
    assert torch.equal(w.detach(), torch.tensor([2.0, 2.0]))
