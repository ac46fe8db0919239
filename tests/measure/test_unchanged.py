"""Measuring changes nothing: modes, gradients, buffers, random states and weights are put back, also on error."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from flatwise.measure.unchanged import Displaced, seed_all, unchanged


class Custom(nn.Module):
    """A buffer that the forward pass replaces instead of writing into it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls = self.calls + 1
        return x


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Custom(), nn.Dropout(), nn.Linear(4, 1))
    model[1].eval()
    model[4].bias.requires_grad_(False)
    model(torch.randn(5, 3)).sum().backward()
    return model


def state(model):
    return {
        "modes": [m.training for m in model.modules()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "wanted": [p.requires_grad for p in model.parameters()],
        "buffers": [(name, id(b), b.tolist()) for name, b in model.named_buffers()],
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


def disturb(model):
    model.train()
    seed_all(3)
    model.requires_grad_(True)
    model(torch.randn(6, 3)).sum().backward()
    random.random()
    np.random.rand()


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails):
    model = network()
    before = state(model)
    try:
        with unchanged(model):
            disturb(model)
            assert state(model) != before
            if fails:
                raise KeyError
    except KeyError:
        pass
    after = state(model)
    assert {key for key in before if before[key] != after[key]} == set()


def test_gradients_of_the_caller_get_nothing_added():
    model = network()
    with unchanged(model):
        assert all(p.grad is None for p in model.parameters())


def test_seeding_decides_what_is_drawn():
    draws = []
    for _ in range(2):
        seed_all(7)
        draws.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
    assert draws[0] == draws[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_displaced_weights_come_back_bit_for_bit(dtype):
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(3, 2, dtype=dtype)), nn.Parameter(torch.randn(4, dtype=dtype))]
    places, before = [p.data_ptr() for p in params], [p.detach().clone() for p in params]
    offset = [torch.randn(p.shape) for p in params]
    with pytest.raises(ZeroDivisionError), Displaced(params) as moved:
        moved.move(offset, 0.5)
        for p, w, d in zip(params, before, offset, strict=True):
            assert torch.equal(p.detach(), w + 0.5 * d.to(dtype))
        moved.move(offset, 2.0)  # counted from the origin, not from where the weights are
        for p, w, d in zip(params, before, offset, strict=True):
            assert torch.equal(p.detach(), w + 2 * d.to(dtype))
        moved.place([torch.zeros_like(w) for w in before])
        assert not any(p.detach().any() for p in params)
        raise ZeroDivisionError
    assert all(torch.equal(p.detach(), w) for p, w in zip(params, before, strict=True))
    assert [p.data_ptr() for p in params] == places
