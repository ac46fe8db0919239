"""What the side-by-side tests of the family share: a network with BatchNorm and dropout, its batches, and two loops.

``run_fast`` drives flatwise. ``run_oracle`` drives an oracle, which sees the same network as a function of one flat
vector of all weights. Both return the weights and the buffers after every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise

STEPS, SAMPLES, FEATURES, CLASSES = 50, 12, 6, 3
LR, MOMENTUM, DECAY = 0.05, 0.9, 1e-3
ADAM_EPS = 1e-4
"""Adam divides by ``sqrt(v) + eps``: with 1e-8 a gradient that should be zero, as that of a bias before BatchNorm,
would be blown up from rounding error to a whole step, and nothing could be compared to 1e-10."""
BASES = ("sgd", "adamw")
Batch = tuple[Tensor, Tensor]


def network(seed: int = 0) -> nn.Sequential:
    """A convolution (three dimensions, for filters), BatchNorm, dropout; smooth; float64."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, FEATURES)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16, 5),
        nn.Tanh(),
        nn.Linear(5, CLASSES),
    ).double()


def batches(steps: int = STEPS, seed: int = 1) -> list[Batch]:
    """Another random batch in every step."""
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn(steps, SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    ys = torch.randint(CLASSES, (steps, SAMPLES), generator=generator)
    return list(zip(xs, ys, strict=True))


def reseed(step: int) -> None:
    """Before a step, and in the oracle before every pass: so the masks of a step are the same in both of its passes."""
    torch.manual_seed(1000 + step)


def base_of(base: str, params: Any, lr: float = LR) -> torch.optim.Optimizer:
    """torch's own."""
    if base == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=MOMENTUM, weight_decay=DECAY)
    return torch.optim.AdamW(params, lr=lr, weight_decay=DECAY, eps=ADAM_EPS)


def flat(tensors: Any) -> Tensor:
    """One vector, a copy."""
    return torch.cat([torch.zeros(0).double(), *(t.detach().reshape(-1).double() for t in tensors)])


@dataclass
class Path:
    """The weights and the buffers after every step, each one vector."""

    weights: list[Tensor]
    buffers: list[Tensor]

    def assert_close(self, expected: Path, tolerance: float = 1e-10, *, buffers: bool = True) -> None:
        pairs = [("weights", self.weights, expected.weights), ("buffers", self.buffers, expected.buffers)]
        for what, ours, theirs in pairs if buffers else pairs[:1]:
            for step, (got, want) in enumerate(zip(ours, theirs, strict=True)):
                assert torch.isfinite(want).all(), f"the oracle's {what} of step {step}"
                off = (got - want).abs().max()
                assert off <= tolerance, f"{what} of step {step} are off by {float(off):.1e}"  # false for NaN


def run_fast(
    name: str,
    options: dict[str, Any],
    base: str = "sgd",
    steps: int = STEPS,
    *,
    data: Sequence[Batch] | None = None,
    make: Callable[[], nn.Module] = network,
    reduction: str = "mean",
    before: Callable[[int, Any], None] | None = None,
) -> Path:
    """Train with ``flatwise.create``, and return the path.

    ``model=True`` among the options stands for the model that is trained. ``reduction="none"`` is for methods that ask
    for one loss of each sample. ``before(step, opt)`` runs before each step (to set a learning rate).
    """
    model = make()
    if options.get("model") is True:
        options = {**options, "model": model}
    opt = flatwise.create(name, base_of(base, model.parameters()), **options)
    path = Path([], [])
    for step, batch in enumerate(data or batches(steps)):
        if before:
            before(step, opt)
        reseed(step)
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1], reduction=reduction), batch)
        path.weights.append(flat(model.parameters()))
        path.buffers.append(flat(model.buffers()))
    return path


class Problem:
    """The network as a function of one flat vector: all that an oracle may ask."""

    def __init__(self, data: Sequence[Batch], make: Callable[[], nn.Module] = network) -> None:
        self._model, self._data, self.step = make(), data, 0
        self.names = [name for name, _ in self._model.named_parameters()]
        self.shapes = [p.shape for p in self._model.parameters()]
        norms = [m for m in self._model.modules() if isinstance(m, nn.BatchNorm1d | nn.LayerNorm)]
        inside = {p for m in norms for p in m.parameters()}
        self.in_norm = [p in inside for p in self._model.parameters()]
        self._counted = False

    def start(self) -> Tensor:
        """The weights at the beginning."""
        return flat(self._model.parameters())

    def buffers(self) -> Tensor:
        return flat(self._model.buffers())

    def begin(self, step: int) -> None:
        self.step, self._counted = step, False

    def cut(self, w: Tensor) -> list[Tensor]:
        """The vector in the shapes of the parameters."""
        sizes = [shape.numel() for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(w.split(sizes), self.shapes, strict=True)]

    def spread(self, values: Sequence[Any]) -> Tensor:
        """One value for each parameter, as a vector with one for each weight."""
        return torch.cat([torch.full((s.numel(),), v) for s, v in zip(self.shapes, values, strict=True)])

    def outputs(self, w: Tensor, samples: Tensor | None = None) -> Tensor:
        """The logits at w, differentiable, with this step's masks; buffers stay those of the step's first pass."""
        x = self._data[self.step][0]
        weights = dict(zip(self.names, self.cut(w), strict=True))
        buffers = {name: b.clone() for name, b in self._model.named_buffers()}
        reseed(self.step)
        inputs = x if samples is None else x[samples]
        result: Tensor = torch.func.functional_call(self._model, {**weights, **buffers}, (inputs,))
        if not self._counted:
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])
        self._counted = True
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


Rule = Callable[[Tensor, Problem, Any], Tensor]
"""``rule(w, problem, base)`` returns the next weights: it asks ``problem.gradient`` and calls ``base.step``."""


def oracle_steps(
    rule: Rule, base: str, data: Sequence[Batch], make: Callable[[], nn.Module], skip: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    problem = Problem(data, make)
    optimizer, w = {"sgd": SGD, "adamw": AdamW}[base](), problem.start()
    for step in range(len(data)):
        problem.begin(step)
        if step not in skip:
            w = rule(w, problem, optimizer)
        yield w, problem.buffers()


def run_oracle(
    make_rule: Callable[[], Rule],
    base: str = "sgd",
    steps: int = STEPS,
    *,
    data: Sequence[Batch] | None = None,
    make: Callable[[], nn.Module] = network,
    skip: Sequence[int] = (),
) -> Path:
    """Train with an oracle, and return the path. The steps in ``skip`` did not happen."""
    pairs = list(oracle_steps(make_rule(), base, data or batches(steps), make, skip))
    return Path([w for w, _ in pairs], [b for _, b in pairs])
