"""Descents, schedules, choices of data, and bSAM, each from its paper's equations.

``w`` are all weights in one vector, ``g`` is the gradient at w and ``gs`` the one at w + eps. A method is made by
``method(rho, **options)``, which returns ``rule(w, L, base)``: the next weights. L is the loss (``L.gradient``,
``L.outputs``, ``L.criterion``, each of all samples or of some), ``L.step`` is t.
"""

import math
import random

import torch


def norm(x):
    return (x * x).sum().sqrt()


def epsilon(g, rho):
    """rho g / ||g||: Foret et al., eq. 2 with p = 2."""
    return rho * g / norm(g)


def two_gradients(L, w, rho, samples=None):
    """g = grad L(w) and gs = grad L(w + eps): Foret et al., Algorithm 1."""
    g = L.gradient(w, samples)
    return g, L.gradient(w + epsilon(g, rho), samples)


def sam(rho):
    return lambda w, L, base: base.step(w, two_gradients(L, w, rho)[1])


# Descents


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
    """Foret et al., section 3: gs + (d eps / d w)^T gs, d eps / d w = rho / ||g|| (I - u u^T) H, u = g / ||g||."""

    def rule(w, L, base):
        g, gs = two_gradients(L, w, rho)
        u = g / norm(g)
        v = gs - (u @ gs) * u
        at = w.detach().clone().requires_grad_()
        (g_at,) = torch.autograd.grad(L.loss(at), at, create_graph=True)
        (Hv,) = torch.autograd.grad(g_at @ v, at)
        return base.step(w, gs + rho / norm(g) * Hv)

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


# Schedules: does step t perturb


def scheduled(rho, active):
    """SAM on the steps for which ``active(t, g)``, the base's own step on the others."""

    def rule(w, L, base):
        g = L.gradient(w)
        return base.step(w, L.gradient(w + epsilon(g, rho)) if active(L.step, g) else g)

    return rule


def every_k(rho, k):
    return scheduled(rho, lambda t, g: t % k == 0)


def window(rho, start, stop, total):
    """Zhou et al. (ICLR 2025) with stop = 1: from a fraction of training on."""
    return scheduled(rho, lambda t, g: start * total <= t < stop * total)


def warmup_off(rho, warmup):
    return scheduled(rho, lambda t, g: t >= warmup)


def bernoulli(rho, probability, seed=0):
    """SS-SAM (arXiv 2203.09962): one draw for each step; here a function of the seed and the step."""
    return scheduled(rho, lambda t, g: random.Random(seed * 1_000_003 + t).random() < probability)


def ae_sam(rho, total, delta=0.9, lambda_1=-1.0, lambda_2=1.0):
    """Jiang et al. (ICLR 2023): SAM iff ||g||^2 >= mu_t + c_t sigma_t."""
    mu = variance = 0.0

    def active(t, g):
        nonlocal mu, variance
        squared = float(norm(g)) ** 2
        mu = delta * mu + (1 - delta) * squared
        variance = delta * variance + (1 - delta) * (squared - mu) ** 2
        c_t = t / total * lambda_1 + (1 - t / total) * lambda_2
        return squared >= mu + c_t * math.sqrt(variance)

    return scheduled(rho, active)


# Choices of data


def m_sam(rho, m, begin_part):
    """Foret et al., section 4.1: SAM gradients of disjoint parts of m samples, averaged over samples."""

    def rule(w, L, base):
        samples, total = torch.arange(len(L.criterion(L.outputs(w)))), 0
        for part in samples.split(m):
            begin_part(L)
            total = total + len(part) * two_gradients(L, w, rho, part)[1]
        return base.step(w, total / len(samples))

    return rule


def sub_batch(rho, count):
    """Bahri, Mobahi, Tay (ACL 2022): the perturbation comes from the first ``count`` samples."""

    def rule(w, L, base):
        return base.step(w, L.gradient(w + epsilon(L.gradient(w, torch.arange(count)), rho)))

    return rule


def top(values, count):
    """The indices of the largest, in their order."""
    return torch.tensor(sorted(sorted(range(len(values)), key=lambda i: -float(values[i]))[:count]))


def k_sam(rho, count):
    """Ni et al. (arXiv 2210.12864): both gradients on the samples with the largest loss."""

    def rule(w, L, base):
        chosen = top(L.criterion(L.outputs(w)), count)
        return base.step(w, two_gradients(L, w, rho, chosen)[1])

    return rule


def esam_sds(rho, count):
    """Du et al. (ICLR 2022), section 3.2: the second gradient on the samples whose loss rises most."""

    def rule(w, L, base):
        eps = epsilon(L.gradient(w), rho)
        rise = L.criterion(L.outputs(w + eps)) - L.criterion(L.outputs(w))
        return base.step(w, L.gradient(w + eps, top(rise, count)))

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
