"""The perturbation: Foret et al. (ICLR 2021), eq. 2 and App. C.6; Kwon et al. (ICML 2021), eq. 7."""

import math

import torch


def dual(p):
    """1/p + 1/q = 1."""
    return math.inf if p == 1 else 1.0 if p == math.inf else 1 / (1 - 1 / p)


def norm(x, p):
    """||x||_p = (sum_i |x_i|^p)^(1/p), of float64 numbers."""
    if p == math.inf:
        return x.abs().max()
    return (x.abs() ** p).sum() ** (1 / p)


def scaling(w, adaptive, eta):
    """T_w = diag(|w_i| + eta); the identity for SAM."""
    return w.abs() + eta if adaptive else torch.ones_like(w)


def epsilon_hat(w, g, rho, p=2.0, adaptive=False, eta=0.0):
    """rho T sign(Tg) |Tg|^(q-1) / (||Tg||_q^q)^(1/p), over the coordinates that have a radius."""
    q = dual(p)
    T = scaling(w, adaptive, eta)
    Tg = torch.where(rho > 0, T * g, 0)
    if p == 1:
        largest = (Tg.abs() == Tg.abs().max()).to(w)
        return rho * T * torch.sign(Tg) * largest / largest.sum()
    if p == math.inf:
        return rho * T * torch.sign(Tg)
    return rho * T * torch.sign(Tg) * Tg.abs() ** (q - 1) / ((Tg.abs() ** q).sum()) ** (1 / p)


def project(w, epsilon, rho, p=2.0, adaptive=False, eta=0.0):
    """Onto the ball ||T^-1 eps / rho||_p <= 1: nearest point for p = 2 and inf, along the ray for other p."""
    T = scaling(w, adaptive, eta) * rho
    u = torch.where(T > 0, epsilon / T, 0)
    u = u.clamp(-1, 1) if p == math.inf else u / max(1.0, float(norm(u, p)))
    return T * u


def projected_ascent(gradient, w, rho, n, p=2.0, adaptive=False, eta=0.0):
    """eps_0 = 0; eps_(i+1) = project(eps_i + eps_hat(grad L(w + eps_i)))."""
    epsilon = torch.zeros_like(w)
    for _ in range(n):
        step = epsilon_hat(w, gradient(w + epsilon), rho, p, adaptive, eta)
        epsilon = project(w, epsilon + step, rho, p, adaptive, eta)
    return epsilon
