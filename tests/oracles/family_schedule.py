"""The schedules of the family, each from its paper: does step t perturb? Otherwise as in ``family_ascent``."""

import math
import random

from oracles.family_ascent import norm
from oracles.family_descent import epsilon


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
