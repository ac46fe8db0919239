"""Products with the Hessian and the Gauss-Newton matrix, against the dense ones."""

import random

import numpy as np
import pytest
import torch
from tests.measure.curvature_cases import (
    ALL,
    Case,
    cross_entropy,
    dense_gauss_newton,
    dense_hessian,
    make,
    problem_of,
    quadratic,
    with_spectrum,
)
from tests.ranks.start import on_ranks
from torch import nn
from torch.nn import functional as F

from flatwise.errors import UserError
from flatwise.measure import fit, hessian_eigenvalues
from flatwise.measure.attention import NOTICE
from flatwise.measure.linearised import LINEAR, OUTER
from flatwise.measure.memory import LiveBytes
from flatwise.measure.problem import Problem
from flatwise.measure.products import Products

torch.set_num_threads(1)


def products_of(case, vectors, matrix="hessian", product="auto", max_memory=None, **options):
    problem = problem_of(case, **options)
    with problem.open():
        operator = Products(problem, matrix=matrix, product=product, max_memory=max_memory)
        operator.prepare()
        return torch.stack([operator(v) for v in vectors]), operator


def some(n, count=3):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
def test_products_are_those_of_the_dense_hessian(name):
    case = make(name)
    dense = dense_hessian(case)
    vectors = some(len(dense))
    got, operator = products_of(case, vectors)
    assert operator.exact
    torch.testing.assert_close(got, vectors @ dense, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "mlp squares", "mlp smooth", "cnn eval", "cnn train", "transformer", "tied"])
@pytest.mark.parametrize("product", ["exact", "finite difference"])
def test_products_are_those_of_the_dense_gauss_newton_matrix(name, product):
    case = make(name)
    dense = dense_gauss_newton(case)
    vectors = some(len(dense))
    got, _ = products_of(case, vectors, "ggn", product)
    near = 1e-9 if product == "exact" else 1e-6
    torch.testing.assert_close(got, vectors @ dense, rtol=near, atol=near)


@pytest.mark.parametrize("name", ["mlp", "cnn eval", "cnn train", "transformer", "tied", "physics"])
def test_finite_differences_are_near_and_say_how_near(name):
    case = make(name)
    dense = dense_hessian(case)
    vectors = some(len(dense))
    got, operator = products_of(case, vectors, product="finite difference")
    assert not operator.exact
    error = float((got - vectors @ dense).norm() / (vectors @ dense).norm())
    assert error < 1e-6
    (note,) = [note for note in operator.problem.notes if "central differences" in note]
    said = float(note.rpartition("differs by ")[2].split()[0])
    assert error < 20 * said


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_change_nothing(matrix, size):
    case = make("mlp")
    vectors = some(38)
    whole, _ = products_of(case, vectors, matrix)
    cut, _ = products_of(case, vectors, matrix, micro_batch_size=size)
    torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-12)


def test_a_selection_is_a_block_of_the_matrix():
    case = make("mlp")
    dense = dense_hessian(case, "0.weight")
    got, _ = products_of(case, some(15), parameters="0.weight")
    torch.testing.assert_close(got, some(15) @ dense, rtol=1e-9, atol=1e-10)
    whole = dense_hessian(case)
    torch.testing.assert_close(whole[:15, :15], dense)


def test_unused_and_frozen_parameters_are_named():
    result = hessian_eigenvalues(make("tied").model, cross_entropy, make("tied").batch)
    assert result.conditions.unused == ("unused",)
    assert result.conditions.frozen == ("frozen",)


def penalised(model, batch):
    return cross_entropy(model, batch) + 0.5 * sum(p.square().sum() for p in model.parameters())


def test_gauss_newton_leaves_out_what_does_not_go_through_the_outputs_and_says_so():
    case = make("mlp")
    vectors = some(38)
    plain, operator = products_of(case, vectors, "ggn")
    assert OUTER not in operator.problem.notes
    case.loss_fn = penalised
    got, operator = products_of(case, vectors, "ggn")
    torch.testing.assert_close(got, plain)
    assert OUTER in operator.problem.notes


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return {"logits": self.one(x).tanh(), "more": (self.two(x), "text", None)}


def nested_loss(model, batch):
    out = model(batch[0])
    return F.cross_entropy(out["logits"] * out["more"][0], batch[1])


def twice_called(model, batch):
    return F.cross_entropy(model(batch[0]) * model(batch[0] * 2), batch[1])


def fed_back(model, batch):
    return F.cross_entropy(model(model(batch[0])), batch[1])


