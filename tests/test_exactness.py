"""Weights come back bit for bit, and a step of radius 0 is the base optimizer's step."""

from __future__ import annotations

import math

import pytest
import torch
from tests.core_cases import (
    MODELS,
    Held,
    X,
    Y,
    assert_same,
    batch,
    closure_of,
    mlp,
    same,
    sgd,
    snapshot,
    train,
)
from torch import nn
from torch.nn import functional as F

from flatwise import SAM, Schedule

BASES = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
}

INACTIVE = {
    "zero radius": {"rho": 0.0},
    "radius function": {"rho": lambda step: 0.0},
    "warm-up": {"schedule": Schedule(warmup_steps=99)},
    "window": {"window": (0.5, 1.0), "total_steps": 99},
    "every": {"schedule": Schedule(every=7, warmup_steps=1)},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", INACTIVE.values(), ids=INACTIVE)
def test_an_inactive_step_is_the_base_step(kind, base, options):
    plain, wrapped = MODELS[kind](), MODELS[kind]()
    plain_opt = BASES[base](plain.parameters())
    opt = SAM(BASES[base](wrapped.parameters()), **options)
    torch.manual_seed(5)
    expected = train(plain, plain_opt)
    expected_random = torch.get_rng_state()
    torch.manual_seed(5)
    assert_same(train(wrapped, opt), expected)
    assert_same(snapshot(wrapped), snapshot(plain))
    assert_same(torch.get_rng_state(), expected_random)
    assert_same(opt.base_state_dict(), plain_opt.state_dict())
    assert not opt.last.active
    assert opt.last.passes == 1
    assert opt.last.closure_calls == 1


@pytest.mark.parametrize("kind", MODELS)
def test_zero_radius_is_the_base_step_in_the_other_forms_of_call(kind):
    results = []
    for form in ("plain", "two calls", "with", "loss_fn", "perturb"):
        model = MODELS[kind]()
        base = sgd(model)
        opt = SAM(base, rho=0.0) if form != "plain" else None
        torch.manual_seed(5)
        for step in range(3):
            x, y = batch(step)
            if form == "loss_fn":
                opt.step(lambda b, model=model: F.cross_entropy(model(b[0]), b[1]), (x, y))
                continue
            base.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if form == "two calls":
                opt.first_step(zero_grad=True)
                F.cross_entropy(model(x), y).backward()
                opt.second_step(zero_grad=True)
            elif form == "with":
                with opt.perturbed() as moved:
                    assert moved is False
                    F.cross_entropy(model(x), y).backward()
                base.step()
            elif form == "perturb":
                assert opt.perturb() is False
                opt.step()
            else:
                base.step()
        results.append((snapshot(model), torch.get_rng_state(), base.state_dict()["state"]))
    for result in results[1:]:
        assert_same(result[0], results[0][0])
        assert_same(result[1], results[0][1])
        assert_same(result[2], results[0][2])


@pytest.mark.parametrize("form", ["closure", "loss_fn", "two calls", "with", "perturb"])
def test_every_form_gives_the_same_bits(form):
    reference = mlp()
    reference_opt = SAM(sgd(reference), rho=0.1)
    train(reference, reference_opt, range(3))
    model = mlp()
    base = sgd(model)
    opt = SAM(base, rho=0.1)
    for step in range(3):
        x, y = batch(step)
        if form == "closure":
            opt.step(closure_of(model, opt, x, y))
            continue
        if form == "loss_fn":
            opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (x, y))
            continue
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if form == "two calls":
            assert opt.first_step(zero_grad=True)
            F.cross_entropy(model(x), y).backward()
            opt.second_step(zero_grad=True)
        elif form == "with":
            with opt.perturbed():
                F.cross_entropy(model(x), y).backward()
            base.step()
        else:
            assert opt.perturb()
            F.cross_entropy(model(x), y).backward()
            opt.restore()
            opt.step()
    assert_same(snapshot(model), snapshot(reference))
    assert_same(opt.state_dict(), reference_opt.state_dict())


