"""The step: Foret et al. (ICLR 2021), Algorithm 1, section 3 (the dropped term) and section 4.1 (m-sharpness)."""

import torch

from oracles.perturbation import epsilon_hat, projected_ascent


def gradient(L, w):
    """The gradient of a function of a flat vector."""
    w = w.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(L(w), w)
    return g


def jacobian_of_epsilon_hat(L, w, rho, **ball):
    """d eps_hat / d w, dense, by differentiating eq. 2 coordinate by coordinate."""
    w = w.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(L(w), w, create_graph=True)
    rows = []
    for epsilon_i in epsilon_hat(w, g, rho, **ball):
        row = torch.zeros_like(w)
        if epsilon_i.requires_grad:
            (found,) = torch.autograd.grad(epsilon_i, w, retain_graph=True, allow_unused=True)
            row = row if found is None else found
        rows.append(row)
    return torch.stack(rows)


def sam_gradient(L, w, rho, *, seen=None, n=1, second_order=False, **ball):
    """grad L(w)|_(w + eps_hat), and with second_order (d eps_hat / d w)^T times it more. ``seen``: L of the ascent."""
    seen = seen or L
    epsilon = projected_ascent(lambda v: gradient(seen, v), w, rho, n, **ball)
    g = gradient(L, w + epsilon)
    if second_order:
        g = g + jacobian_of_epsilon_hat(seen, w, rho, **ball).T @ g
    return g


def batch_gradient(loss, w, samples, rho, *, m=None, seen=None, **options):
    """The SAM gradients of disjoint parts of m samples, averaged by sample count.

    ``loss(w, samples)`` is a mean; ``seen(count)`` tells how many samples of a part, from its start, the ascent sees.
    """
    m = m or len(samples)
    total = torch.zeros_like(w)
    for start in range(0, len(samples), m):
        part = samples[start : start + m]
        first = part[: seen(len(part))] if seen else part
        total += len(part) * sam_gradient(
            lambda v, part=part: loss(v, part),
            w,
            rho,
            seen=lambda v, first=first: loss(v, first),
            **options,
        )
    return total / len(samples)


def train(loss, w, batches, rho, *, lr, momentum=0.0, active=lambda step: True, **options):
    """w <- w - lr * v, v <- momentum * v + g: the weights after each batch."""
    v, path = torch.zeros_like(w), []
    for step, samples in enumerate(batches):
        if active(step):
            g = batch_gradient(loss, w, samples, rho, **options)
        else:
            g = gradient(lambda u, samples=samples: loss(u, samples), w)
        v = momentum * v + g
        w = w - lr * v
        path.append(w)
    return path
