"""The radius that sets itself: its equations with numbers by hand, what it refuses, and what a look holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.core_cases import mlp
from torch import Tensor, nn

import flatwise
from flatwise import AutoRadius, Frugal
from flatwise.radius import Gauge, Seen, as_auto, first_looks

ANGLE = math.acos(0.93)
NAN = math.nan


def follow(seen: Seen, rho: float = 1.0, *, settled: bool = True, one_pass: bool = True, **options: Any) -> float:
    return AutoRadius(**options).next(rho, seen, first=options.get("first", 1.0), settled=settled, one_pass=one_pass)


def turned(share: float, rise: float = NAN, drag: float | None = None, slope: float = NAN) -> Seen:
    """An angle that is ``share`` of the one that is aimed at."""
    turn = math.cos(share * ANGLE)
    return Seen(turn, rise, drag, slope * (1 - turn))


@pytest.mark.parametrize(
    ("seen", "settled", "one_pass", "expected"),
    [
        # The first looks go by the quotient itself.
        (turned(0.8), False, True, 1.25),
        (turned(0.8), False, False, 1.25),
        (turned(1.25), False, True, 0.8),
        (turned(0.1), False, True, 2.0),
        (turned(4.0), False, True, 0.5),
        (turned(0.8, rise=0.28), False, True, 1.25),
        (turned(0.8, rise=0.5), False, True, 0.7),
        (turned(0.8, rise=-3.0), False, True, 1.25),
        (turned(0.8, rise=0.1, drag=0.0625), False, True, 0.8),
        (turned(0.8, rise=0.1, drag=0.05), False, True, 1.25),
        (turned(0.8, rise=0.1, drag=-0.9), False, True, 1.25),
        (turned(1.25, rise=0.7, drag=0.08), False, True, 0.5),
        (turned(0.8, slope=9.0), False, True, 1.25),
        (turned(0.8, slope=5.4), False, True, 1.2),
        (turned(0.8, slope=3.6), False, True, 0.8),
        (turned(1.25, slope=3.15), False, True, 0.7),
        (turned(0.8, rise=0.5, slope=3.6), False, True, 0.7),
        (turned(0.8, rise=0.4, slope=3.15), False, True, 0.7),
        (turned(0.8, slope=3.6, drag=0.1), False, True, 0.5),
        (turned(0.8, slope=0.9), False, True, 0.5),
        (turned(0.8, slope=0.0), False, True, 0.5),
        (turned(0.8, slope=-9.0), False, True, 0.5),
        # Later ones by its power: up, down or slow.
        (turned(0.8), True, True, 1.25),
        (turned(0.8), True, False, 1.25**0.2),
        (turned(0.1), True, False, 10**0.2),
        (turned(1.25), True, True, 0.8**0.05),
        (turned(1.25), True, False, 0.8**0.05),
        (turned(0.8, rise=0.7), True, True, 0.5**0.05),
        (turned(0.8, slope=3.6), True, True, 0.8**0.05),
        (turned(0.8, slope=5.4), True, True, 1.2),
        (turned(0.8, slope=5.4), True, False, 1.2**0.2),
        (turned(0.8, slope=3.6, drag=0.0625), True, True, 0.8**0.5),
        (turned(0.8, drag=0.0625), True, True, 0.8**0.5),
        (turned(2.0, drag=0.0625), True, True, 0.5**0.5),
        # No turn at all: as far up as it goes. Nothing seen: as it was.
        (Seen(1.0, NAN, None), False, True, 2.0),
        (Seen(1.0000001, NAN, None), False, True, 2.0),
        (Seen(1.0000001, NAN, None, 1e-5), False, True, 2.0),
        (Seen(-1.0, NAN, None), False, True, 0.5),
        (Seen(NAN, 5.0, 0.9), False, True, 1.0),
        (turned(0.8, rise=math.inf), False, True, 0.5),
    ],
)
def test_the_next_radius_by_hand(seen: Seen, settled: bool, one_pass: bool, expected: float) -> None:
    assert follow(seen, settled=settled, one_pass=one_pass) == pytest.approx(expected, rel=1e-12)
    assert follow(seen, 3.0, settled=settled, one_pass=one_pass) == pytest.approx(3 * expected, rel=1e-12)


def test_it_does_not_fall_below_an_eighth_of_the_first() -> None:
    rule = AutoRadius()
    assert rule.next(0.2, turned(9.0), first=1.0, settled=False, one_pass=True) == 0.125
    assert rule.next(0.125, turned(9.0), first=1.0, settled=True, one_pass=False) == 0.125
    assert rule.next(0.125, turned(0.5), first=1.0, settled=True, one_pass=True) == pytest.approx(0.25)


def test_settings_are_used() -> None:
    assert follow(turned(0.8, rise=0.1), settled=False, rise=0.05) == pytest.approx(0.5)
    assert follow(turned(0.8, drag=0.5), settled=False, drag=0.4) == pytest.approx(0.8)
    assert follow(turned(0.8, slope=3.6), settled=False, slope=4.0) == pytest.approx(0.9)
    assert follow(turned(0.8, slope=0.1), settled=False, slope=0.0) == pytest.approx(1.25)
    assert follow(turned(0.5), up=0.5) == pytest.approx(2**0.5)
    assert follow(turned(0.5), up=0.5, one_pass=False) == pytest.approx(2**0.5)
    assert follow(turned(2.0), down=0.25) == pytest.approx(0.5**0.25)
    assert follow(turned(2.0), down=0.0) == 1.0
    assert follow(turned(2.0, drag=0.06), slow=0.0) == 1.0
    assert follow(Seen(math.cos(0.2), NAN, None), settled=False, turn=math.cos(0.3)) == pytest.approx(1.5)


def test_when_it_looks() -> None:
    def steps(total: int | None, one_pass: bool, last: int, **options: Any) -> list[int]:
        found: list[int] = []
        rule = AutoRadius(**options)
        for step in range(last):
            if rule.looks(step, len(found), one_pass=one_pass, total_steps=total):
                found.append(step)
        return found

    odd = list(range(1, 24, 2))
    assert steps(None, True, 130) == [*odd, 32, 64, 96, 128]
    assert steps(None, False, 40) == [*odd, 24, 28, 32, 36]
    assert steps(100, False, 30) == [*odd, 24, 28]
    assert steps(200, True, 100) == [1, 3, 5, 32, 64, 96]
    assert steps(10, True, 33) == [1, 32]
    assert steps(10, True, 20, every=5) == [1, 5, 10, 15]
    assert steps(None, False, 40, every=6) == [*odd, 24, 30, 36]


def test_how_many_first_looks() -> None:
    totals = (1, 60, 100, 200, 500, 800, 10**6, None)
    assert [first_looks(one_pass=True, total_steps=total) for total in totals] == [1, 1, 2, 3, 8, 12, 12, 12]
    assert {first_looks(one_pass=False, total_steps=total) for total in totals} == {12}


def test_the_drag_is_averaged() -> None:
    rule = AutoRadius()
    assert rule.smoothed(None, 0.4) == pytest.approx(0.1)
    assert rule.smoothed(0.4, 0.8) == pytest.approx(0.75 * 0.4 + 0.25 * 0.8)
    assert rule.smoothed(0.4, NAN) == 0.4
    assert rule.smoothed(None, NAN) is None
    assert AutoRadius(memory=0.0).smoothed(0.4, 0.8) == 0.8


def test_the_first_radius() -> None:
    assert (AutoRadius().first(1.0), AutoRadius(start=0.2).first(6.0)) == (0.05, pytest.approx(1.2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"turn": 0.0}, r"turn is a cosine and must be in \(0, 1\), got 0.0"),
        ({"turn": 1.0}, "turn is a cosine"),
        ({"turn": NAN}, "turn is a cosine"),
        ({"slope": -1.0}, "slope must be >= 0, got -1.0"),
        ({"slope": NAN}, "slope must be >= 0"),
        ({"rise": 0.0}, "rise must be > 0, got 0.0"),
        ({"rise": NAN}, "rise must be > 0"),
        ({"drag": -0.1}, "drag must be > 0, got -0.1"),
        ({"start": 0.0}, "start must be a finite number > 0, got 0.0"),
        ({"start": math.inf}, "start must be a finite number > 0"),
        ({"every": 1}, "every must be a whole number >= 2, got 1"),
        ({"every": 2.5}, "every must be a whole number >= 2"),
        ({"up": 0.0}, r"up must be in \(0, 1\], got 0.0"),
        ({"up": 1.5}, "up must be in"),
        ({"down": -0.1}, r"down must be in \[0, 1\], got -0.1"),
        ({"slow": 1.1}, r"slow must be in \[0, 1\], got 1.1"),
        ({"memory": 1.0}, r"memory must be in \[0, 1\), got 1.0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AutoRadius(**options)


def test_reading_rho() -> None:
    rule = AutoRadius(turn=0.9)
    assert as_auto(rule) is rule
    assert as_auto("auto") == AutoRadius()
    assert [as_auto(rho) for rho in (0.1, None, lambda step: 0.1, torch.tensor(0.1))] == [None] * 4
    with pytest.raises(TypeError, match="rho must be a number, a function of the step or 'auto', got 'aut'"):
        as_auto("aut")


def gauged(param: nn.Parameter, first: Tensor, second: Tensor, momentum: Tensor | None) -> Gauge:
    base = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    if momentum is not None:
        base.state[param]["momentum_buffer"] = momentum
    gauge = Gauge()
    param.grad = first
    gauge.before([param], base)
    param.grad = second
    gauge.after()
    return gauge


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize(("size", "stride"), [(8192, 1), (8193, 8), (20_001, 8)])
def test_of_large_tensors_each_eighth_number_is_looked_at(size: int, stride: int) -> None:
    torch.manual_seed(0)
    a, b, v = (torch.randn(size, dtype=torch.float64) for _ in range(3))
    b, v = a + 0.3 * b, a - v
    gauge = gauged(nn.Parameter(torch.zeros(size, dtype=torch.float64)), a.clone(), b, v)
    assert gauge.turn() == pytest.approx(cosine(a[::stride], b[::stride]), abs=1e-12)
    assert gauge.drag() == pytest.approx(cosine(a[::stride], v[::stride]), abs=1e-12)


def test_a_sampled_tensor_is_as_heavy_as_all_of_it() -> None:
    """Where one tensor turns and one does not, the weight of each is the length of its whole gradient."""
    params = [nn.Parameter(torch.zeros(n)) for n in (80_000, 2000)]
    base, gauge = torch.optim.SGD(params, lr=0.1), Gauge()
    firsts = [torch.ones(80_000), torch.ones(2000) * 5]
    for param, grad in zip(params, firsts, strict=True):
        param.grad = grad
    gauge.before(params, base)
    params[1].grad = -firsts[1]
    gauge.after()
    assert gauge.turn() == pytest.approx((80_000 - 2000 * 25) / (80_000 + 2000 * 25), rel=1e-4)
    assert math.isnan(gauge.drag())


def test_a_look_holds_an_eighth_of_a_copy() -> None:
    param = nn.Parameter(torch.zeros(100, 1000))
    param.grad = torch.ones(100, 1000)
    gauge = Gauge()
    gauge.before([param], torch.optim.SGD([param], lr=0.1))
    held = sum(kept.untyped_storage().nbytes() for _, kept in gauge._first)
    assert held == param.numel() * 4 // 8
    gauge.after()
    assert not gauge._first


def test_parts_of_a_batch_are_averaged() -> None:
    param, gauge = nn.Parameter(torch.zeros(2)), Gauge()
    base = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    base.state[param]["momentum_buffer"] = torch.tensor([1.0, 0.0])
    for first, second in (([1.0, 0.0], [0.0, 1.0]), ([0.0, 2.0], [0.0, 5.0])):
        param.grad = torch.tensor(first)
        gauge.before([param], base)
        param.grad = torch.tensor(second)
        gauge.after()
    assert (gauge.turn(), gauge.drag()) == (pytest.approx(0.5), pytest.approx(0.5))


def test_nothing_compared_is_not_a_number() -> None:
    gauge = Gauge()
    assert math.isnan(gauge.turn())
    assert math.isnan(gauge.drag())


def test_gradients_that_are_sparse_or_gone_and_momentum_of_another_shape() -> None:
    table = nn.Embedding(50, 3, sparse=True)
    base = torch.optim.SGD(table.parameters(), lr=0.1, momentum=0.9)
    gauge = Gauge()
    for weight in (1.0, 2.0):
        table.weight.grad = None
        (table(torch.tensor([3, 4])).sum() * weight).backward()
        if weight == 1:
            gauge.before([table.weight], base)
    gauge.after()
    assert gauge.turn() == pytest.approx(1.0)
    param = nn.Parameter(torch.zeros(4))
    assert math.isnan(gauged(param, torch.ones(4), torch.ones(4), torch.ones(2, 2)).drag())


def test_frugal_is_its_row() -> None:
    options: dict[str, Any] = {"total_steps": 500, "max_grad_norm": 1.0}
    models = [mlp(), mlp()]
    bases = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    one, two = Frugal(bases[0], **options), flatwise.create("frugal", bases[1], **options)
    for name in ("_ascent", "_descent", "_schedule", "_batching", "_auto", "_max_grad_norm"):
        assert getattr(one, name) == getattr(two, name), name
    assert one.param_groups[0]["rho"] == two.param_groups[0]["rho"] == pytest.approx(0.3)
    adam = Frugal(torch.optim.AdamW(mlp().parameters(), lr=0.1), rho=AutoRadius(start=0.02))
    assert adam.param_groups[0]["rho"] == 0.02
    with pytest.raises(ValueError, match="climbing against the momentum needs a base optimizer that has one"):
        Frugal(torch.optim.SGD(mlp().parameters(), lr=0.1))