def test_one_step_is_the_step_written_by_hand():
    model, twin = mlp().double(), mlp().double()
    x, y = X.double(), Y
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.3), rho=0.2)
    opt.step(closure_of(model, opt, x, y))
    weights = list(twin.parameters())
    start = [w.detach().clone() for w in weights]
    first = torch.autograd.grad(F.cross_entropy(twin(x), y), weights)
    norm = torch.sqrt(sum((g**2).sum() for g in first))
    with torch.no_grad():
        for w, g in zip(weights, first, strict=True):
            w += 0.2 * g / norm
    second = torch.autograd.grad(F.cross_entropy(twin(x), y), weights)
    for param, w, g in zip(model.parameters(), start, second, strict=True):
        torch.testing.assert_close(param.detach(), w - 0.3 * g, rtol=1e-12, atol=1e-14)
    assert math.isclose(opt.last.gradient_norm, float(norm), rel_tol=1e-12)


# Exact restoration, whichever way the copy is taken


def small():
    return mlp()


def swapped():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 180_000, bias=False), nn.ReLU(), nn.Linear(180_000, 3))


class Rows(nn.Module):
    """A large table of which a batch touches a few rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(1 << 16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        index = (x.abs() * 1000).long().sum(1) % (1 << 16)
        return self.head(self.table(index))


PATHS = {"small": small, "swap": swapped, "rows": Rows}


class Stop(Exception):
    """An error of the user's own."""


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_exact_after_a_step_that_does_not_learn(path, dtype):
    model = PATHS[path]().to(dtype)
    rho = 0.3 if path != "swap" else 30.0  # seen by float16 weights too
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=rho)
    held = Held(model.parameters())
    seen = []

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(X.to(dtype)), Y)
        loss.backward()
        seen.append(held.moved())
        return loss

    for _ in range(3):
        opt.step(closure)
        held.assert_exact()
    assert seen == [False, True] * 3
    assert opt.last.active


@pytest.mark.parametrize("options", [{"adaptive": True, "eta": 0.01}, {"p": 1}, {"p": math.inf}, {"p": 3.0},
                                     {"ascent_steps": 3}, {"second_order": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("path", PATHS)
def test_weights_are_exact_for_every_ball(path, options):
    model = PATHS[path]()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.3, **options)
    held = Held(model.parameters())
    opt.step(closure_of(model, opt))
    held.assert_exact()
    assert opt.last.active


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("run", [1, 2, 3])
def test_weights_are_exact_after_a_closure_that_raises(path, error, run):
    model = PATHS[path]()
    base = sgd(model)
    opt = SAM(base, rho=0.3, ascent_steps=2)
    held = Held(model.parameters())
    calls = []

    def closure():
        calls.append(held.moved())
        opt.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        if len(calls) == run:
            raise error
        return loss

    with pytest.raises(error):
        opt.step(closure)
    assert calls == [False, True, True][:run]
    held.assert_exact()
    assert not base.state
    opt.step(closure_of(model, opt))  # and the optimizer goes on working
    assert opt.last.active


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("path", PATHS)
def test_weights_are_exact_after_a_block_that_raises(path, error):
    model = PATHS[path]()
    opt = SAM(sgd(model), rho=0.3)
    held = Held(model.parameters())
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(error), opt.perturbed() as moved:
        assert moved
        assert held.moved()
        raise error
    held.assert_exact()
    opt.step(closure_of(model, opt))
    assert opt.last.active


def test_leaving_the_block_early_is_exact():
    model = mlp()
    opt = SAM(sgd(model), rho=0.3)
    held = Held(model.parameters())

    def evaluate():
        F.cross_entropy(model(X), Y).backward()
        with opt.perturbed():
            return held.moved()

    assert evaluate() is True
    held.assert_exact()
    opt.restore()  # harmless when nothing is moved
    held.assert_exact()


# Kinds of parameters


def at_rest(params, loss_fn, *, rho=0.3, base=None, **options):
    """Take a step that does not learn, and return the record and the gradients that the base saw."""
    params = list(params)
    base = base or torch.optim.SGD(params, lr=0.0)
    opt = SAM(base, rho=rho, **options)
    held = Held(params)
    seen = []
    base.register_step_pre_hook(lambda *_: seen.extend(None if p.grad is None else p.grad.clone() for p in params))

    def closure():
        opt.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    opt.step(closure)
    held.assert_exact()
    return opt, seen


@pytest.mark.parametrize("only", [1, 2])
def test_a_gradient_in_only_one_pass(only):
    a, b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    calls, places = [], []
    start = b.detach().clone()

    def loss_fn():
        calls.append(1)
        places.append(same(b.detach(), start))
        loss = (a**2).sum()
        return loss + (b**2).sum() if (len(calls) - 1) % 2 == only - 1 else loss

    opt, seen = at_rest([a, b], loss_fn)
    assert places == [True, only == 2]
    assert (seen[1] is None) == (only == 1)
    for _ in range(20):
        loss = opt.step(lambda: (opt.zero_grad(), (value := loss_fn()).backward(), value)[-1])
    assert torch.isfinite(loss)
    assert same(b.detach(), start)


def test_frozen_unused_and_empty_parameters_stay():
    model = mlp()
    model[0].weight.requires_grad_(False)
    extra = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0, 4))]
    params = [*model.parameters(), *extra]
    opt, seen = at_rest(params, lambda: F.cross_entropy(model(X), Y) + extra[1].sum() + extra[2].sum())
    assert opt.last.active
    assert seen[0] is None
    assert seen[4] is None
    assert seen[5].shape == (0,)


