"""From gradients to a displacement: the two forms of the formula, and every way of moving weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flatwise import SAM, Ball, GradientAscent, update
from flatwise.norms import SMALL
from flatwise.record import StepRecord
from flatwise.update import withhold_nonfinite
from flatwise.weights import CHUNK, ROWS_FROM, Displacement, Piece, pieces_of
from oracles.perturbation import epsilon_hat

INF = math.inf
PS = [1, 1.2, 1.5, 2, 3, 8, INF]
RHO = 0.25
BALLS = [
    pytest.param(Ball(p, **scaling), id=f"p={p}{name}")
    for p in PS
    for name, scaling in (("", {}), (" adaptive", {"adaptive": True}), (" eta", {"adaptive": True, "eta": 0.1}))
]
each_ball = pytest.mark.parametrize("ball", BALLS)


def tensors(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


# The formula


@each_ball
@pytest.mark.parametrize("groups", [[(3, 2), (4,)], [(5,)], [(), (1,), (2, 1, 2), (0,), (7,)]], ids=str)
def test_the_two_forms_of_the_formula_agree(ball: Ball, groups: list[tuple[int, ...]]) -> None:
    """``climb`` overwrites what it is given, ``perturbation`` is as printed; each group of one tensor."""
    weights, grads = tensors(tuple(groups)), tensors(tuple(groups))
    rhos = [RHO * (i + 1) for i in range(len(groups))]
    printed = ball.perturbation(weights, grads, rhos)
    directions = [g.clone() for g in grads]
    climb = ball.climb([[w] for w in weights], [[g] for g in directions])
    for direction, rho, expected in zip(directions, rhos, printed, strict=True):
        torch.testing.assert_close(rho * climb.scale * direction, expected, rtol=1e-12, atol=1e-14)
    w, g = (torch.cat([t.flatten() for t in ts]) for ts in (weights, grads))
    rho = torch.cat([torch.full_like(w.flatten(), r) for r, w in zip(rhos, weights, strict=True)])
    oracle = epsilon_hat(w, g, rho, p=ball.p, adaptive=ball.adaptive, eta=ball.eta)
    torch.testing.assert_close(torch.cat([e.flatten() for e in printed]), oracle, rtol=1e-12, atol=1e-14)


@each_ball
def test_a_climb_does_not_depend_on_how_tensors_are_packed(ball: Ball, monkeypatch: pytest.MonkeyPatch) -> None:
    import flatwise.ascent as module

    shapes = ((3, 2), (4,), (9,), (1,))
    weights, grads = tensors(shapes), tensors(shapes)
    ends = []
    for limit in (1 << 20, 5):
        pack = module.packs
        monkeypatch.setattr(module, "packs", lambda *ts, pack=pack, limit=limit: pack(*ts, limit=limit))
        directions = [g.clone() for g in grads]
        climb = ball.climb([weights], [directions])
        ends.append([climb.scale * d for d in directions])
        monkeypatch.undo()
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


@each_ball
@pytest.mark.parametrize("bad", [0.0, math.nan, INF], ids=str)
def test_without_a_direction_nothing_moves(ball: Ball, bad: float) -> None:
    grads = [torch.full((3,), bad), torch.full((2,), bad)]
    climb = ball.climb([[torch.ones(3), torch.ones(2)]], [grads])
    assert float(climb.scale) == 0


def test_ties_of_the_diamond_share_the_radius() -> None:
    w = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    w.grad = torch.tensor([2.0, -2.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    opt = SAM(torch.optim.SGD([w], lr=0.1), 0.3, p=1)
    assert opt.perturb()
    torch.testing.assert_close(w.detach(), torch.tensor([0.1, -0.1, 0.0, 0.1, 0.0], dtype=torch.float64))
    opt.restore()
    assert opt.last.perturbation_norm == pytest.approx(0.3)


def test_a_large_order_is_nearly_the_box_and_a_small_one_nearly_the_diamond() -> None:
    weights, grads = tensors(((6,),)), [torch.tensor([1.0, -3.0, 2.0, 0.5, -0.7, 2.5]).double()]
    for p, limit in ((1e6, INF), (1.01, 1)):
        (near,), (end,) = (Ball(order).perturbation(weights, grads, [1.0]) for order in (p, limit))
        torch.testing.assert_close(near, end, rtol=1e-3, atol=1e-3)


def test_weights_that_are_zero_stay_so_without_eta() -> None:
    w = torch.nn.Parameter(torch.tensor([0.0, 1.0, -2.0]))
    w.grad = torch.ones(3)
    opt = SAM(torch.optim.SGD([w], lr=0.1), 0.3, adaptive=True, p=INF)
    assert opt.perturb()
    torch.testing.assert_close(w.detach(), torch.tensor([0.0, 1.3, -1.4]))
    opt.restore()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ball(0.5), "p must be"),
        (lambda: Ball(math.nan), "p must be"),
        (lambda: Ball(-INF), "p must be"),
        (lambda: Ball(2, True, -1.0), "eta"),
        (lambda: Ball(2, True, INF), "eta"),
        (lambda: Ball(2, False, 0.1), "adaptive=True"),
        (lambda: GradientAscent(steps=0), "ascent_steps"),
        (lambda: GradientAscent(steps=1.0), "ascent_steps"),
        (lambda: GradientAscent(steps=True), "ascent_steps"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# The ways of moving weights. Each is reached by the kind of gradient, so the same numbers go through all of them.


def dense(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def few_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    grad = torch.zeros(shape, dtype=dtype)
    grad[[3, 100, shape[0] - 1]] = torch.randn(3, *shape[1:]).to(dtype)
    return grad


WAYS = {
    "clone": ((20, 30), dense, "_Whole"),
    "clone, vector": ((SMALL - 1,), dense, "_Whole"),
    "swap": ((SMALL // 8, 8), dense, "_Swapped"),
    "swap, several chunks": ((2 * CHUNK + 5,), dense, "_Swapped"),
    "swap, few rows but small": ((SMALL // 8, 8), few_rows, "_Swapped"),
    "rows": ((ROWS_FROM // 8, 8), few_rows, "_Rows"),
    "rows, deeper": ((ROWS_FROM // 8, 2, 4), few_rows, "_Rows"),
    "large and dense": ((ROWS_FROM // 8, 8), dense, "_Swapped"),
}


@pytest.fixture(autouse=True)
def _swap_already_what_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatwise.weights.SWAP_FROM", SMALL)


@pytest.mark.filterwarnings("ignore:only .* of the perturbation arrives")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "make", "way"), WAYS.values(), ids=list(WAYS))
def test_every_way_moves_as_far_and_comes_back(shape: tuple[int, ...], make: Any, way: str, dtype: torch.dtype) -> None:
    w = torch.nn.Parameter(torch.randn(shape).to(dtype))
    before, address, grad = w.detach().clone(), w.data_ptr(), make(shape, dtype)
    opt = SAM(torch.optim.SGD([w], lr=0.1), RHO)
    w.grad = grad.clone()
    assert opt.perturb()
    # Half precision is not swapped: the factor of torch.add is rounded to the dtype of the weights.
    way = "_Whole" if way == "_Swapped" and dtype == torch.bfloat16 else way
    assert [type(entry).__name__ for entry in opt._look._displacement._log] == [way]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    length = torch.linalg.vector_norm(grad.double())
    assert opt.last.gradient_norm == pytest.approx(float(length), rel=1e-4)
    expected = (before.to(wide) + (RHO / opt.last.gradient_norm) * grad.to(wide)).to(dtype)
    rounding = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(w.detach(), expected, rtol=rounding, atol=rounding)
    assert not torch.equal(w.detach(), before) or dtype == torch.bfloat16
    opt.restore()
    assert torch.equal(w.detach(), before)
    assert w.data_ptr() == address


@pytest.mark.parametrize("way", ["swap", "swap, several chunks", "rows", "large and dense"])
@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"p": 1}, {"p": 3}, {"p": INF}], ids=str)
def test_a_step_by_every_way_is_that_of_the_clone(
    way: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import flatwise.weights as module

    shape, make, _ = WAYS[way]
    if way == "swap, several chunks":
        monkeypatch.setattr(module, "CHUNK", SMALL + 3)
    torch.manual_seed(0)
    start, mask = torch.randn(shape), make(shape, torch.float32)
    ends = []
    for small in (module.SMALL, 1 << 62):
        monkeypatch.setattr(module, "SMALL", small)
        w, bias = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.zeros(3))
        opt = SAM(torch.optim.SGD([w, bias], lr=0.1), RHO, **options)
        for _ in range(2):
            opt.step(lambda m, w=w, b=bias: ((w * m) ** 2).sum() + (w * m).sum() + (b - 1).pow(2).sum(), mask)
        ends.append(w.detach())
    assert not torch.equal(ends[0], start)
    torch.testing.assert_close(ends[0], ends[1], rtol=2e-6, atol=1e-6)


def test_a_gradient_that_somebody_holds_is_not_used_as_the_copy() -> None:
    w = torch.nn.Parameter(torch.randn(SMALL))
    held = torch.randn(SMALL)
    w.grad = held
    opt = SAM(torch.optim.SGD([w], lr=0.1), RHO)
    before, copy = w.detach().clone(), held.clone()
    opt.perturb()
    assert [type(entry).__name__ for entry in opt._look._displacement._log] == ["_Whole"]
    assert torch.equal(held, copy)
    opt.restore()
    assert torch.equal(w.detach(), before)


def test_a_gradient_that_is_used_on_does_not_change_what_is_restored() -> None:
    w, x = torch.nn.Parameter(torch.randn(SMALL)), torch.randn(SMALL)
    before, kept = w.detach().clone(), []
    opt = SAM(torch.optim.SGD([w], lr=0.0), RHO)

    def keep_the_first() -> Tensor:
        opt.zero_grad()
        loss = (w * x).sin().sum()
        loss.backward()
        if kept:
            kept[0].zero_()
        kept.append(w.grad)
        return loss

    opt.step(keep_the_first)
    assert torch.equal(w.detach(), before)


def test_a_gradient_that_is_a_view_is_not_used_as_the_copy() -> None:
    """As DistributedDataParallel hands them out, from its buckets."""
    bucket = torch.randn(2 * SMALL)
    w = torch.nn.Parameter(torch.randn(SMALL))
    w.grad = bucket[:SMALL]
    rest, before = bucket[SMALL:].clone(), w.detach().clone()
    opt = SAM(torch.optim.SGD([w], lr=0.1), RHO)
    opt.perturb()
    assert torch.equal(bucket[SMALL:], rest)
    bucket.fill_(7.0)
    opt.restore()
    assert torch.equal(w.detach(), before)


def test_sparse_gradients_move_their_rows() -> None:
    table = torch.nn.Embedding(10, 4, sparse=True, dtype=torch.float64)
    before = table.weight.detach().clone()
    opt = SAM(torch.optim.SGD(table.parameters(), lr=0.1), RHO)
    table(torch.tensor([2, 5, 5])).pow(2).sum().backward()
    grad = table.weight.grad.to_dense()
    assert opt.perturb()
    torch.testing.assert_close(table.weight.detach(), before + RHO * grad / grad.norm(), rtol=1e-12, atol=1e-14)
    opt.restore()
    assert torch.equal(table.weight.detach(), before)


def test_complex_weights_are_pairs_of_real_ones() -> None:
    w = torch.nn.Parameter(torch.randn(4, dtype=torch.complex128))
    before, address = w.detach().clone(), w.data_ptr()
    opt = SAM(torch.optim.SGD([w], lr=0.1), RHO)
    w.grad = g = torch.randn(4, dtype=torch.complex128)
    expected = before + RHO * g / torch.linalg.vector_norm(torch.view_as_real(g))
    assert opt.perturb()
    torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-14)
    opt.restore()
    assert torch.equal(w.detach(), before)
    assert w.data_ptr() == address


# The branches of accelerators, run where the tests run


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (SMALL,), (ROWS_FROM // 8, 8)], ids=str)
def test_a_factor_on_the_device_moves_as_far(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    make = few_rows if len(shape) == 2 else dense
    start, grad, factor = torch.randn(shape).to(dtype), make(shape, dtype), 0.125  # exact in every dtype
    ends = []
    for kind in (float, torch.tensor):
        w = torch.nn.Parameter(start.clone())
        w.grad = grad.clone()
        displacement = Displacement()
        displacement.add(pieces_of([w], find_rows=True), kind(factor))
        ends.append(w.detach().clone())
        displacement.undo()
        assert torch.equal(w.detach(), start)
    assert not torch.equal(ends[0], start)
    assert torch.equal(ends[0], ends[1])


def test_mixed_pieces_with_a_factor_on_the_device() -> None:
    params = [torch.nn.Parameter(t) for t in (torch.randn(3), torch.randn(2, 2).half(), torch.randn(SMALL))]
    starts = [p.detach().clone() for p in params]
    pieces = [Piece(p, torch.ones_like(p), p, torch.ones_like(p)) for p in params]
    displacement = Displacement()
    for i in range(3):
        displacement.add([pieces[i]], torch.tensor(0.5))
    for p, start in zip(params, starts, strict=True):
        assert torch.equal(p.detach(), start + 0.5)
    assert len(displacement.moved()) == 3
    displacement.undo()
    displacement.undo()
    for p, start in zip(params, starts, strict=True):
        assert torch.equal(p.detach(), start)


def on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the verdict as a tensor, as accelerators do."""
    finite = update.all_finite
    monkeypatch.setattr(update, "all_finite", lambda grads: torch.tensor(bool(finite(grads))))


