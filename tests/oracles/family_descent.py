"""The descents of the family and bSAM, each from its paper's equations.

As in ``family_ascent``; ``g`` is the gradient at w and ``gs`` the one at w + eps. ``L.outputs`` and ``L.criterion`` are
the logits, and the loss of each sample.
"""

import torch

from oracles.family_ascent import norm


def epsilon(g, rho):
    """rho g / ||g||: Foret et al., eq. 2 with p = 2."""
    return rho * g / norm(g)


def two_gradients(L, w, rho, samples=None):
    """g = grad L(w) and gs = grad L(w + eps): Foret et al., Algorithm 1."""
    g = L.gradient(w, samples)
    return g, L.gradient(w + epsilon(g, rho), samples)


def pgn(rho, alpha):
    """Zhao, Zhang, Hu (ICML 2022): the gradient of L + lambda ||grad L||, with alpha = lambda / r."""

    def rule(w, L, base):
        g, gs = two_gradients(L, w, rho)
        return base.step(w, (1 - alpha) * g + alpha * gs)

    return rule


def wsam(rho, gamma, decoupled):
    """Yue et al. (KDD 2023): L + gamma / (1 - gamma) (max L(w + eps) - L).

    Coupled, the base steps with its gradient; decoupled, with g, and the sharpness acts as decoupled weight decay does.
    """

    def rule(w, L, base):
        g, gs = two_gradients(L, w, rho)
        sharpness = gamma / (1 - gamma) * (gs - g)
        return base.step(w, g) - base.lr * sharpness if decoupled else base.step(w, g + sharpness)

    return rule


def stable(rho):
    """Tan et al. (JMLR 2025): gs with the length of g."""

    def rule(w, L, base):
        g, gs = two_gradients(L, w, rho)
        return base.step(w, norm(g) / norm(gs) * gs)

    return rule


def gsam(rho, alpha, rho_min, lr_of, lr_max, lr_min=0.0):
    """Zhuang et al. (ICLR 2022), Algorithm 1: g = g_parallel + g_vertical along gs; step with gs - alpha g_vertical."""

    def rule(w, L, base):
        base.lr = lr_of(L.step)
        rho_t = rho_min + (rho - rho_min) * (base.lr - lr_min) / (lr_max - lr_min)
        g, gs = two_gradients(L, w, rho_t)
        g_parallel = norm(g) * ((g @ gs) / (norm(g) * norm(gs))) * gs / norm(gs)
        g_vertical = g - g_parallel
        return base.step(w, gs - alpha * g_vertical)

    return rule


def second_order(rho):
    """Foret et al., section 3: gs + (d eps / d w)^T gs."""

    def rule(w, L, base):
        at = w.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(L.loss(at), at, create_graph=True)
        eps = epsilon(g, rho)
        gs = L.gradient(w + eps)
        (dropped,) = torch.autograd.grad(eps, at, gs)
        return base.step(w, gs + dropped)

    return rule


def functional(rho):
    """Singh et al. (ICML 2025): the transposed Jacobian of the logits at w + eps, times d loss / d logits at w."""

    def rule(w, L, base):
        g = L.gradient(w)
        logits = L.outputs(w).detach().requires_grad_()
        (by_logits,) = torch.autograd.grad(L.criterion(logits).mean(), logits)
        moved = (w + epsilon(g, rho)).detach().requires_grad_()
        (product,) = torch.autograd.grad(L.outputs(moved), moved, grad_outputs=by_logits)
        return base.step(w, product)

    return rule


def looksam(rho, k, alpha):
    """Liu et al. (CVPR 2022), Algorithm 1."""
    g_v = None

    def rule(w, L, base):
        nonlocal g_v
        if L.step % k == 0:
            g, g_s = two_gradients(L, w, rho)
            cosine = (g @ g_s) / (norm(g) * norm(g_s))
            g_v = g_s - norm(g_s) * cosine * g / norm(g)
            return base.step(w, g_s)
        g = L.gradient(w)
        return base.step(w, g + alpha * norm(g) / norm(g_v) * g_v)

    return rule


def bsam(rho, N, lr, beta1, beta2, delta, gamma, s_0, draw):
    """Moellenhoff and Khan (ICLR 2023), Algorithm 1. ``draw(L)`` is standard normal."""
    m = s = None

    def rule(omega, L, base):
        nonlocal m, s
        if s is None:
            m, s = torch.zeros_like(omega), torch.full_like(omega, s_0)
        theta = omega + draw(L) / (N * s).sqrt()
        g = L.gradient(theta)
        g_epsilon = L.gradient(omega + rho * g / s)
        m = beta1 * m + (1 - beta1) * (g_epsilon + delta * omega)
        omega = omega - lr * m / s
        s = beta2 * s + (1 - beta2) * (s.sqrt() * g.abs() + delta + gamma)
        return omega

    return rule