def test_tied_parameters_are_perturbed_once():
    weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    twin = nn.Parameter(weight.detach().clone())

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False).double(), nn.Linear(4, 4, bias=False).double()
            self.one.weight = self.two.weight = weight

    tied = Tied()
    x = torch.randn(5, 4, dtype=torch.float64)
    assert len(list(tied.parameters())) == 1
    opt = SAM(torch.optim.SGD(tied.parameters(), lr=0.1), rho=0.2)
    opt.step(lambda: (opt.zero_grad(), (loss := tied.two(tied.one(x)).pow(2).sum()).backward(), loss)[-1])

    def grad():
        return torch.autograd.grad((x @ twin.T @ twin.T).pow(2).sum(), twin)[0]

    first = grad()
    start = twin.detach().clone()
    with torch.no_grad():
        twin.add_(0.2 * first / first.norm())
    torch.testing.assert_close(weight.detach(), start - 0.1 * grad(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("elements", [64, 1 << 17])
@pytest.mark.parametrize("groups", [1, 2])
def test_two_parameters_that_share_storage_come_back(elements, groups):
    whole = torch.randn(elements)
    params = [nn.Parameter(whole), nn.Parameter(whole), nn.Parameter(whole[: elements // 2])]
    for param in params:
        assert param.data_ptr() == whole.data_ptr()
    base = torch.optim.SGD(params, lr=0.0)
    if groups == 2:
        base = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.0)
    scale = torch.randn(elements)
    opt, _ = at_rest(params, lambda: sum((scale[: p.numel()] * p).sum() for p in params), base=base)
    assert opt.last.active


@pytest.mark.parametrize("side", [5, 400])
@pytest.mark.parametrize("options", [{}, {"p": math.inf}, {"adaptive": True}, {"ascent_steps": 2}], ids=str)
def test_parameters_that_are_not_contiguous(side, options):
    torch.manual_seed(3)
    value = torch.randn(side, side, dtype=torch.float64)
    x = torch.randn(side, dtype=torch.float64)
    results = []
    for start in (value.clone(), value.t().contiguous().t(), torch.stack([value, value], -1)[..., 0]):
        param = nn.Parameter(start)
        at_rest([param], lambda param=param: ((param @ x) ** 2).mean(), **options)
        opt = SAM(torch.optim.SGD([param], lr=0.1), rho=0.1, **options)
        opt.step(
            lambda opt=opt, param=param: (
                opt.zero_grad(),
                (loss := ((param @ x) ** 2).mean()).backward(),
                loss,
            )[-1]
        )
        results.append(param.detach().contiguous())
    assert not results[0].equal(value)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{}, {"p": 1}, {"p": math.inf}, {"adaptive": True, "eta": 0.1}, {"ascent_steps": 2}, {"p": 3, "ascent_steps": 3}],
    ids=str,
)
@pytest.mark.parametrize("base", ["SGD", "SparseAdam"])
def test_sparse_gradients_equal_dense_ones(options, base):
    index = torch.tensor([1, 4, 1, 7])
    target = torch.randn(4, 3)
    tables = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(10, 3, sparse=sparse)
        make = torch.optim.SGD if base == "SGD" else torch.optim.SparseAdam if sparse else None
        if make is None:
            continue
        opt = SAM(make(table.parameters(), lr=0.1), rho=0.1, **options)
        for _ in range(2):
            opt.step(
                lambda opt=opt, table=table: (
                    opt.zero_grad(),
                    (loss := (table(index) - target).pow(2).mean()).backward(),
                    loss,
                )[-1]
            )
        assert opt.last.active
        tables.append(table.weight.detach())
        untouched = [i for i in range(10) if i not in index]
        torch.manual_seed(0)
        assert same(tables[0][untouched], nn.Embedding(10, 3).weight.detach()[untouched])
    if len(tables) == 2:
        torch.testing.assert_close(*tables)


def test_sparse_gradient_steps_that_do_not_learn_are_exact():
    table = nn.Embedding(50, 3, sparse=True)
    index = torch.tensor([3, 3, 11])
    opt, seen = at_rest(table.parameters(), lambda: table(index).pow(2).sum())
    assert opt.last.active
    assert seen[0].is_sparse


@pytest.mark.parametrize(
    "options",
    [{}, {"p": 1}, {"p": math.inf}, {"adaptive": True, "eta": 0.1}, {"ascent_steps": 2}, {"second_order": True}],
    ids=str,
)
def test_complex_parameters_equal_their_real_twins(options):
    value = torch.randn(3, 2, dtype=torch.complex128)
    matrix = torch.randn(3, 3, dtype=torch.complex128)
    native = nn.Parameter(value.clone())
    twin = nn.Parameter(torch.view_as_real(value.clone()).clone())
    results = []
    for param, read in ((native, lambda p: p), (twin, torch.view_as_complex)):
        opt = SAM(torch.optim.SGD([param], lr=0.05, momentum=0.9), rho=0.1, **options)

        def closure(opt=opt, param=param, read=read):
            opt.zero_grad()
            loss = (matrix @ read(param)).abs().pow(2).sum()
            loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
        results.append((opt.last.gradient_norm, opt.last.perturbation_norm))
    torch.testing.assert_close(torch.view_as_real(native.detach()), twin.detach(), rtol=1e-11, atol=1e-12)
    assert results[0] == pytest.approx(results[1], rel=1e-10)


def test_mixed_dtypes_have_one_joint_norm():
    a = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float32))
    b = nn.Parameter(torch.full((4,), 3.0, dtype=torch.float64))
    c = nn.Parameter(torch.full((2,), 1.0, dtype=torch.bfloat16))
    opt, _ = at_rest([a, b, c], lambda: a.sum().double() + 2 * b.sum() + 3 * c.sum().double())
    assert opt.last.gradient_norm == pytest.approx(math.sqrt(3 + 16 + 18), rel=1e-6)
    assert opt.last.perturbation_norm == pytest.approx(0.3, rel=0.02)


