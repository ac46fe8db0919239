"""A small network with BatchNorm and dropout, twice: as modules, and as a function of one flat vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SAMPLES, INPUTS, WIDTH, CLASSES, STEPS = 12, 6, 8, 3, 50
DECAY = 1e-3


def network(*, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Make the network, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = (
            nn.Linear(INPUTS, WIDTH),
            nn.BatchNorm1d(WIDTH),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(WIDTH, CLASSES),
        )
        return nn.Sequential(*layers).to(dtype)


def batches(steps: int = STEPS, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Make random batches, always the same."""
    generator = torch.Generator().manual_seed(6)
    return [
        (
            torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(CLASSES, (SAMPLES,), generator=generator),
        )
        for _ in range(steps)
    ]


def flat(model: nn.Module) -> Tensor:
    """Return all weights as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class World:
    """What an oracle may ask: losses and gradients of a flat vector, the base's momentum, the learning rate."""

    def __init__(self, lr: Any = 0.05) -> None:
        self._model = network()
        self._shapes = [(name, p.shape) for name, p in self._model.named_parameters()]
        self.momentum: Tensor | None = None
        self.lr = lr if callable(lr) else lambda t: lr
        self._random = torch.get_rng_state()

    def begin(self, step: int) -> None:
        """Start a step: every pass has the masks of this state."""
        with torch.random.fork_rng():
            torch.manual_seed(1000 + step)
            self._random = torch.get_rng_state()

    def next_masks(self, samples: int) -> None:
        """Go to the masks that follow those of a pass over so many samples."""
        with torch.random.fork_rng():
            torch.set_rng_state(self._random)
            F.dropout(torch.ones(samples, WIDTH, dtype=torch.float64), 0.3)
            self._random = torch.get_rng_state()

    def tensors(self, w: Tensor) -> list[Tensor]:
        """Cut a vector into the shapes of the parameters."""
        parts = torch.split(w, [shape.numel() for _, shape in self._shapes])
        return [part.view(shape) for part, (_, shape) in zip(parts, self._shapes, strict=True)]

    def mask(self, word: str) -> Tensor:
        """Tell which weights belong to a parameter with ``word`` in its name."""
        return torch.cat([torch.full((shape.numel(),), word in name) for name, shape in self._shapes])

    def forward(self, w: Tensor, x: Tensor) -> Tensor:
        """Return the logits, with batch statistics."""
        w1, b1, scale, shift, w2, b2 = self.tensors(w)
        h = x @ w1.T + b1
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * scale + shift
        with torch.random.fork_rng():
            torch.set_rng_state(self._random)
            h = F.dropout(h.relu(), 0.3)
        return h @ w2.T + b2

    @staticmethod
    def criterion(output: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each sample."""
        return F.cross_entropy(output, y, reduction="none")

    def loss(self, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each sample."""
        return self.criterion(self.forward(w, x), y)

    def gradient(self, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of the mean loss."""
        w = w.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(self.loss(w, x, y).mean(), w)
        return g

    def statistics(self, w: Tensor, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return BatchNorm's running statistics after one pass."""
        w1, b1 = self.tensors(w)[:2]
        h = x @ w1.T + b1
        return 0.9 * mean + 0.1 * h.mean(0), 0.9 * var + 0.1 * h.var(0, correction=1)


class Momentum:
    """SGD with momentum 0.9 and weight decay."""

    def make(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """Return torch's."""
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=DECAY)

    def step(self, world: World, t: int, w: Tensor, g: Tensor) -> Tensor:
        """Return the next weights."""
        g = g + DECAY * w
        world.momentum = g if world.momentum is None else 0.9 * world.momentum + g
        return w - world.lr(t) * world.momentum


class AdamW:
    """AdamW."""

    def __init__(self) -> None:
        self.v: Tensor | float = 0.0

    def make(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """Return torch's."""
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=DECAY, eps=1e-4)

    def step(self, world: World, t: int, w: Tensor, g: Tensor) -> Tensor:
        """Return the next weights."""
        m = 0.0 if world.momentum is None else world.momentum
        world.momentum = 0.9 * m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        corrected = world.momentum / (1 - 0.9 ** (t + 1)), self.v / (1 - 0.999 ** (t + 1))
        lr = world.lr(t)
        return w - lr * DECAY * w - lr * corrected[0] / (corrected[1].sqrt() + 1e-4)
