"""Small models, closures and comparisons that the tests of the core share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(2))


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def with_batchnorm(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def with_dropout(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))


MODELS = {"mlp": mlp, "batchnorm": with_batchnorm, "dropout": with_dropout}


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Another batch in every step."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def closure_of(model: nn.Module, opt: Any, x: Tensor = X, y: Tensor = Y) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, opt: Any, steps: Iterable[int] = range(4)) -> list[Tensor]:
    """Take steps, wrapped or plain: a plain optimizer runs the closure once."""
    return [opt.step(closure_of(model, opt, *batch(step))).detach() for step in steps]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that a checkpoint of the module would hold."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, through any nesting."""
    if isinstance(a, Tensor):
        if not (isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape):
            return False
        if a.layout is torch.strided and not a.dtype.is_complex and a.numel():
            a, b = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (a, b))
        return torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def assert_same(a: Any, b: Any, path: str = "") -> None:
    if isinstance(a, dict) and isinstance(b, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}[{key!r}]")
    else:
        assert same(a, b), f"{path or 'values'} differ: {a} != {b}"


class Held:
    """Remembers weights and their addresses, to assert later that both are as they were."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = list(params)
        for param in self._params:
            if param.numel():
                param.data[param.data == 0] = 0  # a base that adds zero turns -0.0 into 0.0
        self._copies = [p.detach().clone() for p in self._params]
        self._addresses = [p.data_ptr() for p in self._params]

    def moved(self) -> bool:
        return not all(map(same, (p.detach() for p in self._params), self._copies))

    def assert_exact(self) -> None:
        for index, (param, copy) in enumerate(zip(self._params, self._copies, strict=True)):
            assert same(param.detach(), copy), f"parameter {index} is off by {(param.detach() - copy).abs().max()}"
        assert [p.data_ptr() for p in self._params] == self._addresses