# Gradients that are zero, not finite, or out of the range of their dtype


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"p": math.inf}, {"p": 3.0}, {"adaptive": True},
                                     {"ascent_steps": 2}], ids=str)  # fmt: skip
def test_zero_gradient(options):
    model = mlp()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, **options)
    held = Held(model.parameters())
    opt.step(lambda: (opt.zero_grad(), (loss := model(X).sum() * 0).backward(), loss)[-1])
    held.assert_exact()
    assert opt.last.reason == "zero gradient"
    assert not opt.last.active
    assert opt.last.perturbation_norm == 0
    assert opt.last.updated


@pytest.mark.parametrize(
    "options",
    [{}, {"p": 1}, {"p": math.inf}, {"p": 3.0}, {"adaptive": True, "eta": 0.1}, {"ascent_steps": 2}],
    ids=str,
)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_non_finite_gradients_change_nothing(options, bad, run, base):
    model = mlp()
    make = {"sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
            "adam": lambda ps: torch.optim.AdamW(ps, lr=0.1)}[base]  # fmt: skip
    base_opt = make(model.parameters())
    opt = SAM(base_opt, rho=0.1, **options)
    train(model, opt, range(2))
    held = Held(model.parameters())
    state = {i: {k: v.clone() for k, v in s.items()} for i, s in base_opt.state_dict()["state"].items()}
    calls = []

    def closure():
        calls.append(1)
        loss = closure_of(model, opt)()
        if len(calls) >= run:
            model[0].weight.grad[1, 2] = bad
        return loss

    opt.step(closure)
    held.assert_exact()
    assert_same(base_opt.state_dict()["state"], state)
    assert not opt.last.updated
    assert not opt.last.active
    assert opt.last.reason == "non-finite update" if run == 2 else opt.last.reason.startswith("non-finite")
    opt.step(closure_of(model, opt))
    assert opt.last.active
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"p": 1}, {"p": math.inf}, {"p": 3.0}, {"adaptive": True, "eta": 0.1}], ids=str
)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_perturb_leaves_a_bad_gradient_for_the_framework(options, bad):
    """A framework's own check (a GradScaler) must find what the backward pass left."""
    model = mlp()
    opt = SAM(sgd(model), rho=0.1, **options)
    held = Held(model.parameters())
    F.cross_entropy(model(X), Y).backward()
    model[0].weight.grad[0, 0] = bad
    before = [p.grad.clone() for p in model.parameters()]
    assert opt.perturb() is False
    held.assert_exact()
    assert_same([p.grad for p in model.parameters()], before)
    assert opt.last.reason == "non-finite gradient"


