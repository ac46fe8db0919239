"""The small world of the family, in float64: a network with BatchNorm and dropout, its batches, the base optimizers.

flatwise sees the network as a module. An oracle sees the same network as ``Problem``, a function of one flat vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, SAMPLES, FEATURES, CLASSES = 50, 12, 6, 3
LR, MOMENTUM, DECAY = 0.05, 0.9, 1e-3
ADAM_EPS = 1e-4
"""Adam divides by ``sqrt(v) + eps``: with 1e-8 a gradient that should be zero, as that of a bias before BatchNorm,
would be blown up from rounding error to a whole step, and nothing could be compared to 1e-10."""
BASES = ("sgd", "adamw")
Batch = tuple[Tensor, Tensor]


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A bias before BatchNorm, units that are off, a convolution (three dimensions, for filters), dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, FEATURES),
            nn.BatchNorm1d(FEATURES),
            nn.ReLU(),
            nn.Unflatten(1, (1, FEATURES)),
            nn.Conv1d(1, 4, 3),
            nn.Dropout(0.3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        ).to(dtype)


def batches(steps: int = STEPS, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Another random batch in every step."""
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(steps, SAMPLES, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    ys = torch.randint(CLASSES, (steps, SAMPLES), generator=generator)
    return list(zip(xs, ys, strict=True))


def reseed(step: int) -> None:
    """Before a step, so that flatwise and the oracle draw the same masks in it."""
    torch.manual_seed(1000 + step)


def flat(of: nn.Module | Iterable[Tensor]) -> Tensor:
    """A copy, as one vector: of the tensors, or of the weights of a module."""
    tensors = of.parameters() if isinstance(of, nn.Module) else of
    return torch.cat([torch.zeros(0), *(t.detach().reshape(-1) for t in tensors)])


def base_of(base: str, params: Any, lr: float = LR) -> torch.optim.Optimizer:
    """torch's own."""
    if base == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=MOMENTUM, weight_decay=DECAY)
    return torch.optim.AdamW(params, lr=lr, weight_decay=DECAY, eps=ADAM_EPS)


class Problem:
    """The network as a function of one flat vector: all that an oracle may ask."""

    def __init__(self, data: Sequence[Batch], make: Callable[[], nn.Module] = network) -> None:
        self._model, self._data = make(), data
        self.names = [name for name, _ in self._model.named_parameters()]
        self.shapes = [p.shape for p in self._model.parameters()]
        norms = [m for m in self._model.modules() if isinstance(m, nn.BatchNorm1d | nn.LayerNorm)]
        inside = {p for m in norms for p in m.parameters()}
        self.in_norm = [p in inside for p in self._model.parameters()]
        self.begin(0)

    def start(self) -> Tensor:
        """The weights at the beginning."""
        return flat(self._model)

    def buffers(self) -> Tensor:
        return flat(self._model.buffers())

    def begin(self, step: int) -> None:
        reseed(step)
        self.step, self._counted = step, False
        self._random = self._after = torch.get_rng_state()

    def begin_part(self) -> None:
        """A part of a batch is as a batch of its own: its masks follow those before it, its statistics count."""
        self._random, self._counted = self._after, False

    @property
    def size(self) -> int:
        """Samples in the batch."""
        return len(self._data[self.step][0])

    def cut(self, w: Tensor) -> list[Tensor]:
        """The vector in the shapes of the parameters."""
        sizes = [shape.numel() for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(w.split(sizes), self.shapes, strict=True)]

    def outputs(self, w: Tensor, samples: Tensor | None = None) -> Tensor:
        """The logits at w, differentiable. Every pass has the same masks; the buffers stay those of the first one."""
        x = self._data[self.step][0]
        weights = dict(zip(self.names, self.cut(w), strict=True))
        buffers = {name: b.clone() for name, b in self._model.named_buffers()}
        torch.set_rng_state(self._random)
        inputs = x if samples is None else x[samples]
        result: Tensor = torch.func.functional_call(self._model, {**weights, **buffers}, (inputs,))
        if not self._counted:
            self._counted, self._after = True, torch.get_rng_state()
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])
        return result

    def criterion(self, outputs: Tensor, samples: Tensor | None = None) -> Tensor:
        """The loss of each sample, of the logits."""
        y = self._data[self.step][1]
        return F.cross_entropy(outputs, y if samples is None else y[samples], reduction="none")

    def loss(self, w: Tensor, samples: Tensor | None = None) -> Tensor:
        """The mean loss at w, differentiable; of all samples, or of those with the given indices."""
        return self.criterion(self.outputs(w, samples), samples).mean()

    def gradient(self, w: Tensor, samples: Tensor | None = None) -> Tensor:
        w = w.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(self.loss(w, samples), w)
        return g


class SGD:
    """v <- mu v + (g + lambda w); w <- w - lr v."""

    def __init__(self) -> None:
        self.lr, self.momentum = LR, None

    def step(self, w: Tensor, g: Tensor) -> Tensor:
        g = g + DECAY * w
        self.momentum = g if self.momentum is None else MOMENTUM * self.momentum + g
        return w - self.lr * self.momentum


class AdamW:
    """Loshchilov and Hutter, ICLR 2019, Algorithm 2; ``momentum`` is its first average."""

    def __init__(self) -> None:
        self.lr, self.t, self.momentum, self._second = LR, 0, None, 0.0

    def step(self, w: Tensor, g: Tensor) -> Tensor:
        self.t += 1
        self.momentum = 0.9 * (0.0 if self.momentum is None else self.momentum) + 0.1 * g
        self._second = 0.999 * self._second + 0.001 * g**2
        m_hat, v_hat = self.momentum / (1 - 0.9**self.t), self._second / (1 - 0.999**self.t)
        return w - self.lr * (m_hat / (v_hat.sqrt() + ADAM_EPS) + DECAY * w)
