"""On which samples: cutting batches, micro-batches of m, the share that the ascent sees."""

from __future__ import annotations

import collections
import math
from collections import OrderedDict
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flatwise import SAM, Batching
from flatwise.batching import count, narrow


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def rows(n: int = 5) -> Tensor:
    return torch.arange(3 * n).view(n, 3)


x, y = rows(), torch.arange(5)

# A batch of five samples -> its samples 1 to 3.
NESTED: dict[str, tuple[Any, Any]] = {
    "tensor": (x, x[1:3]),
    "tuple": ((x, y), (x[1:3], y[1:3])),
    "list": ([x, y], [x[1:3], y[1:3]]),
    "dict": ({"x": x, "y": y}, {"x": x[1:3], "y": y[1:3]}),
    "ordered dict": (OrderedDict(b=x, a=y), OrderedDict(b=x[1:3], a=y[1:3])),
    "named tuple": (Pair(x, y), Pair(x[1:3], y[1:3])),
    "nested": (
        {"inputs": [x, (y, {"mask": x > 2})], "y": Pair(x, y)},
        {"inputs": [x[1:3], (y[1:3], {"mask": (x > 2)[1:3]})], "y": Pair(x[1:3], y[1:3])},
    ),
    "leaves that are no tensors": ((x, "train", None, 3, 0.5), (x[1:3], "train", None, 3, 0.5)),
    "a tensor without dimensions": ((x, torch.tensor(0.1)), (x[1:3], torch.tensor(0.1))),
}


def check_same(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(got, Tensor):
        assert torch.equal(got, expected)
    elif isinstance(got, dict):
        assert list(got) == list(expected)
        for key in got:
            check_same(got[key], expected[key])
    elif isinstance(got, tuple | list):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            check_same(a, b)
    else:
        assert got == expected


each_nesting = pytest.mark.parametrize(("batch", "cut"), NESTED.values(), ids=list(NESTED))


@each_nesting
def test_a_cut_keeps_the_nesting(batch: Any, cut: Any) -> None:
    assert count(batch) == 5
    check_same(narrow(batch, 1, 3), cut)


@each_nesting
def test_a_cut_is_a_view(batch: Any, cut: Any) -> None:
    leaf = batch
    part = narrow(batch, 1, 3)
    while not isinstance(leaf, Tensor):
        key = next(iter(leaf)) if isinstance(leaf, dict) else 0
        leaf, part = leaf[key], part[key]
    assert part.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()


def test_other_mappings_keep_their_type() -> None:
    class Encoding(collections.UserDict):
        """As tokenizers return it."""

    part = narrow(Encoding(ids=x, mask=y), 1, 3)
    assert type(part) is Encoding
    assert torch.equal(part["mask"], y[1:3])
    assert count(Encoding(ids=x)) == 5


def test_a_default_dict_can_be_cut() -> None:
    """As a collate function may build it."""
    part = narrow(collections.defaultdict(list, ids=x), 1, 3)
    assert torch.equal(part["ids"], x[1:3])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((x, rows(4)), r"batch\[0\]: 5, batch\[1\]: 4"),
        ({"x": x, "deep": [y, rows(6)]}, r"batch\['deep'\]\[1\]: 6"),
        (None, "without tensors"),
        ((1, "a"), "without tensors"),
        (torch.tensor(1.0), "without tensors"),
        (torch.zeros(0, 3), "empty"),
    ],
    ids=["sizes", "nested sizes", "None", "no tensors", "a number", "no samples"],
)
def test_what_cannot_be_cut_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(batch)
    w = torch.nn.Parameter(torch.ones(3))
    opt = SAM(torch.optim.SGD([w], lr=0.1), micro_batch_size=2)
    with pytest.raises(ValueError, match=message):
        opt.step(lambda batch: (w * batch[0]).sum(), batch)
    assert torch.equal(w.detach(), torch.ones(3))


@pytest.mark.parametrize(
    ("m", "n", "sizes"),
    [
        (None, 7, [7]),
        (7, 7, [7]),
        (8, 7, [7]),
        (3, 7, [3, 3, 1]),
        (3, 6, [3, 3]),
        (1, 4, [1, 1, 1, 1]),
        (6, 7, [6, 1]),
        (2, 1, [1]),
    ],
)
def test_micro_batches(m: int | None, n: int, sizes: list[int]) -> None:
    parts = Batching(m).parts((rows(n), torch.arange(n)))
    assert [len(part[0]) for part, _ in parts] == sizes
    assert torch.equal(torch.cat([part[1] for part, _ in parts]), torch.arange(n))
    assert [share for _, share in parts] == pytest.approx([size / n for size in sizes])