def test_gauss_newton_takes_nests_of_outputs():
    torch.manual_seed(0)
    case = make("mlp")
    case.model, case.loss_fn = Nested().double(), nested_loss

    def outputs(w):
        a, b, c, d = (t.view(s) for t, s in zip(w.split([9, 3, 9, 3]), ((3, 3), (3,), (3, 3), (3,)), strict=True))
        return torch.stack([F.linear(case.batch[0], a, b).tanh(), F.linear(case.batch[0], c, d)])

    w = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    z = outputs(w)
    jacobian = torch.func.jacrev(outputs)(w).reshape(z.numel(), -1)
    loss = lambda flat: F.cross_entropy(flat.view_as(z)[0] * flat.view_as(z)[1], case.batch[1])  # noqa: E731
    outer = torch.func.jacrev(torch.func.jacrev(loss))(z.flatten())
    got, _ = products_of(case, some(24), "ggn")
    torch.testing.assert_close(got, some(24) @ (jacobian.T @ outer @ jacobian), rtol=1e-9, atol=1e-10)


def test_gauss_newton_takes_several_calls_but_not_a_model_fed_with_its_own_output():
    case = make("mlp")
    case.loss_fn = twice_called
    x = case.batch[0]
    got, _ = products_of(case, some(38), "ggn")

    def outputs(w):
        pieces = problem_of(case).shaped(w)
        named = dict(zip(problem_of(case).names, pieces, strict=True))
        return torch.stack([torch.func.functional_call(case.model, named, (factor * x,)) for factor in (1, 2)])

    w = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    z = outputs(w)
    jacobian = torch.func.jacrev(outputs)(w).reshape(z.numel(), -1)
    loss = lambda flat: F.cross_entropy(flat.view_as(z)[0] * flat.view_as(z)[1], case.batch[1])  # noqa: E731
    outer = torch.func.jacrev(torch.func.jacrev(loss))(z.flatten())
    torch.testing.assert_close(got, some(38) @ (jacobian.T @ outer @ jacobian), rtol=1e-9, atol=1e-10)

    case.loss_fn = fed_back
    with pytest.raises(UserError, match="feeds the model what the model put out"):
        products_of(case, some(38), "ggn")


def test_gauss_newton_of_what_is_no_function_of_outputs_is_refused():
    with pytest.raises(UserError, match="differentiates the model's outputs by its inputs"):
        products_of(make("physics"), some(19), "ggn")
    with pytest.raises(UserError, match="never called model"):
        hessian_eigenvalues(
            make("mlp").model, lambda m, b: m[0](b).square().mean(), torch.ones(2, 3).double(), matrix="ggn"
        )


def test_a_loss_that_is_linear_in_the_outputs_has_no_gauss_newton_matrix():
    case = make("mlp")
    case.loss_fn = lambda model, batch: model(batch[0]).mean()
    got, operator = products_of(case, some(38), "ggn")
    assert not got.any()
    assert LINEAR in operator.problem.notes


def test_a_linear_model_with_a_linear_loss_has_no_hessian():
    model = nn.Linear(3, 1).double()
    result = hessian_eigenvalues(model, lambda m, b: m(b).mean(), torch.ones(4, 3).double(), k=4)
    assert result.values == (0.0, 0.0, 0.0, 0.0)
    assert result.converged == (True,) * 4


def test_attention_switches_to_the_kernel_with_a_double_backward_and_says_so():
    x, y = make("transformer").batch

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x):
            q = self.q(x)[:, None]
            return F.scaled_dot_product_attention(q, q, q)[:, 0].mean(dim=1)[:, :3]

    torch.manual_seed(0)
    model = Plain().double()
    # Without the switch there is no product on the CPU, so this test can fail.
    loss = F.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(grads[0].sum(), list(model.parameters()))

    case = Case(model, cross_entropy, (x, y))
    got, operator = products_of(case, some(20))
    assert operator.exact
    assert NOTICE in operator.problem.notes
    torch.testing.assert_close(got, some(20) @ dense_hessian(case), rtol=1e-9, atol=1e-10)
    assert NOTICE not in products_of(make("mlp"), some(38))[1].problem.notes


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


