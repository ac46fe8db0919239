"""One norm over tensors of every dtype, size and scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flatwise import SAM, norms
from flatwise.norms import BLOCK, FEW, SMALL, all_finite, combine, joint_norm, packs
from oracles.perturbation import norm as exact_norm

INF = math.inf
QS = [1, 1.25, 2, 3, 11, INF]
HALF = [torch.float16, torch.bfloat16]
RHO = 0.05

# torch adds the powers of large float32 tensors one after the other, which costs digits: rel=1e-4.
each_q = pytest.mark.parametrize("q", QS, ids=str)


def exact(tensors: list[Tensor], q: float) -> float:
    """In float64, of numbers divided by the largest, so that no power leaves the range."""
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    peak = flat.abs().max()
    return float(peak * exact_norm(flat / peak, q))


COLLECTIONS = {
    "one": [(5,)],
    "scalars": [(), ()],
    "many shapes": [(3, 4), (7,), (), (2, 2, 2, 2)],
    "few enough to pack": [(SMALL,), (3, 5), (SMALL // 2, 3), (4,)],
    "small and large": [(BLOCK,), (3, 5), (SMALL // 2, 3), (4,)],
    "just below large": [(SMALL - 1,), (SMALL,), (SMALL + 1,), (SMALL + 1,)],
    "many": [(17,)] * 60,
    "many small and one large": [(17,)] * FEW + [(BLOCK,), (SMALL - 1,)],
    "with empty ones": [(0,), (3,), (2, 0), (4,), (0,)],
}


@each_q
@pytest.mark.parametrize("shapes", COLLECTIONS.values(), ids=list(COLLECTIONS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_the_norm_of_all_together(q: float, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    got = joint_norm(tensors, q)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.shape == ()
    assert float(got) == pytest.approx(exact(tensors, q), rel=1e-12 if dtype == torch.float64 else 1e-4)


@each_q
def test_mixed_dtypes(q: float) -> None:
    dtypes = (torch.float16, torch.float32, torch.bfloat16, torch.float64, torch.float16)
    tensors = [torch.randn(6).to(dtype) for dtype in dtypes]
    got = joint_norm(tensors, q)
    assert got.dtype == torch.float64
    assert float(got) == pytest.approx(exact(tensors, q), rel=1e-6)
    assert joint_norm(tensors[:3], q).dtype == torch.float32


@each_q
def test_views_that_are_not_contiguous(q: float) -> None:
    base = torch.randn(40, 30)
    tensors = [base.T, base[::2, ::3], base[:, 3], base[0].expand(4, 30)]
    assert float(joint_norm(tensors, q)) == pytest.approx(exact(tensors, q), rel=1e-5)


@pytest.mark.parametrize("tensors", [[], [torch.zeros(0)], [torch.zeros(0, 3), torch.zeros(0)]], ids=str)
def test_nothing_has_the_norm_zero(tensors: list[Tensor]) -> None:
    assert joint_norm(tensors).item() == 0.0


# Squares and other powers that leave the range of the dtype


@each_q
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 6e4),
        (torch.float16, 1e-6),
        (torch.bfloat16, 1e25),
        (torch.bfloat16, 1e-25),
        (torch.float32, 1e25),
        (torch.float32, 1e19),
        (torch.float32, 1e-15),
        (torch.float32, 1e-19),
        (torch.float32, 1e-22),
        (torch.float32, 3e-23),
        (torch.float32, 1e-23),
        (torch.float32, 1e-25),
    ],
    ids=str,
)
def test_numbers_whose_powers_leave_the_range(q: float, dtype: torch.dtype, size: float) -> None:
    tensors = [(torch.rand(n) / 2 + 0.5).mul(size).to(dtype) for n in (3, 50)]
    assert float(joint_norm(tensors, q)) == pytest.approx(exact(tensors, q), rel=1e-4)


@pytest.mark.parametrize("q", [31, 101])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_high_orders(q: float, size: float, dtype: torch.dtype) -> None:
    """p close to 1 makes q large: |g|^101 is nothing at g = 1e-4."""
    tensors = [(torch.rand(n) / 2 + 0.5).mul(size).to(dtype) for n in (3, 50)]
    assert float(joint_norm(tensors, q)) == pytest.approx(exact(tensors, q), rel=1e-4)


@each_q
@pytest.mark.parametrize("bad", [INF, -INF, math.nan], ids=str)
def test_what_is_not_finite_stays_so(q: float, bad: float) -> None:
    for dtype in (torch.float64, torch.float32, *HALF):
        tensors = [torch.ones(3, dtype=dtype), torch.tensor([1.0, bad], dtype=dtype)]
        assert not torch.isfinite(joint_norm(tensors, q))


# The way of accelerators, run where the tests run


@each_q
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_the_norms_of_an_accelerator_agree_with_those_of_the_host(q: float, dtype: torch.dtype) -> None:
    kind = [torch.randn(shape).to(dtype) for shape in ((3, 4), (7,), (SMALL,), (BLOCK,), ())]
    accumulate = norms.accumulation_dtype(dtype)
    got = norms._device_norms(kind, q, accumulate)
    assert {n.dtype for n in got} == {accumulate}
    host = combine(norms._host_norms(kind, q, accumulate), q)
    assert float(combine(got, q)) == pytest.approx(float(host), rel=1e-5)


@each_q
def test_a_step_with_them(q: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    p = INF if q == 1 else 1 if q == INF else q / (q - 1)
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(norms, "_host_norms", norms._device_norms)
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(30, dtype=torch.float64))
        opt = SAM(torch.optim.SGD([w], lr=0.1), RHO, p=p)
        opt.step(lambda x, w=w: (w * x).sin().sum(), torch.randn(30, dtype=torch.float64))
        ends.append(w.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


# Combination, finiteness, packs


@each_q
def test_norms_of_parts_combine(q: float) -> None:
    parts = [torch.randn(4, dtype=torch.float64) for _ in range(3)]
    got = combine([joint_norm([p], q) for p in parts], q)
    assert float(got) == pytest.approx(exact(parts, q), rel=1e-12)
    assert combine([torch.tensor(2.0), torch.tensor(1.0, dtype=torch.float64)], q).dtype == torch.float64


@pytest.mark.parametrize("bad", [INF, -INF, math.nan], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(3,), (SMALL,), (BLOCK + 1,), (BLOCK // 2, 3)], ids=str)
def test_one_bad_element_is_found(bad: float, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = [torch.ones(5, dtype=dtype), torch.ones(shape, dtype=dtype), torch.ones(2)]
    assert bool(all_finite(tensors))
    tensors[1].view(-1)[-1] = bad
    before = tensors[1].clone()
    assert not bool(all_finite(tensors))
    assert torch.equal(tensors[1].nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("bad", [INF, -INF, math.nan], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("more", [1, BLOCK], ids=str)
def test_one_bad_element_of_many_tensors_is_found(bad: float, dtype: torch.dtype, more: int) -> None:
    tensors = [torch.ones(5, dtype=dtype) for _ in range(FEW)] + [torch.ones(more, dtype=dtype)]
    assert bool(all_finite(tensors))
    for tensor in (tensors[0], tensors[-1]):
        tensor[-1] = bad
        before = tensor.clone()
        assert not bool(all_finite(tensors))
        assert torch.equal(tensor.nan_to_num(), before.nan_to_num())
        tensor[-1] = 1
    assert bool(all_finite(tensors))


def test_large_finite_numbers_are_finite() -> None:
    """Their sum and their squares are not."""
    for dtype in (torch.float64, torch.float32, *HALF):
        most = torch.full((BLOCK,), torch.finfo(dtype).max, dtype=dtype)
        assert bool(all_finite([most, most[:9], -most]))


def test_no_tensors_are_finite() -> None:
    assert bool(all_finite([]))
    assert bool(all_finite([torch.zeros(0)]))


def test_packs_keep_pairs_and_kinds_together() -> None:
    sizes = [3, 50, 0, 120, 7, 40, 60]
    firsts = [torch.full((n,), i).to(torch.float64 if i % 2 else torch.float32) for i, n in enumerate(sizes)]
    seconds = [t.clone().half() for t in firsts]
    seen = []
    for first, second in packs(firsts, seconds, limit=100):
        assert len({t.dtype for t in first}) == 1
        assert sum(t.numel() for t in first) <= 100
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.half(), b)
            seen.append(int(a[0]))
    assert sorted(seen) == [0, 1, 3, 3, 4, 5, 6]  # the one of 120 elements is cut in two


# What it is for: the step


@pytest.mark.parametrize(("adaptive", "groups"), [(False, 1), (False, 2), (True, 1)])
@pytest.mark.parametrize("p", [1, 1.2, 1.5, 2, 3, INF], ids=str)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 300.0),
        (torch.float16, 1e-3),
        (torch.bfloat16, 1e25),
        (torch.bfloat16, 1e-25),
        (torch.float32, 1e25),
        (torch.float32, 2e18),
        (torch.float32, 1e-4),
        (torch.float32, 1e-15),
        (torch.float32, 3e-23),
        (torch.float32, 1e-30),
        (torch.float32, 1e-38),
    ],
    ids=str,
)
def test_the_perturbation_has_its_length_at_every_scale_of_the_gradient(
    p: float, adaptive: bool, groups: int, dtype: torch.dtype, size: float
) -> None:
    weights = [torch.nn.Parameter((torch.rand(n) + 0.5).to(dtype)) for n in (3, 40)]
    start = [w.detach().double() for w in weights]
    parts = [{"params": weights}] if groups == 1 else [{"params": [w]} for w in weights]
    opt = SAM(torch.optim.SGD(parts, lr=0.0), 1.0, p=p, adaptive=adaptive)
    for w in weights:
        w.grad = ((torch.rand_like(w) + 0.5) * torch.where(torch.rand_like(w) < 0.5, -1, 1) * size).to(dtype)
    assert opt.perturb()
    eps = torch.cat([w.detach().double() - s for w, s in zip(weights, start, strict=True)])
    opt.restore()
    T = torch.cat([s.abs() if adaptive else torch.ones_like(s) for s in start])
    # Rounding of w + eps in half precision, element by element, is what remains.
    assert float(exact_norm(eps / T, p)) == pytest.approx(1.0, rel=1e-3 if dtype == torch.float32 else 3e-2)
    for w, s in zip(weights, start, strict=True):
        assert torch.equal(w.detach().double(), s)
