"""Small models in float64, and their dense matrices: the slow oracle of everything about curvature.

torch.func (of torch 2.14) returns a Hessian that is not symmetric where a normalisation layer is called, in forward and
in reverse mode. So in the oracle these layers are written out, from means and squares. Finite differences are
tested against the same matrices.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatwise.measure.problem import Problem


class Tied(nn.Module):
    """One matrix in two places, one parameter that nothing uses, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x) + self.frozen))


class Attention(nn.Module):
    """A transformer layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(dim=1))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def squares(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), F.one_hot(batch[1], 3).double())


def logistic(model: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0])[:, 0], (batch[1] > 0).double())


def smooth_l1(model: nn.Module, batch: Any) -> Tensor:
    return F.smooth_l1_loss(model(batch[0]), F.one_hot(batch[1], 3).double(), beta=0.3)


def physics(model: nn.Module, batch: None) -> Tensor:
    """u'' + u = 0 on some points, without targets: the loss differentiates by its inputs."""
    x = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None].requires_grad_()
    u = model(x)
    slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
    return ((bend + u) ** 2).mean()


@dataclass
class Case:
    """A model, a loss and one batch."""

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    batch: Any
    mode: str = "eval"


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def _cnn() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Softplus(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )
    model[1].running_mean.uniform_(-0.2, 0.2)
    model[1].running_var.uniform_(0.5, 1.5)
    return model


def make(name: str) -> Case:
    torch.manual_seed(0)
    flat = (torch.randn(12, 3).double(), torch.randint(3, (12,)))
    tokens = (torch.randn(6, 3, 4).double(), torch.randint(3, (6,)))
    image = (torch.randn(12, 1, 6, 6).double(), torch.randint(3, (12,)))
    made = {
        "mlp": lambda: Case(_mlp(), cross_entropy, flat),
        "mlp squares": lambda: Case(_mlp(), squares, flat),
        "mlp logistic": lambda: Case(_mlp(), logistic, flat),
        "mlp smooth": lambda: Case(_mlp(), smooth_l1, flat),
        "cnn eval": lambda: Case(_cnn(), cross_entropy, image),
        "cnn train": lambda: Case(_cnn(), cross_entropy, image, "train"),
        "transformer": lambda: Case(Attention(), cross_entropy, tokens),
        "tied": lambda: Case(Tied(), cross_entropy, (torch.randint(5, (12,)), torch.randint(5, (12,)))),
        "physics": lambda: Case(nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)), physics, None),
    }[name]()
    made.model.double()
    return made


ALL = ("mlp", "mlp squares", "mlp logistic", "mlp smooth", "cnn eval", "cnn train", "transformer", "tied", "physics")


def problem_of(case: Case, **options: Any) -> Problem:
    return Problem(case.model, case.loss_fn, [case.batch], mode=case.mode, **options)


class WrittenOut(nn.Module):
    """What a normalisation layer computes, from elementary operations."""

    def __init__(self, layer: Any, dims: tuple[int, ...], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.dims, self.shape = layer.weight, layer.bias, layer.eps, dims, shape

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(self.dims, keepdim=True)
        scale = (centred.square().mean(self.dims, keepdim=True) + self.eps).sqrt()
        return centred / scale * self.weight.view(self.shape) + self.bias.view(self.shape)


def _written_out(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm):
            setattr(module, name, WrittenOut(child, (-1,), (-1,)))
        elif isinstance(child, nn.BatchNorm2d) and child.training:
            setattr(module, name, WrittenOut(child, (0, 2, 3), (1, -1, 1, 1)))
        else:
            _written_out(child)


def _flat_function(case: Case, parameters: Any, value: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], Tensor]:
    """``value(model, batch)`` as a function of one vector of the chosen weights."""
    problem = problem_of(case, parameters=parameters)
    model = copy.deepcopy(case.model).train(case.mode == "train")
    _written_out(model)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Tensor:
            return value(self.inner, case.batch)

    whole = Whole()

    def function(vector: Tensor) -> Tensor:
        pieces = problem.shaped(vector)
        named = {f"inner.{name}": p for name, p in zip(problem.names, pieces, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.functional_call(whole, named, ())

    return function, problem.flat(problem.params)


def hessian(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.func.hessian`` without its warning about torch.jit.script."""

    def quiet(at: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.func.hessian(function)(at)

    return quiet


def dense_hessian(case: Case, parameters: Any = None) -> Tensor:
    function, at = _flat_function(case, parameters, case.loss_fn)
    if case.batch is None:  # torch.func does not let a loss call autograd
        return torch.autograd.functional.hessian(function, at)
    return hessian(function)(at).detach()


def dense_gauss_newton(case: Case) -> Tensor:
    """J^T H_L J with the loss as a function of the model's output."""
    output, at = _flat_function(case, None, lambda model, batch: model(batch[0]))
    z = output(at).detach()
    jacobian = torch.func.jacrev(output)(at).reshape(z.numel(), -1)

    def loss(flat: Tensor) -> Tensor:
        return case.loss_fn(lambda _: flat.view_as(z), case.batch)

    outer = hessian(loss)(z.flatten())
    return (jacobian.T @ outer.reshape(z.numel(), z.numel()) @ jacobian).detach()


class Quadratic(nn.Module):
    """``w A w / 2``: its Hessian is A everywhere."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(1)).to(matrix))
        self.register_buffer("matrix", matrix)

    def forward(self) -> Tensor:
        return self.w @ self.matrix @ self.w / 2


def quadratic(model: nn.Module, batch: Any) -> Tensor:
    return model()


def with_spectrum(values: list[float], seed: int = 0, dtype: torch.dtype = torch.float64) -> Quadratic:
    n = len(values)
    turn, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return Quadratic((turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.T).to(dtype))
