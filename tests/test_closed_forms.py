"""Formulas that are exact: a step on a quadratic, the dynamics near a minimum, the invariance of ASAM."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flatwise import SAM

INF = math.inf
PS = [1, 1.5, 2, 3, INF]
SCALINGS = {"plain": {}, "adaptive": {"adaptive": True}, "adaptive, eta": {"adaptive": True, "eta": 0.2}}
LR, RHO = 0.1, 0.3

each_p = pytest.mark.parametrize("p", PS, ids=str)
each_scaling = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=list(SCALINGS))


class Quadratic:
    """L(w) = w'Hw / 2 - b'w over parameters of several shapes, and every point at which it was evaluated."""

    shapes = ((2, 3), (4,), (), (1, 2))

    def __init__(self) -> None:
        self.weights = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in self.shapes]
        n = sum(w.numel() for w in self.weights)
        root = torch.randn(n, n, dtype=torch.float64)
        self.H, self.b = root @ root.T / n, torch.randn(n, dtype=torch.float64)
        self.points: list[Tensor] = []

    @property
    def w(self) -> Tensor:
        return torch.cat([w.detach().flatten() for w in self.weights])

    def gradient(self, w: Tensor) -> Tensor:
        return self.H @ w - self.b

    def closure(self) -> Tensor:
        self.points.append(self.w)
        for param in self.weights:
            param.grad = None
        w = torch.cat([w.flatten() for w in self.weights])
        loss = w @ self.H @ w / 2 - self.b @ w
        loss.backward()
        return loss


def t_of(w: Tensor, adaptive: bool = False, eta: float = 0.0) -> Tensor:
    return w.abs() + eta if adaptive else torch.ones_like(w)


def perturbation_of(p: float, t: Tensor, g: Tensor, rho: Tensor | float) -> Tensor:
    """The perturbation of each p, written out."""
    s = t * g
    if p == 1:
        eps = torch.zeros_like(g)
        j = s.abs().argmax()
        eps[j] = t[j] * g[j].sign()
    elif p == 1.5:  # q = 3
        eps = t * g.sign() * s**2 / (s.abs() ** 3).sum() ** (2 / 3)
    elif p == 2:
        eps = t * s / (s @ s).sqrt()
    elif p == 3:  # q = 3/2
        eps = t * g.sign() * s.abs().sqrt() / (s.abs() ** 1.5).sum() ** (1 / 3)
    else:
        eps = t * g.sign()
    return rho * eps


def norm(x: Tensor, p: float) -> float:
    return float(x.abs().max() if math.isinf(p) else (x.abs() ** p).sum() ** (1 / p))


def close(got: Tensor | float, expected: Tensor | float) -> None:
    got, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (got, expected))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@each_p
@each_scaling
def test_a_step_on_a_quadratic(p: float, scaling: dict[str, float]) -> None:
    q = Quadratic()
    opt = SAM(torch.optim.SGD(q.weights, lr=LR), RHO, p=p, **scaling)
    for _ in range(5):
        w = q.w
        g, t = q.gradient(w), t_of(w, **scaling)
        eps = perturbation_of(p, t, g, RHO)
        opt.step(q.closure)
        close(q.points[-1], w + eps)
        close(q.w, w - LR * (g + q.H @ eps))


@each_p
@each_scaling
def test_length_and_climb_of_the_perturbation(p: float, scaling: dict[str, float]) -> None:
    """||T^-1 eps||_p = rho, <eps, g> = rho ||Tg||_q, and the record says the same."""
    q = Quadratic()
    w, dual = q.w, {1: INF, 1.5: 3, 2: 2, 3: 1.5, INF: 1}[p]
    g, t = q.gradient(w), t_of(w, **scaling)
    opt = SAM(torch.optim.SGD(q.weights, lr=LR), RHO, p=p, **scaling)
    opt.step(q.closure)
    eps = q.points[1] - w
    assert norm(eps / t, p) == pytest.approx(RHO, rel=1e-12)
    assert float(eps @ g) == pytest.approx(RHO * norm(t * g, dual), rel=1e-12)
    assert opt.last.perturbation_norm == pytest.approx(RHO, rel=1e-12)
    assert opt.last.gradient_norm == pytest.approx(norm(t * g, dual), rel=1e-12)


@each_p
@each_scaling
def test_no_point_of_the_ball_is_higher_to_first_order(p: float, scaling: dict[str, float]) -> None:
    q = Quadratic()
    w = q.w
    g, t = q.gradient(w), t_of(w, **scaling)
    SAM(torch.optim.SGD(q.weights, lr=LR), RHO, p=p, **scaling).step(q.closure)
    best = float((q.points[1] - w) @ g)
    for _ in range(200):
        direction = torch.randn_like(w)
        assert float(t * direction * (RHO / norm(direction, p)) @ g) <= best


@each_p
@each_scaling
def test_groups_with_radii_of_their_own(p: float, scaling: dict[str, float]) -> None:
    """One norm over the groups that have a radius; a group without one is not part of it and does not move."""
    q = Quadratic()
    radii = (0.3, 0.0, 0.05, 0.7)
    rho = torch.cat(
        [torch.tensor([r], dtype=torch.float64).expand(w.numel()) for r, w in zip(radii, q.weights, strict=True)]
    )
    groups = [{"params": [w], "rho": r} for w, r in zip(q.weights, radii, strict=True)]
    opt = SAM(torch.optim.SGD(groups, lr=LR), RHO, p=p, **scaling)
    w = q.w
    g = q.gradient(w)
    eps = perturbation_of(p, t_of(w, **scaling), torch.where(rho > 0, g, 0), rho)
    opt.step(q.closure)
    close(q.points[1], w + eps)
    assert torch.equal(q.points[1][rho == 0], w[rho == 0])
    close(q.w, w - LR * (g + q.H @ eps))
    assert opt.last.perturbation_norm == pytest.approx(norm(eps / t_of(w, **scaling), p), rel=1e-12)


@each_scaling
def test_two_steps_in_the_l2_ball(scaling: dict[str, float]) -> None:
    """Each step is rho long; what leaves the ball is pulled back along the ray."""
    q = Quadratic()
    w = q.w
    t = t_of(w, **scaling)
    first = perturbation_of(2, t, q.gradient(w), RHO)
    far = first + perturbation_of(2, t, q.gradient(w + first), RHO)
    eps = far * min(1.0, RHO / norm(far / t, 2))
    SAM(torch.optim.SGD(q.weights, lr=LR), RHO, ascent_steps=2, **scaling).step(q.closure)
    assert norm(far / t, 2) > RHO
    close(q.points[2], w + eps)
    close(q.w, w - LR * q.gradient(w + eps))


@each_scaling
@pytest.mark.parametrize("n", [2, 3])
def test_many_steps_in_the_box(scaling: dict[str, float], n: int) -> None:
    """In the box the projection clamps each coordinate: it moves by t rho up to its own wall."""
    q = Quadratic()
    w = q.w
    t, eps = t_of(w, **scaling), torch.zeros_like(w)
    for _ in range(n):
        eps = torch.maximum(torch.minimum(eps + RHO * t * q.gradient(w + eps).sign(), RHO * t), -RHO * t)
    SAM(torch.optim.SGD(q.weights, lr=LR), RHO, p=INF, ascent_steps=n, **scaling).step(q.closure)
    close(q.points[n], w + eps)


@pytest.mark.parametrize("p", [1, 1.5, 3], ids=str)
@each_scaling
def test_many_steps_in_other_balls_end_on_the_ray(p: float, scaling: dict[str, float]) -> None:
    q = Quadratic()
    w = q.w
    t, eps = t_of(w, **scaling), torch.zeros_like(w)
    for _ in range(3):
        far = eps + perturbation_of(p, t, q.gradient(w + eps), RHO)
        eps = far / max(1.0, norm(far / t / RHO, p))
    opt = SAM(torch.optim.SGD(q.weights, lr=LR), RHO, p=p, ascent_steps=3, **scaling)
    opt.step(q.closure)
    close(q.points[3], w + eps)
    assert opt.last.perturbation_norm == pytest.approx(norm(eps / t, p), rel=1e-12)


# Dynamics


@pytest.mark.parametrize("p", [1, 2, INF], ids=str)
@pytest.mark.parametrize(("lr", "curvature"), [(0.2, 1.0), (0.5, 2.0), (0.3, 5.0), (1.8, 1.0)])
def test_the_limit_cycle_of_one_dimension(p: float, lr: float, curvature: float) -> None:
    """Near a minimum SAM jumps from side to side: |x| = eta lambda rho / (2 - eta lambda)."""
    x = torch.nn.Parameter(torch.tensor(1.7, dtype=torch.float64))
    opt = SAM(torch.optim.SGD([x], lr=lr), RHO, p=p)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = curvature * x**2 / 2
        loss.backward()
        return loss

    ends = []
    for _ in range(120):
        opt.step(closure)
        ends.append(x.item())
    radius = lr * curvature * RHO / (2 - lr * curvature)
    assert ends[-1] == pytest.approx(-ends[-2], rel=1e-9)
    assert abs(ends[-1]) == pytest.approx(radius, rel=1e-9)


@pytest.mark.parametrize(("lr", "rho", "size"), [(0.1, 0.05, 1.0), (0.02, 0.5, 3.0), (1.0, 0.1, 0.01)])
def test_the_edge_of_stability(lr: float, rho: float, size: float) -> None:
    """At lambda* = (||g|| / 2 rho) (sqrt(1 + 8 rho / (eta ||g||)) - 1) < 2 / eta a step turns x into -x."""
    edge = size / (2 * rho) * (math.sqrt(1 + 8 * rho / (lr * size)) - 1)
    assert edge < 2 / lr

    def ratio(curvature: float) -> float:
        start = size / curvature  # so that ||g|| = size
        x = torch.nn.Parameter(torch.tensor([start, 0.0], dtype=torch.float64))
        opt = SAM(torch.optim.SGD([x], lr=lr), rho)

        def closure() -> Tensor:
            opt.zero_grad()
            loss = curvature * (x**2).sum() / 2
            loss.backward()
            return loss

        opt.step(closure)
        return x[0].item() / start

    assert ratio(edge) == pytest.approx(-1, rel=1e-12)
    assert ratio(1.01 * edge) < -1.001
    assert ratio(0.99 * edge) > -0.999


# Rescaling


def look_of_relu_net(c: float, **options: float) -> tuple[float, list[Tensor], list[Tensor]]:
    """Return the perturbed loss, the perturbations and the final gradients of relu(x W1'/c) W2' c."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 3).double(), torch.randn(16, 2).double()
    first, second = torch.randn(5, 3).double(), torch.randn(2, 5).double()
    weights = [torch.nn.Parameter(first * c), torch.nn.Parameter(second / c)]
    opt = SAM(torch.optim.SGD(weights, lr=0.0), **options)
    points = []

    def closure() -> Tensor:
        opt.zero_grad()
        points.append([w.detach().clone() for w in weights])
        loss = ((torch.relu(x @ weights[0].T) @ weights[1].T - y) ** 2).mean()
        loss.backward()
        return loss

    opt.step(closure)
    start, end = points
    return (
        opt.last.perturbed_loss,
        [b - a for a, b in zip(start, end, strict=True)],
        [w.grad.clone() for w in weights],
    )


@each_p
@pytest.mark.parametrize("c", [0.01, 3.7, 250.0])
def test_asam_does_not_see_a_rescaling_of_relu_layers(p: float, c: float) -> None:
    loss, (eps1, eps2), (g1, g2) = look_of_relu_net(1.0, rho=0.3, p=p, adaptive=True)
    scaled_loss, (scaled1, scaled2), (h1, h2) = look_of_relu_net(c, rho=0.3, p=p, adaptive=True)
    assert scaled_loss == pytest.approx(loss, rel=1e-11)
    for got, expected in ((scaled1 / c, eps1), (scaled2 * c, eps2), (h1 * c, g1), (h2 / c, g2)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@each_p
@pytest.mark.parametrize("options", [{}, {"adaptive": True, "eta": 0.5}], ids=["SAM", "ASAM with eta"])
def test_sam_sees_it(p: float, options: dict[str, float]) -> None:
    plain, *_ = look_of_relu_net(1.0, rho=0.3, p=p, **options)
    scaled, *_ = look_of_relu_net(10.0, rho=0.3, p=p, **options)
    assert abs(scaled - plain) > 1e-2 * plain


@each_p
def test_the_perturbation_does_not_see_the_scale_of_the_loss(p: float) -> None:
    moved = []
    for scale in (1.0, 1e-9, 1e9):
        torch.manual_seed(0)
        q = Quadratic()
        q.H, q.b = q.H * scale, q.b * scale
        SAM(torch.optim.SGD(q.weights, lr=0.0), RHO, p=p).step(q.closure)
        moved.append(q.points[1] - q.points[0])
    close(moved[1], moved[0])
    close(moved[2], moved[0])