@pytest.mark.parametrize(
    ("fraction", "n", "seen"),
    [(0.5, 8, 4), (0.5, 7, 4), (0.25, 8, 2), (0.01, 8, 1), (0.999, 8, 8), (1 / 3, 9, 3), (0.1, 30, 3), (0.75, 1, 1)],
)
def test_the_ascent_sees_the_first_samples(fraction: float, n: int, seen: int) -> None:
    assert torch.equal(Batching(None, fraction).for_ascent(rows(n)), rows(n)[:seen])


@pytest.mark.parametrize("fraction", ["0.07", "0.14", "0.5", "0.9"])
@pytest.mark.parametrize("n", [50, 100])
def test_the_share_is_the_one_that_was_asked_for(fraction: str, n: int) -> None:
    """0.07 * 100 is 7.000000000000001 in floating point; the ascent sees 7 samples all the same."""
    seen = math.ceil(Fraction(fraction) * n)
    assert len(Batching(None, float(fraction)).for_ascent(rows(n))) == seen


def test_without_a_fraction_the_ascent_sees_the_very_batch() -> None:
    batch = object()
    assert Batching().for_ascent(batch) is batch
    assert Batching().parts(batch) == [(batch, 1.0)]


@pytest.mark.parametrize("m", [0, -1, 1.5, True, "2"])
def test_sizes_that_make_no_sense(m: Any) -> None:
    with pytest.raises(ValueError, match="micro_batch_size"):
        Batching(m)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_fractions_that_make_no_sense(fraction: float) -> None:
    with pytest.raises(ValueError, match="ascent_fraction"):
        Batching(None, fraction)


# In a step


def train(batch_size: int = 6, **options: Any) -> tuple[list[Tensor], SAM, list[int]]:
    """Train for five steps; return the weights, the optimizer and the sizes of the batches that the loss saw."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2, **options)
    sizes = []

    def loss_fn(batch: dict[str, Tensor]) -> Tensor:
        sizes.append(len(batch["x"]))
        return ((model(batch["x"]) - batch["y"]) ** 2).mean()

    for _ in range(5):
        opt.step(loss_fn, {"x": torch.randn(batch_size, 4), "y": torch.randn(batch_size, 1)})
    return [w.detach() for w in model.parameters()], opt, sizes


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


@pytest.mark.parametrize("m", [6, 7, 1000])
def test_m_as_large_as_the_batch_is_sam_bit_for_bit(m: int) -> None:
    plain, *_ = train()
    got, opt, _ = train(micro_batch_size=m)
    assert equal(got, plain)
    assert opt.last.passes == 2
    smaller, *_ = train(micro_batch_size=5)
    assert not equal(smaller, plain)


def test_a_fraction_of_one_is_sam_bit_for_bit() -> None:
    assert equal(train(ascent_fraction=1.0)[0], train()[0])


@pytest.mark.parametrize(
    ("options", "sizes", "passes"),
    [
        ({}, [6, 6], 2),
        ({"micro_batch_size": 4}, [4, 4, 2, 2], 2),
        ({"ascent_fraction": 0.5}, [3, 6], 1.5),
        ({"micro_batch_size": 4, "ascent_fraction": 0.5}, [2, 4, 1, 2], 1.5),
        ({"ascent_steps": 3}, [6] * 4, 4),
        ({"ascent_steps": 2, "ascent_fraction": 0.5}, [3, 3, 6], 2),
        ({"second_order": True}, [6] * 3, 3),
        ({"second_order": True, "ascent_fraction": 0.5}, [3, 6, 3], 2),
    ],
    ids=str,
)
def test_calls_and_passes_are_counted(options: dict[str, Any], sizes: list[int], passes: float) -> None:
    _, opt, seen = train(**options)
    assert seen == sizes * 5
    assert opt.last.closure_calls == len(sizes)
    assert opt.last.passes == pytest.approx(passes)


def test_the_loss_is_the_mean_over_the_samples() -> None:
    """A last micro-batch of one sample counts as one sample."""
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = SAM(torch.optim.SGD([w], lr=1.0), 1e-12, micro_batch_size=2)
    values = torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64)
    loss = opt.step(lambda batch: (batch * (1 + w)).mean(), values)
    assert float(loss) == opt.last.loss == pytest.approx(4.0)
    assert opt.last.perturbed_loss == pytest.approx(4.0)
    assert w.item() == pytest.approx(-4.0)


@pytest.mark.parametrize("options", [{"micro_batch_size": 2}, {"ascent_fraction": 0.5}], ids=str)
def test_a_closure_cannot_be_cut(options: dict[str, Any]) -> None:
    w = torch.nn.Parameter(torch.ones(3))
    opt = SAM(torch.optim.SGD([w], lr=0.1), **options)
    with pytest.raises(RuntimeError, match=r"opt\.step\(loss_fn, batch\)"):
        opt.step(lambda: (w**2).sum())
    w.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"opt\.step\(loss_fn, batch\)"):
        opt.first_step()
    assert torch.equal(w.detach(), torch.ones(3))
