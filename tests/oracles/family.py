"""The family, method by method, from the equations of its papers: slow, literal, on one flat vector of weights.

A method is a function ``(world, rho, **options) -> step``; ``step(t, w, x, y)`` returns the vector that the base
optimizer is given, the weights whose batch statistics count, and what is taken from the weights after the base's step.
"""

import math
import random

import torch

from oracles.perturbation import epsilon_hat


def unit(x):
    """x / ||x||."""
    return x / x.norm()


def along(a, b):
    """The part of a along b."""
    return (a @ b) / (b @ b) * b


def filter_norms(world, w):
    """||f|| for the slice of the first dimension that holds a weight; |w| where there is one dimension."""
    result = []
    for tensor in world.tensors(w):
        norms = tensor.flatten(1).norm(dim=1) if tensor.dim() > 1 else tensor.abs()
        result.append(norms.reshape(-1, *[1] * (tensor.dim() - 1)).expand_as(tensor).reshape(-1))
    return torch.cat(result)


def two_passes(epsilon):
    """Turn ``epsilon(t, w, g)`` into a method that steps with the gradient at w + eps."""

    def step(t, w, x, y, world):
        g = world.gradient(w, x, y)
        return world.gradient(w + epsilon(t, w, g), x, y), w, 0

    return step


def ball(world, rho, *, p=2.0, adaptive=False, eta=0.0, scaled="all"):
    """SAM, ASAM and the p-norms: eq. 2; T of the authors' ASAM is 1 where the name does not hold "weight"."""

    def epsilon(t, w, g):
        T = w.abs() + eta if adaptive else torch.ones_like(w)
        if scaled == "weights":
            T = torch.where(world.mask("weight"), T, 1)
        # A scaled ball is the unscaled one in the coordinates T^-1 w.
        return T * epsilon_hat(w, T * g, torch.full_like(w, rho), p)

    return two_passes(epsilon)


def usam(world, rho):
    """Eps = rho g."""
    return two_passes(lambda t, w, g: rho * g)


def sam_on(world, rho):
    """Eps = rho g_N / ||g_N||, where N are the normalisation layers."""

    def epsilon(t, w, g):
        return rho * unit(torch.where(world.mask("1."), g, 0))

    return two_passes(epsilon)


def layerwise(world, rho):
    """eps_l = rho g_l / ||g_l||, tensor by tensor."""
    return two_passes(lambda t, w, g: torch.cat([rho * unit(part.reshape(-1)) for part in world.tensors(g)]))


def filterwise(world, rho, *, eta=0.01):
    """Eps = rho T^2 g / ||T g||, T = ||f|| + eta."""

    def epsilon(t, w, g):
        T = filter_norms(world, w) + eta
        return rho * T**2 * g / (T * g).norm()

    return two_passes(epsilon)


def fisher(world, rho, *, eta=1.0):
    """Eps = rho F^-1 g / sqrt(g^T F^-1 g), F = 1 + eta g^2."""

    def epsilon(t, w, g):
        inverse = 1 / (1 + eta * g**2)
        return rho * inverse * g / (g @ (inverse * g)).sqrt()

    return two_passes(epsilon)


def vasso(world, rho, *, theta=0.9):
    """M <- (1 - theta) m + theta g; eps = rho m / ||m||."""
    average = 0.0

    def epsilon(t, w, g):
        nonlocal average
        average = (1 - theta) * average + theta * g
        return rho * unit(average)

    return two_passes(epsilon)


def fsam(world, rho, *, sigma=1.0, lmbda=0.9):
    """D = g - sigma m; eps = rho d / ||d||; m <- lmbda m + (1 - lmbda) g; on the first step d = m = g."""
    average = None

    def epsilon(t, w, g):
        nonlocal average
        if average is None:
            average = g
            return rho * unit(g)
        direction = g - sigma * average
        average = lmbda * average + (1 - lmbda) * g
        return rho * unit(direction)

    return two_passes(epsilon)


def one_pass(epsilon):
    """A method whose only gradient is at w + eps, where the batch statistics are taken too."""

    def step(t, w, x, y, world):
        away = w + epsilon(t, w)
        return world.gradient(away, x, y), away, 0

    return step


