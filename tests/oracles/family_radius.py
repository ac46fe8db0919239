"""The radius that sets itself, from the equations of docs/frugal.md: float64, one flat vector w, nothing of flatwise.

The form is that of ``family_ascent``. A step that looks has g = grad L(w), g' = grad L(w + eps), the losses l and l',
and the base's momentum v:

    turn = <g, g'> / (||g|| ||g'||), slope = (l' - l) / (1 - turn), rise = (l' - l) / l
    drag <- 3/4 drag + 1/4 <g, v> / (||g|| ||v||)
    q = min(arccos(turn*) / arccos(turn), slope / slope*, rise* / rise, drag* / drag where drag > drag*)
    rho <- max(rho_0 / 8, rho clip(q^k, 1/2, 2))
"""

import math

import torch

from oracles.family_ascent import norm


def cosine(a, b):
    return float((a * b).sum() / (norm(a) * norm(b)))


class Rho:
    """rho, what it was at first, and what is counted."""

    def __init__(
        self, rho, first_looks, every, up, turn=0.93, slope=4.5, rise=0.35, drag=0.05, down=0.05, slow=0.5, memory=0.75
    ):
        self.rho = self.rho_0 = rho
        self.first_looks, self.every, self.up = first_looks, every, up
        self.turn, self.slope, self.rise, self.drag = turn, slope, rise, drag
        self.down, self.slow, self.memory = down, slow, memory
        self.steps = self.looks = 0
        self.average = 0.0

    def step(self):
        """Count a step; does it look?"""
        t, self.steps = self.steps, self.steps + 1
        if self.looks < self.first_looks:
            return t % 2 == 1
        return t % self.every == 0

    def seen(self, g, g_prime, loss, loss_prime, v):
        turn, rise = cosine(g, g_prime), (loss_prime - loss) / loss
        slope = (loss_prime - loss) / (1 - turn)
        if v is not None:
            self.average = self.memory * self.average + (1 - self.memory) * cosine(g, v)
        q = min(math.acos(self.turn) / math.acos(turn), max(slope, 0) / self.slope)
        if rise > 0:
            q = min(q, self.rise / rise)
        same_way = self.average > self.drag
        if same_way:
            q = min(q, self.drag / self.average)
        if self.looks < self.first_looks:
            k = 1
        elif q > 1:
            k = self.up
        else:
            k = self.slow if same_way else self.down
        self.looks += 1
        self.rho = max(self.rho_0 / 8, self.rho * min(2, max(1 / 2, q**k)))


def loss(L, w):
    with torch.no_grad():
        return float(L.loss(w))


def sam(rho, first_looks=12, every=4, up=0.2, **settings):
    """SAM; each look costs no gradient."""
    r = Rho(rho, first_looks, every, up, **settings)

    def rule(w, L, base):
        looks = r.step()
        g = L.gradient(w)
        eps = r.rho * g / norm(g)
        g_prime = L.gradient(w + eps)
        if looks:
            r.seen(g, g_prime, loss(L, w), loss(L, w + eps), base.momentum)
        return base.step(w, g_prime)

    return rule


def frugal(rho, first_looks=12, every=32, up=1.0, **settings):
    """eps = -rho v / ||v||; a look has eps = (rho / s) g / ||g|| and steps with g'.

    s = 6 with SGD, for which the radius begins at ``rho``; s = 1 in the Adam family, where it begins at ``rho / 6``.
    """
    r = None

    def rule(w, L, base):
        nonlocal r
        s = 1 if type(base).__name__ == "AdamW" else 6
        r = r or Rho(rho * s / 6, first_looks, every, up, **settings)
        looks, v = r.step(), base.momentum
        if v is None:
            return base.step(w, L.gradient(w))
        if not looks:
            return base.step(w, L.gradient(w - r.rho * v / norm(v)))
        g = L.gradient(w)
        eps = r.rho / s * g / norm(g)
        g_prime = L.gradient(w + eps)
        r.seen(g, g_prime, loss(L, w), loss(L, w + eps), v)
        return base.step(w, g_prime)

    return rule