class OnceLayer(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def without_double_backward():
    case = make("mlp")
    dense = dense_hessian(case)
    case.model[1] = OnceLayer()
    return case, dense


def test_where_there_is_no_double_backward_differences_take_over_with_a_note():
    case, dense = without_double_backward()
    before = [p.detach().clone() for p in case.model.parameters()]
    got, operator = products_of(case, some(38))
    assert not operator.exact
    assert any("no double backward" in note for note in operator.problem.notes)
    torch.testing.assert_close(got, some(38) @ dense, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(p, b) for p, b in zip(case.model.parameters(), before, strict=True))
    with pytest.raises(UserError, match="use product='finite difference'"):
        products_of(case, some(38), product="exact")


def test_other_errors_of_the_loss_are_not_taken_for_a_missing_double_backward():
    case = make("mlp")

    def broken(model, batch):
        raise RuntimeError("the sky fell")

    case.loss_fn = broken
    with pytest.raises(RuntimeError, match="the sky fell"):
        products_of(case, some(38))


def test_the_graph_is_built_once_and_kept_and_built_anew_where_memory_is_short():
    case = make("mlp")
    calls = []

    def counted(model, batch):
        calls.append(len(batch[0]))
        return cross_entropy(model, batch)

    case.loss_fn = counted
    products_of(case, some(38, 5))
    assert calls.count(12) == 3  # to see what memory it takes, the graph, and the probe
    whole, operator = products_of(case, some(38, 5), micro_batch_size=4)
    kept = operator.problem.cost().gradient_evaluations
    calls.clear()
    anew, operator = products_of(case, some(38, 5), micro_batch_size=4, max_memory=3600)
    assert sum(calls) > 5 * 12
    assert operator.problem.cost().gradient_evaluations == pytest.approx(
        kept + 4, abs=1
    )  # 3 instead of 2, and no graph
    torch.testing.assert_close(anew, whole)
    calls.clear()
    products_of(case, some(38, 5), micro_batch_size=4, max_memory=4900)
    assert 3 * 12 < sum(calls) < 5 * 12  # one part of three is kept


@pytest.mark.parametrize("budget", [6_000, 9_000, 20_000, 60_000, 10_000_000])
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_what_lives_at_once_stays_below_the_budget(budget, matrix):
    case = make("mlp")
    problem = Problem(case.model, case.loss_fn, [tuple(t.repeat(16, *[1] * (t.dim() - 1)) for t in case.batch)])
    reference = Products(problem, matrix=matrix)
    with problem.open():
        reference.prepare()
        expected = reference(some(38, 1)[0])
        operator = Products(problem, matrix=matrix, max_memory=budget)
        operator.prepare()
        with LiveBytes() as bytes_:
            for _ in range(2):
                got = operator(some(38, 1)[0])
    assert bytes_.peak <= budget
    torch.testing.assert_close(got, expected)
    assert max(part.samples for part in problem.parts) > (1 if budget > 6_000 else 0)


def test_kept_bytes_are_what_autograd_saves():
    """The count at the dispatcher against another count: that of the tensors which the graphs save."""
    case = make("mlp")
    problem = Problem(case.model, case.loss_fn, [tuple(t.repeat(16, *[1] * (t.dim() - 1)) for t in case.batch)])
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with problem.open():
        operator = Products(problem)
        operator.prepare()
        with LiveBytes() as bytes_, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            operator._kept.clear()
            operator(torch.ones(38).double())
            kept = bytes_.live
    inputs = sum(p.untyped_storage().nbytes() for p in problem.params)
    assert 0.7 * (sum(saved.values()) - inputs) < kept < 1.5 * sum(saved.values())


def test_a_budget_that_holds_nothing_is_refused_in_one_line():
    with pytest.raises(UserError, match="too small: the graphs of one sample"):
        products_of(make("mlp"), some(38), max_memory=100)
    with pytest.raises(UserError, match="batch normalisation makes the loss depend"):
        products_of(make("cnn train"), some(51), max_memory=20_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrix": "hesian"}, "did you mean 'hessian'"),
        ({"product": "exakt"}, "did you mean 'exact'"),
        ({"max_memory": 0}, "max_memory must be"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(UserError, match=message):
        products_of(make("mlp"), [], **options)


def test_a_loss_that_is_not_finite_is_named():
    model = with_spectrum([1.0, 2.0])
    with torch.no_grad():
        model.matrix.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        hessian_eigenvalues(model, quadratic, [None], k=1)


def _snapshot(model):
    return (
        [p.detach().clone() for p in model.parameters()],
        [b.detach().clone() for b in model.buffers()],
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("product", ["exact", "finite difference"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed_also_when_the_loss_raises_in_the_middle(product, fails):
    case = make("cnn train")
    case.model.eval()
    case.model[5].weight.grad = torch.ones_like(case.model[5].weight)
    calls = []

    def sometimes(model, batch):
        calls.append(1)
        torch.rand(3)
        random.random()
        if fails and len(calls) == 5:
            raise KeyError("in the middle")
        return cross_entropy(model, batch)

    case.loss_fn = sometimes
    before = _snapshot(case.model)
    if fails:
        with pytest.raises(KeyError):
            products_of(case, some(51), product=product, micro_batch_size=4)
    else:
        products_of(case, some(51), product=product, micro_batch_size=4)
    assert _same(before, _snapshot(case.model))


def _on_rank(rank, matrix, product):
    case = make("mlp")
    x, y = case.batch
    mine = [(x[:8], y[:8]), (x[8:], y[8:])][rank]
    problem = Problem(case.model, case.loss_fn, [mine], process_group=torch.distributed.group.WORLD, micro_batch_size=3)
    with problem.open():
        operator = Products(problem, matrix=matrix, product=product)
        operator.prepare()
        together = torch.stack([operator(v) for v in some(38)])
    result = hessian_eigenvalues(
        case.model, case.loss_fn, mine, matrix=matrix, process_group=torch.distributed.group.WORLD, keep_vectors=True
    )
    return together, result.vectors, list(result.values), result.conditions.samples


@pytest.mark.parametrize(
    ("matrix", "product"), [("hessian", "exact"), ("ggn", "exact"), ("hessian", "finite difference")]
)
def test_two_processes_are_one(matrix, product, tmp_path):
    first, second = on_ranks(_on_rank, tmp_path, matrix, product)
    case = make("mlp")
    alone, _ = products_of(case, some(38), matrix, product)
    near = 1e-10 if product == "exact" else 1e-6
    torch.testing.assert_close(first[0], alone, rtol=near, atol=near)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    expected = hessian_eigenvalues(case.model, case.loss_fn, case.batch, matrix=matrix)
    assert first[2] == pytest.approx(list(expected.values), rel=1e-9)
    assert first[3] == 12


def wide(seed=0, samples=300):
    """A network and a batch that is cut for speed, where ``QUICK`` is small."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 3), nn.Dropout(0.1)).double()
    return model, (torch.randn(samples, 6).double(), torch.randint(3, (samples,)))


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_a_batch_is_cut_where_that_is_quicker_and_the_loss_stays(matrix, monkeypatch):
    monkeypatch.setattr(fit, "QUICK", 2**17)
    model, batch = wide()
    small = (batch[0][:200], batch[1][:200])
    v = some(sum(p.numel() for p in model.parameters()), 1)[0]
    got = {}
    for size in (None, 300):  # a size that is asked for is kept
        problem = Problem(model, cross_entropy, iter([batch, small]), micro_batch_size=size)
        with problem.open():
            operator = Products(problem, matrix=matrix)
            operator.prepare()
            before = problem.gradient_evaluations
            got[size] = operator(v)
            assert problem.gradient_evaluations - before < 3.1
        got[size, "parts"] = len(problem.parts)
    assert got[None, "parts"] > got[300, "parts"] == 2
    torch.testing.assert_close(got[None], got[300], rtol=1e-12, atol=1e-14)
    result = hessian_eigenvalues(model, cross_entropy, batch, 1, tol=1e-2, max_products=4)
    assert result.conditions.micro_batch_size < 300
    assert result.cost.gradient_evaluations == pytest.approx(2 * result.products + 2, abs=0.7)


def contrastive(model, batch):
    """Every sample is compared with all others: not a mean over samples."""
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


def ignoring(model, batch):
    """A mean over those with a label: not a mean over samples where some have none."""
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=-1)


def of_own_draws(model, batch):
    """A dropout that is no module, seeded alike before every part but not for every piece."""
    return F.cross_entropy(F.dropout(model(batch[0]), 0.5), batch[1])


@pytest.mark.parametrize("loss_fn", [contrastive, ignoring, of_own_draws])
def test_a_batch_whose_loss_is_no_mean_over_samples_stays_whole(loss_fn, monkeypatch):
    monkeypatch.setattr(fit, "QUICK", 2**17)
    model, (x, y) = wide()
    batches = [(x, y)] if loss_fn is not ignoring else [(x, y), (x.flip(0), torch.where(torch.arange(300) < 7, -1, y))]
    found = {}
    for size in (None, 300):
        found[size] = hessian_eigenvalues(
            model, loss_fn, iter(batches), 1, tol=1e-2, micro_batch_size=size, max_products=3
        )
        assert found[size].conditions.micro_batch_size == 300
    assert found[None].values == found[300].values
    assert found[None].cost.gradient_evaluations < found[300].cost.gradient_evaluations + 3


def test_with_dropout_no_piece_is_tried(monkeypatch):
    monkeypatch.setattr(fit, "QUICK", 2**17)
    model, batch = wide()
    found = hessian_eigenvalues(model, cross_entropy, batch, 1, tol=1e-1, mode="train", max_products=3)
    assert found.conditions.micro_batch_size == 300
    assert found.cost.gradient_evaluations < 2 * found.products + 3