def msam(world, rho, *, adaptive=False, eta=0.0):
    """Eps = -rho T^2 v / ||T v||, v the momentum before the update."""

    def epsilon(t, w):
        v = world.momentum
        if v is None:
            return torch.zeros_like(w)
        T = w.abs() + eta if adaptive else torch.ones_like(w)
        return -rho * T**2 * v / (T * v).norm()

    return one_pass(epsilon)


def stale(world, rho):
    """eps_t = rho g_{t-1} / ||g_{t-1}||, g the gradient that was stepped with."""
    last = None

    def step(t, w, x, y, world):
        nonlocal last
        away = w if last is None else w + rho * unit(last)
        last = world.gradient(away, x, y)
        return last, away, 0

    return step


def noise(world, rho, *, seed=0):
    """Eps = rho ||f|| xi, xi standard normal."""

    def epsilon(t, w):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + t)
        xi = [torch.randn(part.shape, generator=generator, dtype=w.dtype) for part in world.tensors(w)]
        return rho * filter_norms(world, w) * torch.cat([part.reshape(-1) for part in xi])

    return one_pass(epsilon)


def multi_step(world, rho, *, n=2):
    """eps_(i+1) = project(eps_i + rho g_i / ||g_i||)."""

    def step(t, w, x, y, world):
        epsilon = torch.zeros_like(w)
        for _ in range(n):
            epsilon = epsilon + rho * unit(world.gradient(w + epsilon, x, y))
            epsilon = epsilon * min(1.0, rho / float(epsilon.norm()))
        return world.gradient(w + epsilon, x, y), w, 0

    return step


def joined(join):
    """A method that makes its step of g and g' = grad L(w + rho g / ||g||); ``join`` returns it, or it and the rest."""

    def make(world, rho, **options):
        def step(t, w, x, y, world):
            g = world.gradient(w, x, y)
            made = join(g, world.gradient(w + rho * unit(g), x, y), **options)
            return (made[0], w, made[1]) if isinstance(made, tuple) else (made, w, 0)

        return step

    return make


def _wsam(g, perturbed, gamma=0.9, decoupled=True):
    weight = gamma / (1 - gamma)
    if decoupled:
        return g, weight * (perturbed - g)
    return g + weight * (perturbed - g)


pgn = joined(lambda g, perturbed, alpha=0.8: (1 - alpha) * g + alpha * perturbed)
wsam = joined(_wsam)
stable = joined(lambda g, perturbed: g.norm() / perturbed.norm() * perturbed)


def gsam(world, rho, *, rho_min, alpha=0.6):
    """g' - alpha (g - g along g'), rho_t = rho_min + (rho - rho_min) lr_t / lr_0."""

    def step(t, w, x, y, world):
        radius = rho_min + (rho - rho_min) * world.lr(t) / world.lr(0)
        g = world.gradient(w, x, y)
        perturbed = world.gradient(w + radius * unit(g), x, y)
        return perturbed - alpha * (g - along(g, perturbed)), w, 0

    return step


def second_order(world, rho):
    """g' + (d eps / d w)^T g'."""

    def step(t, w, x, y, world):
        w = w.clone().requires_grad_()
        (g,) = torch.autograd.grad(world.loss(w, x, y).mean(), w, create_graph=True)
        epsilon = rho * g / g.norm()
        perturbed = world.gradient((w + epsilon).detach(), x, y)
        (term,) = torch.autograd.grad(epsilon, w, perturbed)
        return perturbed + term, w.detach(), 0

    return step


def functional(world, rho):
    """J(w + eps)^T dL/dF(w)."""

    def step(t, w, x, y, world):
        g = world.gradient(w, x, y)
        output = world.forward(w, x).detach().requires_grad_()
        (by_output,) = torch.autograd.grad(world.criterion(output, y).mean(), output)
        away = (w + rho * unit(g)).requires_grad_()
        (result,) = torch.autograd.grad(world.forward(away, x), away, by_output)
        return result, w, 0

    return step


def looksam(world, rho, *, every=5, alpha=0.1):
    """Every k-th step SAM, keeping g_v = g' - g' along g; else g + alpha ||g|| / ||g_v|| g_v."""
    kept = None

    def step(t, w, x, y, world):
        nonlocal kept
        g = world.gradient(w, x, y)
        if t % every:
            return g + alpha * g.norm() / kept.norm() * kept, w, 0
        perturbed = world.gradient(w + rho * unit(g), x, y)
        kept = perturbed - along(perturbed, g)
        return perturbed, w, 0

    return step


