"""One more copy of the weights during a step, and nothing of it between steps."""

from __future__ import annotations

import gc
import weakref
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from flatwise import SAM


def allocations(run):
    """Bytes allocated, at the peak and at the end, relative to the beginning: the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    totals = list(accumulate(e.nbytes() for e in events))
    return max(totals), totals[-1]


# Large beside the packs (4 MB) in which temporary values are made.


def deep():
    return nn.Sequential(nn.Linear(200, 400), *[nn.Linear(400, 400) for _ in range(24)], nn.Linear(400, 200))


def wide():
    return nn.Sequential(nn.Linear(200, 1500), *[nn.Linear(1500, 1500) for _ in range(3)])


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1 << 14, 128)
        self.head = nn.Linear(128, 200)

    def forward(self, x):
        return self.head(self.table((x[:, :5] * 100).abs().long()).mean(1))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Sequential(*deep()[:8]).double(), nn.Sequential(*deep()[8:])

    def forward(self, x):
        return self.two(self.one(x.double()).float().relu())


MODELS = {"deep": deep, "wide": wide, "table": Table, "mixed": Mixed}


def measure(model, opt, steps=2):
    x = torch.randn(2, 200)

    def closure():
        opt.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        return loss.detach()

    opt.step(closure)
    opt.zero_grad()
    gc.collect()
    gc.disable()  # what is freed late by the garbage collector is held too long
    try:
        peak, kept = allocations(lambda: [opt.step(closure) for _ in range(steps)] and None)
    finally:
        gc.enable()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return peak, kept, gradients


OPTIONS = {
    "sam": {},
    "asam": {"adaptive": True, "eta": 0.01},
    "l1": {"p": 1},
    "l3": {"p": 3.0},
    "linf": {"p": float("inf")},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_at_most_one_more_copy_of_the_weights(kind, options):
    model = MODELS[kind]()
    weights = sum(p.nbytes for p in model.parameters())
    plain, kept_plain, gradients = measure(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
    assert plain >= gradients > 0.99 * weights  # the meter sees what there is
    peak, kept, _ = measure(model, SAM(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), rho=0.05, **options))
    assert peak - plain <= 1.05 * weights, f"{(peak - plain) / weights:.2f} copies"
    assert kept - kept_plain <= 1024


def test_a_group_of_radius_zero_is_not_copied():
    model = deep()
    weights = sum(p.nbytes for p in model.parameters())
    half = len(model) // 2
    groups = [
        {"params": list(model[:half].parameters()), "rho": 0.0},
        {"params": list(model[half:].parameters()), "rho": 0.1},
    ]
    plain, _, _ = measure(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    peak, _, _ = measure(model, SAM(torch.optim.SGD(groups, lr=1e-3)))
    assert peak - plain <= 0.55 * weights


def test_a_table_of_which_few_rows_are_used_is_not_copied():
    model = Table()
    weights = sum(p.nbytes for p in model.parameters())
    plain, _, _ = measure(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    peak, _, _ = measure(model, SAM(torch.optim.SGD(model.parameters(), lr=1e-3), rho=0.1))
    assert peak - plain <= 0.1 * weights


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_is_kept_in_the_state(options):
    model = deep()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=1e-3), rho=0.1, **options)
    measure(model, opt)
    assert all(v is None for s in opt.state_dict()["state"].values() for v in s.values())


def test_an_optimizer_that_is_dropped_is_freed_with_its_model():
    model = wide()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=1e-3), rho=0.1)
    measure(model, opt)
    refs = [weakref.ref(opt), weakref.ref(model), weakref.ref(next(model.parameters()))]
    del opt, model
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_a_gradient_inside_a_larger_buffer_keeps_its_numbers() -> None:
    """Somebody else may read a bucket after the first pass: the copy of w must not go into it."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(1024, 1024))
    bucket = torch.zeros(weight.numel() + 1)
    opt, seen = SAM(torch.optim.SGD([weight], lr=0.1), 0.05), []

    def closure() -> Tensor:
        seen.append(bucket[:-1].clone())
        opt.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        bucket[:-1].copy_(weight.grad.flatten())
        weight.grad = bucket[:-1].view_as(weight)
        return loss

    first = 2 * weight.detach().flatten()
    opt.step(closure)
    assert torch.equal(seen[1], first)