@pytest.mark.parametrize("options", [{}, {"ascent_steps": 2}], ids=str)
@pytest.mark.parametrize("side", [64, 512])
def test_float16_gradients_whose_norm_overflows_float16(side, options):
    weight = nn.Parameter(torch.full((side, side), 2.0**-4, dtype=torch.float16))
    opt, seen = at_rest([weight], lambda: (weight * 3e4).float().sum(), rho=0.5, **options)
    norm = opt.last.gradient_norm
    if not options:
        assert norm == pytest.approx(3e4 * side, rel=1e-3)
    assert norm > torch.finfo(torch.float16).max
    assert opt.last.active
    assert opt.last.perturbation_norm == pytest.approx(0.5, rel=0.02)
    assert torch.isfinite(seen[0]).all()


@pytest.mark.parametrize("size", [1e-30, 1e-40, 1e25])
def test_float32_gradients_whose_squares_leave_the_range(size):
    weight = nn.Parameter(torch.ones(16))
    factor = torch.full((16,), size)
    moved = []

    def loss_fn():
        moved.append(weight.detach().clone())
        return (weight * factor).sum()

    opt, _ = at_rest([weight], loss_fn, rho=0.5)
    assert opt.last.active
    assert float((moved[1] - moved[0]).norm()) == pytest.approx(0.5, rel=1e-4)


def test_a_group_with_radius_zero_is_left_out():
    a, b = nn.Parameter(torch.full((4,), 2.0)), nn.Parameter(torch.full((9,), 5.0))
    places = []

    def loss_fn():
        places.append((a.detach().clone(), b.detach().clone()))
        return 3 * a.sum() + 100 * b.sum()

    base = torch.optim.SGD([{"params": [a], "rho": 0.2}, {"params": [b], "rho": 0.0}], lr=0.0)
    opt, _ = at_rest([a, b], loss_fn, base=base)
    assert opt.last.gradient_norm == pytest.approx(6.0)
    torch.testing.assert_close(places[1][0], torch.full((4,), 2.1))
    assert same(places[1][1], places[0][1])
