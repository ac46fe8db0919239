"""``rho="auto"`` in two processes: their losses differ, their radii do not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.start import on_ranks
from tests.test_ranks import Net, batches, loss_of, mine, weights
from torch.nn.parallel import DistributedDataParallel

import flatwise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
]
STEPS = 30
# The losses decide: no gradient turns as far as this asks for.
RISE = flatwise.AutoRadius(turn=0.01, slope=0.0, rise=0.1, drag=5.0, start=0.5)
SLOPE = flatwise.AutoRadius(turn=0.01, slope=20.0, rise=1e9, drag=5.0, start=0.5)
RULES = {"rise": RISE, "slope": SLOPE}


def train(rank: int, name: str, by: str) -> dict[str, Any]:
    ddp = DistributedDataParallel(Net(norm=False))
    base = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    opt = flatwise.create(name, base, rho=RULES[by], model=ddp, sync_ascent=True)
    radii, rises, turns = [], [], []
    for batch in batches(STEPS):
        opt.step(lambda b: loss_of(ddp, b), mine(rank, batch))
        radii.append(opt.param_groups[0]["rho"])
        if not math.isnan(opt.last.turn):
            rises.append(opt.last.sharpness / opt.last.loss)
            turns.append(opt.last.turn)
    return {"radii": radii, "rises": rises, "turns": turns, "weights": weights(ddp)}


def alone(name: str, by: str) -> dict[str, Any]:
    """The whole batch in one process, whose loss is the mean of theirs."""
    model = Net(norm=False)
    opt = flatwise.create(name, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), rho=RULES[by], model=model)
    radii = []
    for batch in batches(STEPS):
        opt.step(lambda b: loss_of(model, b), batch)
        radii.append(opt.param_groups[0]["rho"])
    return {"radii": radii, "weights": weights(model)}


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("name", ["sam", "frugal"])
def test_ranks_keep_the_same_radius(name: str, by: str, tmp_path: Path) -> None:
    one, two = on_ranks(train, tmp_path, name, by)
    assert one["radii"] == two["radii"]
    assert one["turns"] == two["turns"]
    assert one["rises"] != two["rises"]
    assert torch.equal(one["weights"], two["weights"])
    assert len(set(one["radii"])) > 3
    wanted = alone(name, by)
    assert one["radii"] == pytest.approx(wanted["radii"], rel=1e-4)  # ranks average their losses in float32
    assert torch.allclose(one["weights"], wanted["weights"], rtol=0, atol=1e-4)


def apart(rank: int, by: str) -> list[float]:
    """A model that no wrapper holds together: the losses are a rank's own, and are left out."""
    model = Net(norm=False)
    opt = flatwise.SAM(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), RULES[by])
    for batch in batches(8):
        opt.step(lambda b: loss_of(model, b), batch)
    return [opt.param_groups[0]["rho"]]


@pytest.mark.parametrize("by", RULES)
def test_processes_that_know_nothing_of_each_other_do_not_wait(by: str, tmp_path: Path) -> None:
    one, two = on_ranks(apart, tmp_path, by)
    assert one == two
    assert one[0] > 0.5 / 8  # the losses would have let it fall
