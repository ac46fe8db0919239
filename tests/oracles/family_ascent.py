"""The ascents of the family, each from the equation of its paper: float64, one flat vector w, nothing of flatwise.

A method is ``method(rho, **options)``; it returns ``rule(w, L, base)``, which makes the next weights. ``L.gradient(w)``
is the gradient of the batch's loss, ``L.cut(w)`` the vector as tensors, ``L.names`` and ``L.in_norm`` what those are,
``L.step`` is t; ``base.step(w, g)`` is the base optimizer's step, ``base.lr`` its learning rate and ``base.momentum``
its momentum (None before the first step).
"""

import math

import torch


def norm(x):
    return (x * x).sum().sqrt()


def join(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


# SAM: Foret et al. (ICLR 2021), Algorithm 1, with another epsilon for each method


def climb(epsilon):
    """w <- base(w, grad L(w + eps)), with eps = epsilon(w, grad L(w), L)."""

    def rule(w, L, base):
        eps = epsilon(w, L.gradient(w), L)
        return base.step(w, L.gradient(w + eps))

    return rule


def sam(rho):
    """Foret et al., eq. 2: eps = rho g / ||g||."""
    return climb(lambda w, g, L: rho * g / norm(g))


def usam(rho):
    """Andriushchenko and Flammarion (ICML 2022): eps = rho g."""
    return climb(lambda w, g, L: rho * g)


def lp(rho, p):
    """Foret et al., eq. 2: eps = rho sign(g) |g|^(q-1) / (||g||_q^q)^(1/p), with 1/p + 1/q = 1."""

    def epsilon(w, g, L):
        if p == 1:  # q = inf: the limit puts all on the largest
            eps, i = torch.zeros_like(g), int(g.abs().argmax())
            eps[i] = rho * g[i].sign()
            return eps
        if p == math.inf:
            return rho * g.sign()
        q = p / (p - 1)
        return rho * g.sign() * g.abs() ** (q - 1) / ((g.abs() ** q).sum()) ** (1 / p)

    return climb(epsilon)


def asam(rho, eta=0.01, scaled="all"):
    """Kwon et al. (ICML 2021), eq. 7: eps = rho T^2 g / ||T g||, T = diag(|w_i| + eta).

    The authors' code has T = 1 for tensors without ``weight`` in their name.
    """

    def epsilon(w, g, L):
        T = join(
            part.abs() + eta if scaled == "all" or "weight" in name else torch.ones_like(part)
            for name, part in zip(L.names, L.cut(w), strict=True)
        )
        return rho * T**2 * g / norm(T * g)

    return climb(epsilon)


def sam_on(rho, adaptive=False, eta=0.01):
    """Mueller et al. (NeurIPS 2023): only normalisation layers move, and the norm is over these alone."""

    def epsilon(w, g, L):
        T = w.abs() + eta if adaptive else torch.ones_like(w)
        rows = list(zip(L.cut(T), L.cut(g), L.in_norm, strict=True))
        length = norm(join(t * part for t, part, inside in rows if inside))
        return join(rho * t**2 * part / length if inside else torch.zeros_like(part) for t, part, inside in rows)

    return climb(epsilon)


def layerwise(rho):
    """eps_l = rho g_l / ||g_l|| for every tensor l."""
    return climb(lambda w, g, L: join(rho * part / norm(part) for part in L.cut(g)))


def filters(tensor):
    """The norm of the filter that a weight belongs to, at the place of the weight."""
    result = torch.empty_like(tensor)
    for i in range(len(tensor)):
        result[i] = norm(tensor[i])  # of one number: its absolute value
    return result


def filterwise(rho, eta=0.01):
    """Kwon et al., filter-wise: eps = rho T^2 g / ||T g||, T = ||f_i|| + eta."""

    def epsilon(w, g, L):
        T = join(filters(part) + eta for part in L.cut(w))
        return rho * T**2 * g / norm(T * g)

    return climb(epsilon)


def fisher(rho, eta=1.0):
    """Kim et al. (ICML 2022): eps = rho F^-1 g / sqrt(g' F^-1 g), F^-1 = 1 / (1 + eta g^2), diagonal."""

    def epsilon(w, g, L):
        F_inverse = 1 / (1 + eta * g**2)
        return rho * F_inverse * g / (g * F_inverse * g).sum().sqrt()

    return climb(epsilon)


def vasso(rho, theta=0.9):
    """Li and Giannakis (NeurIPS 2023): d_t = (1 - theta) d_(t-1) + theta g_t; eps = rho d_t / ||d_t||."""
    d = 0.0

    def epsilon(w, g, L):
        nonlocal d
        d = (1 - theta) * d + theta * g
        return rho * d / norm(d)

    return climb(epsilon)


def fsam(rho, sigma=1.0, lmbda=0.9):
    """Li et al. (CVPR 2024): d_t = g_t - sigma m_(t-1); m_t = lambda m_(t-1) + (1 - lambda) g_t; d_1 = m_1 = g_1."""
    m = None

    def epsilon(w, g, L):
        nonlocal m
        d = g if m is None else g - sigma * m
        m = g if m is None else lmbda * m + (1 - lmbda) * g
        return rho * d / norm(d)

    return climb(epsilon)


def multi_step(rho, n=2):
    """Foret et al., App. C.6: n steps of length rho, each projected onto the ball of radius rho."""

    def rule(w, L, base):
        eps = torch.zeros_like(w)
        for _ in range(n):
            g = L.gradient(w + eps)
            eps = eps + rho * g / norm(g)
            if norm(eps) > rho:
                eps = rho * eps / norm(eps)
        return base.step(w, L.gradient(w + eps))

    return rule


# One gradient per step


def msam(rho, adaptive=False, eta=0.01, only_norm=False):
    """Becker, Altrock, Risse (2024): eps = -rho v / ||v||; with T = |w| + eta, -rho T^2 v / ||T v||."""

    def rule(w, L, base):
        if base.momentum is None:
            return base.step(w, L.gradient(w))
        v = base.momentum
        if only_norm:
            v = join(p if inside else torch.zeros_like(p) for p, inside in zip(L.cut(v), L.in_norm, strict=True))
        T = w.abs() + eta if adaptive else torch.ones_like(w)
        eps = -rho * T**2 * v / norm(T * v)
        return base.step(w, L.gradient(w + eps))

    return rule


def msam_shifted(rho, lr, mu, decay):
    """The same as its authors write it for SGD: the weights lie at w~ = w - rho v / ||v|| between the steps.

    Returns the rule, which works on w~, and ``at_rest(w~)``, which is w.
    """
    v = None

    def shift():
        return 0.0 if v is None else rho * v / norm(v)

    def rule(shifted, L, base):
        nonlocal v
        g = L.gradient(shifted)
        w = shifted + shift()
        v = (g + decay * w) if v is None else mu * v + (g + decay * w)
        w = w - lr * v
        return w - shift()

    return rule, lambda shifted: shifted + shift()


def stale(rho):
    """AsyncSAM, S2-SAM: eps_t = rho g_(t-1) / ||g_(t-1)||, with the gradient that the last step was made with."""
    last = None

    def rule(w, L, base):
        nonlocal last
        last = L.gradient(w if last is None else w + rho * last / norm(last))
        return base.step(w, last)

    return rule


def standard_normal(L, seed):
    """One number for each weight: here a function of the seed and the step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + L.step)
    return join(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in L.shapes)


def random(rho, noise_seed=0, filter_scaled=True):
    """Bisla, Wang, Choromanska (AISTATS 2022), one sample: eps_i = rho ||f_i|| xi_i, xi standard normal."""

    def rule(w, L, base):
        xi = standard_normal(L, noise_seed)
        lengths = join(filters(part) for part in L.cut(w)) if filter_scaled else 1
        return base.step(w, L.gradient(w + rho * lengths * xi))

    return rule