def when(active):
    """SAM on the steps for which ``active(t, g)``, the base's step on the others."""

    def make(world, rho, **options):
        decide = active(**options)

        def step(t, w, x, y, world):
            g = world.gradient(w, x, y)
            return (world.gradient(w + rho * unit(g), x, y) if decide(t, g) else g), w, 0

        return step

    return make


def _ae(total_steps, delta=0.9, lambda_1=-1.0, lambda_2=1.0):
    mean = variance = 0.0

    def decide(t, g):
        nonlocal mean, variance
        squared = float(g @ g)
        mean = delta * mean + (1 - delta) * squared
        variance = delta * variance + (1 - delta) * (squared - mean) ** 2
        c = t / total_steps * lambda_1 + (1 - t / total_steps) * lambda_2
        return squared >= mean + c * math.sqrt(variance)

    return decide


every_k = when(lambda every=5: lambda t, g: t % every == 0)
late = when(lambda total_steps: lambda t, g: t >= 0.9 * total_steps)
warmup_off = when(lambda warmup_steps: lambda t, g: t >= warmup_steps)
bernoulli = when(
    lambda probability=0.5, seed=0: lambda t, g: random.Random(seed * 1_000_003 + t).random() < probability
)
ae_sam = when(_ae)


def m_sam(world, rho, *, m):
    """The mean over micro-batches of m of their SAM gradients."""

    def step(t, w, x, y, world):
        total, statistics = 0, []
        for first in range(0, len(x), m):
            part = x[first : first + m], y[first : first + m]
            g = world.gradient(w, *part)
            total = total + len(part[0]) * world.gradient(w + rho * unit(g), *part)
            world.next_masks(len(part[0]))
            statistics.append((w, part[0]))
        return total / len(x), statistics, 0

    return step


def quarter(world, rho, *, fraction=0.25):
    """The ascent on the first part of the batch, which is also what batch statistics see."""

    def step(t, w, x, y, world):
        n = math.ceil(fraction * len(x))
        g = world.gradient(w, x[:n], y[:n])
        return world.gradient(w + rho * unit(g), x, y), [(w, x[:n])], 0

    return step


def k_sam(world, rho, *, fraction=0.5):
    """Both passes on the samples with the largest loss."""

    def step(t, w, x, y, world):
        chosen = world.loss(w, x, y).argsort(descending=True, stable=True)[: math.ceil(fraction * len(x))].sort().values
        g = world.gradient(w, x[chosen], y[chosen])
        return world.gradient(w + rho * unit(g), x[chosen], y[chosen]), w, 0

    return step


def esam_sds(world, rho, *, fraction=0.5):
    """The second pass on the samples whose loss rises most."""

    def step(t, w, x, y, world):
        away = w + rho * unit(world.gradient(w, x, y))
        rise = world.loss(away, x, y) - world.loss(w, x, y)
        chosen = rise.argsort(descending=True, stable=True)[: math.ceil(fraction * len(x))].sort().values
        return world.gradient(away, x[chosen], y[chosen]), w, 0

    return step


def bsam(world, w, batches, rho, *, lr, size, betas=(0.9, 0.999), decay=0.0, damping=0.1, seed=0):
    """bSAM (Möllenhoff and Khan), from m = 0 and s = 1: the weights after each step."""
    m, s, path = torch.zeros_like(w), torch.ones_like(w), []
    for t, (x, y) in enumerate(batches):
        world.begin(t)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + t)
        draws = [torch.randn(part.shape, generator=generator, dtype=w.dtype) for part in world.tensors(w)]
        theta = w + torch.cat([part.reshape(-1) for part in draws]) / (size * s).sqrt()
        g = world.gradient(theta, x, y)
        perturbed = world.gradient(w + rho * g / s, x, y)
        m = betas[0] * m + (1 - betas[0]) * (perturbed + decay * w)
        w = w - lr * m / s
        s = betas[1] * s + (1 - betas[1]) * (s.sqrt() * g.abs() + decay + damping)
        path.append(w)
    return path