def base_with_gradients(bad: float | None, **options: Any) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    base = torch.optim.SGD(params, lr=0.1, **options)
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    if bad is not None:
        params[1].grad[0] = bad
    return base, params


@pytest.mark.parametrize("bad", [math.nan, INF, -INF], ids=str)
def test_a_non_finite_gradient_becomes_zero_on_an_accelerator(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    base, params = base_with_gradients(bad)
    on_an_accelerator(monkeypatch)
    record = StepRecord()
    withhold_nonfinite(base, record)
    assert [p.grad.tolist() for p in params] == [[0.0] * 3, [0.0] * 2]
    assert not record.updated
    assert record.reason == "non-finite update"


def test_a_finite_one_stays_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    base, params = base_with_gradients(None)
    on_an_accelerator(monkeypatch)
    record = StepRecord()
    withhold_nonfinite(base, record)
    assert [p.grad.tolist() for p in params] == [[2.0] * 3, [2.0] * 2]
    assert record.updated


@pytest.mark.parametrize("bad", [None, math.nan], ids=str)
def test_a_fused_base_is_told_on_an_accelerator(bad: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GradScaler tells it; it then skips the step by itself."""
    base, params = base_with_gradients(bad, fused=True)
    on_an_accelerator(monkeypatch)
    withhold_nonfinite(base, StepRecord())
    assert base.found_inf.item() == (bad is not None)
    base.step()
    assert params[0].tolist() == pytest.approx([1.0 if bad is not None else 0.8] * 3)


def test_each_step_of_a_fused_base_has_its_own_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that was skipped does not stop those after it, and one that was made does not let NaN through."""
    on_an_accelerator(monkeypatch)
    w = torch.nn.Parameter(torch.ones(3))
    opt = SAM(torch.optim.SGD([w], lr=0.125, fused=True), RHO, p=INF)
    ends = []
    for factor in (1.0, math.nan, 1.0, math.nan, 1.0):
        opt.step(lambda x: (w * x).sum(), torch.full((3,), factor))
        ends.append((w[0].item(), opt.last.updated))
    assert ends == [(0.875, True), (0.875, False), (0.75, True), (0.75, False), (0.625, True)]


@pytest.mark.parametrize("bad", [math.nan, INF], ids=str)
def test_a_non_finite_gradient_is_removed_on_the_host(bad: float) -> None:
    base, params = base_with_gradients(bad, momentum=0.9)
    record = StepRecord()
    withhold_nonfinite(base, record)
    assert all(p.grad is None for p in params)
    assert not record.updated
    base.step()
    assert not base.state
