"""Ctrl-C at any line of the displacement leaves the exact weights."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from tests.core_cases import Held, same
from torch import nn
from torch.nn import functional as F

from flatwise import SAM, look, weights

FILES = {weights.__file__, look.__file__}


class InterruptAt:
    """Raises KeyboardInterrupt at the ``line``-th line that runs in one of the files."""

    def __init__(self, line, files=FILES):
        self.line, self.count, self.place, self._files = line, 0, None, files

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)

    def _enter(self, frame, event, arg):
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.count += 1
            if self.count == self.line:
                self.place = (frame.f_code.co_name, frame.f_lineno)
                raise KeyboardInterrupt
        return self._line


def small(dtype=torch.float32):
    params = [nn.Parameter(torch.randn(3, 4, dtype=dtype)), nn.Parameter(torch.randn(5, dtype=dtype))]
    return params, lambda: sum((p**2).sum() for p in params)


def swap():
    # Three blocks, the last one not full.
    params = [nn.Parameter(torch.randn(2 * weights.CHUNK + 77)), nn.Parameter(torch.randn(1 << 16))]
    assert all(p.numel() >= 65_536 for p in params)
    factors = [torch.randn_like(p) for p in params]
    return params, lambda: sum((f * p).sum() for f, p in zip(factors, params, strict=True))


def rows():
    table = nn.Parameter(torch.randn(1 << 17, 8))
    assert table.numel() >= weights.ROWS_FROM
    index = torch.tensor([3, 500, 3, 70_000])
    return [table], lambda: F.embedding(index, table).pow(2).sum()


def sparse():
    table = nn.Parameter(torch.randn(30, 8))
    index = torch.tensor([3, 5, 3, 20])
    return [table], lambda: F.embedding(index, table, sparse=True).pow(2).sum()


def shared():
    whole = torch.randn(40)
    params = [nn.Parameter(whole), nn.Parameter(whole)]
    return params, lambda: sum((p**2).sum() for p in params)


def everything():
    parts = [small(), swap(), sparse(), small(torch.float64), small(torch.bfloat16)]
    params = [p for ps, _ in parts for p in ps]
    return params, lambda: sum(loss().double() for _, loss in parts)


CASES = {
    "small": (small, {}),
    "swap": (swap, {}),
    "rows": (rows, {}),
    "sparse": (sparse, {}),
    "shared": (shared, {}),
    "everything": (everything, {}),
    "adaptive": (small, {"adaptive": True, "eta": 0.1}),
    "sparse ball": (small, {"p": 1}),
    "steps": (small, {"ascent_steps": 2}),
    "second order": (small, {"second_order": True}),
}


def lines_of(make, run, options, files=FILES):
    """Run, interrupted at line 1, 2, 3, ... until it completes; check the weights each time."""
    interrupted = set()
    params, loss_fn = make()
    held = Held(params)
    line, completed = 0, False
    while not completed:
        line += 1
        opt = SAM(torch.optim.SGD(params, lr=0.0), rho=0.3, **options)
        seen = []

        def closure(opt=opt, seen=seen):
            opt.zero_grad()
            loss = loss_fn()
            loss.backward()
            seen.append(held.moved())
            return loss

        with InterruptAt(line, files) as trap:
            try:
                run(opt, closure)
                completed = True
            except KeyboardInterrupt:
                sys.settrace(None)
                interrupted.add(trap.place)
                opt.restore()
                while torch._C._len_torch_function_stack():  # `with` itself can be interrupted before it leaves
                    torch.overrides._pop_mode()
        try:
            held.assert_exact()
        except AssertionError as error:
            raise AssertionError(f"interrupted in {trap.place}") from error
        for param in params:
            param.grad = None
    assert trap.count < line
    assert any(seen)
    return line - 1, interrupted


def by_closure(opt, closure):
    opt.step(closure)


def by_two_calls(opt, closure):
    closure()
    opt.first_step()
    closure()
    opt.second_step()


def by_block(opt, closure):
    closure()
    with opt.perturbed():
        closure()
    opt.base_optimizer.step()


def by_framework(opt, closure):
    closure()
    opt.perturb()
    closure()
    opt.restore()
    opt.step()


@pytest.fixture(autouse=True)
def _small_swaps_and_kept_warnings(monkeypatch):
    monkeypatch.setattr(weights, "SWAP_FROM", 1 << 16, raising=False)
    with warnings.catch_warnings():
        yield


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:only .* of the perturbation arrives")
def test_an_interrupt_at_every_line_of_a_step(case):
    make, options = CASES[case]
    count, places = lines_of(make, by_closure, options)
    functions = {name for name, _ in places}
    assert count > 40
    assert {"displace", "add", "undo", "close", "pieces_of"} <= functions | (
        {"add"} if "ascent_steps" in options else set()
    )
    if case in ("swap", "everything"):
        assert "_swap" in functions
    if case in ("rows", "sparse", "everything"):
        assert "_move_rows" in functions


@pytest.mark.parametrize("run", [by_two_calls, by_block, by_framework])
@pytest.mark.parametrize("case", ["small", "swap", "rows"])
def test_an_interrupt_at_every_line_of_the_other_forms(case, run):
    make, options = CASES[case]
    count, _ = lines_of(make, run, options)
    assert count > 40


def test_the_optimizer_works_after_an_interrupt_at_any_line():
    params, loss_fn = small()
    start = [p.detach().clone() for p in params]

    def closure(opt):
        opt.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    def fresh():
        with torch.no_grad():
            for param, value in zip(params, start, strict=True):
                param.copy_(value)
        return SAM(torch.optim.SGD(params, lr=0.1, momentum=0.9), rho=0.3)

    opt = fresh()
    opt.step(lambda: closure(opt))
    expected = [p.detach().clone() for p in params]
    line = 0
    while True:
        line += 1
        opt = fresh()
        with InterruptAt(line):
            try:
                opt.step(lambda opt=opt: closure(opt))
                break
            except KeyboardInterrupt:
                pass
        opt.step(lambda opt=opt: closure(opt))
        assert same([p.detach() for p in params], expected)
        assert opt.last.active
    assert line > 40
