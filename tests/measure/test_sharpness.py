"""The table of sharpness against closed forms, slow oracles, rescaling, other cuts of the data, other processes."""

import json
import math

import pytest
import torch
from tests.ranks.start import on_ranks
from torch import nn
from torch.nn import functional as F

from flatwise.errors import UserError
from flatwise.measure import sharpness

INF = math.inf


class Quadratic(nn.Module):
    """``1/2 w^T A w`` around 0, shifted by a linear term for each sample: its mean over samples is known exactly."""

    def __init__(self, w, a):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.register_buffer("a", torch.tensor(a, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * self.w @ self.a @ self.w + x @ self.w


def own_loss(model, batch):
    return model(batch).mean()


SPECTRUM = [[3.0, 0.5, 0.0], [0.5, 2.0, 0.2], [0.0, 0.2, -1.0]]
NOTHING = torch.zeros(4, 3, dtype=torch.float64)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)).to(dtype)


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def samples(count=24, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=g).double(), torch.randint(4, (count,), generator=g)


def rises(model, data, eps):
    """The rise of the loss by hand, on a copy of the weights."""
    names = [name for name, _ in model.named_parameters()]
    moved = {n: p.detach() + e for n, p, e in zip(names, model.parameters(), eps, strict=True)}
    after = F.cross_entropy(torch.func.functional_call(model, moved, (data[0],)), data[1])
    return float((after - F.cross_entropy(model(data[0]), data[1])).detach())


def uphill(model, data, rho, p, adaptive):
    """SAM's step, verbatim: ``rho T sign(Tg) |Tg|^(q-1) / ||Tg||_q^(q-1)``."""
    gs = torch.autograd.grad(F.cross_entropy(model(data[0]), data[1]), list(model.parameters()))
    ts = [w.detach().abs() if adaptive else torch.ones_like(w) for w in model.parameters()]
    if p == INF:
        return [rho * t * torch.sign(t * g) for t, g in zip(ts, gs, strict=True)]
    norm = math.sqrt(sum(float((t * g).square().sum()) for t, g in zip(ts, gs, strict=True)))
    return [rho * t * t * g / norm for t, g in zip(ts, gs, strict=True)]


# Worst case


def test_one_step_on_a_quadratic_is_the_closed_form():
    model = Quadratic([1.0, -2.0, 0.5], SPECTRUM)
    rho = 0.3
    found = sharpness(model, own_loss, NOTHING, measures="one_step", rho=rho).row("one_step").value
    w, a = model.w.detach(), model.a
    g = a @ w
    unit = g / g.norm()
    assert found == pytest.approx(float(rho * g.norm() + rho**2 / 2 * unit @ a @ unit), rel=1e-12)


@pytest.mark.parametrize("start", [[0.0, 0.0, 0.0], [1e-9, 1e-9, -1e-9]])
def test_many_steps_reach_half_rho_squared_lambda_max_around_the_minimum_of_a_quadratic(start):
    a = [[3.0, 0.5, 0.0], [0.5, 2.0, 0.2], [0.0, 0.2, 1.0]]
    model = Quadratic(start, a)
    table = sharpness(model, own_loss, NOTHING, measures="worst", rho=0.3, steps=60)
    top = float(torch.linalg.eigvalsh(model.a)[-1])
    assert table.row("n_steps").value == pytest.approx(0.3**2 / 2 * top, rel=1e-6)


def test_many_steps_solve_the_trust_region_problem_away_from_the_minimum():
    model = Quadratic([0.4, -0.3, 0.2], SPECTRUM)
    rho = 0.7
    found = sharpness(model, own_loss, NOTHING, measures="n_steps", rho=rho, steps=200).row("n_steps").value
    w, a = model.w.detach(), model.a
    angles = torch.linspace(0, math.pi, 400, dtype=torch.float64)[:, None]
    turns = torch.linspace(0, 2 * math.pi, 800, dtype=torch.float64)[None]
    sphere = torch.stack(
        [angles.sin() * turns.cos(), angles.sin() * turns.sin(), angles.cos().expand(-1, 800)], -1
    ).reshape(-1, 3)
    eps = rho * sphere
    best = (eps @ (a @ w) + 0.5 * (eps @ a * eps).sum(1)).max()
    assert found == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize(
    ("row", "rho", "p", "adaptive"),
    [
        ("one_step", 0.05, 2, False),
        ("one_step_adaptive", 0.5, 2, True),
        ("one_step_inf", 0.001, INF, False),
        ("one_step_inf_adaptive", 0.01, INF, True),
    ],
)
def test_one_step_of_a_network_is_the_formula_of_the_papers(row, rho, p, adaptive):
    model, data = network(), samples()
    found = sharpness(model, mean_loss, data, measures=row).row(row)
    assert found.value == pytest.approx(rises(model, data, uphill(model, data, rho, p, adaptive)), rel=1e-9)
    assert found.settings["rho"] == rho


def test_n_steps_are_never_below_one_step_and_stay_in_the_ball():
    x, y = samples(40)
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        table = sharpness(model, mean_loss, (x.float(), y), measures="worst", rho=1.5, rho_inf=0.3, steps=4)
        for ball in ("", "_adaptive", "_inf", "_inf_adaptive"):
            assert table.row(f"n_steps{ball}").value >= table.row(f"one_step{ball}").value


class Wave(nn.Module):
    """One weight at 0; steps of length 1 in the ball of radius 1 go to 1 and, where that is downhill, back to 0."""

    def __init__(self, shape):
        super().__init__()
        self.w, self.shape = nn.Parameter(torch.zeros(1).double()), shape

    def forward(self, x):
        return self.shape(self.w).sum() + 0 * x


def test_the_highest_point_on_the_way_counts():
    """Steps go to 1, 0, 1: sin(4w) is -0.76 at 1, and 0 at 0."""
    row = sharpness(Wave(lambda w: (4 * w).sin()), own_loss, NOTHING, measures="worst", rho=1.0, steps=3).row
    assert row("one_step").value == pytest.approx(math.sin(4))
    assert row("n_steps").value == pytest.approx(0, abs=1e-12)
    assert row("n_steps").settings["highest_after"] == 2


def test_n_steps_are_never_below_one_step_also_where_graphs_change_the_loss():
    """A loss that is lower by 0.1 with a graph stands for kernels that round differently."""

    def shape(w):
        return w - 0.95 * w**2 - 0.1 * torch.is_grad_enabled()

    row = sharpness(Wave(shape), own_loss, NOTHING, measures="worst", rho=1.0, steps=2).row
    assert row("one_step").value == pytest.approx(0.05)
    assert row("n_steps").value == row("one_step").value


# Average case


def test_the_average_on_a_quadratic_is_half_sigma_squared_trace():
    model = Quadratic([1.0, -2.0, 0.5], SPECTRUM)
    row = sharpness(model, own_loss, NOTHING, measures="average", rho=0.3, draws=4000).row("average")
    exact = 0.3**2 / 3 / 2 * float(model.a.trace())
    assert row.settings["sigma"] == pytest.approx(0.3 / math.sqrt(3))
    assert abs(row.value - exact) < 4 * row.standard_error
    assert row.standard_error < 0.1 * exact


def test_the_adaptive_average_on_a_quadratic_is_half_sigma_squared_trace_of_the_scaled_hessian():
    model = Quadratic([1.0, -2.0, 0.5], SPECTRUM)
    row = sharpness(model, own_loss, NOTHING, measures="average_adaptive", adaptive_rho=0.3, draws=4000).rows[-1]
    exact = 0.3**2 / 3 / 2 * float((model.a.diagonal() * model.w.detach() ** 2).sum())
    assert abs(row.value - exact) < 4 * row.standard_error
    assert row.standard_error < 0.1 * exact


# m-sharpness


def slow_m(model, data, m, rho):
    """A loop, with no code of the package."""
    total, count = 0.0, len(data[1])
    for start in range(0, count, m):
        part = (data[0][start : start + m], data[1][start : start + m])
        total += rises(model, part, uphill(model, part, rho, 2, False)) * len(part[1])
    return total / count


@pytest.mark.parametrize("m", [1, 5, 8, 24])
@pytest.mark.parametrize("size", [None, 3])
def test_m_sharpness_is_that_of_a_slow_loop_over_batches_of_any_size(m, size):
    model, (x, y) = network(), samples()
    batches = list(zip(x.split([7, 10, 7]), y.split([7, 10, 7]), strict=True))
    table = sharpness(model, mean_loss, batches, measures="m_sharpness", m=[m], micro_batch_size=size)
    assert table.row(f"m_sharpness_{m}").value == pytest.approx(slow_m(model, (x, y), m, 0.05), rel=1e-9)


def test_m_of_all_samples_is_the_worst_case_of_one_step():
    model, data = network(), samples()
    table = sharpness(model, mean_loss, data, measures=["one_step", "m_sharpness"], m=[24])
    assert table.row("m_sharpness_24").value == pytest.approx(table.row("one_step").value, rel=1e-12)
    assert table.row("m_sharpness_24").standard_error is None


def test_a_part_of_the_micro_batches_is_spread_over_the_data():
    model, (x, y) = network(), samples()
    table = sharpness(model, mean_loss, (x, y), measures="m_sharpness", m=[2, 100], micro_batches=4)
    row = table.row("m_sharpness_2")
    taken = torch.tensor([0, 1, 6, 7, 12, 13, 18, 19])
    assert row.value == pytest.approx(slow_m(model, (x[taken], y[taken]), 2, 0.05), rel=1e-9)
    assert row.settings["micro_batches"] == "4 of 12"
    assert any("m=100" in sentence for sentence in table.cautions)


# Invariance


def test_adaptive_measures_do_not_change_under_rescaling_and_plain_ones_do():
    """Dinh et al., ICML 2017: (c W1, c b1, W2 / c) is the same function of a ReLU network."""
    data, c = samples(), 8.0
    before = sharpness(network(), mean_loss, data, measures="first_order", m=[8])
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(c)
        model[0].bias.mul_(c)
        model[2].weight.div_(c)
    after = sharpness(model, mean_loss, data, measures="first_order", m=[8])
    assert after.loss == pytest.approx(before.loss, rel=1e-12)
    for row in before.rows:
        other = after.row(row.name).value
        if "adaptive" in row.name:
            assert other == pytest.approx(row.value, rel=1e-7), row.name
        elif row.name != "loss":
            assert abs(other / row.value - 1) > 0.1, row.name


@pytest.mark.parametrize("size", [1, 5, 24])
def test_values_do_not_depend_on_the_micro_batch_size(size):
    data = samples()
    whole = sharpness(network(), mean_loss, data, measures="first_order", m=[8])
    cut = sharpness(network(), mean_loss, data, measures="first_order", m=[8], micro_batch_size=size)
    for row in whole.rows:
        assert cut.row(row.name).value == pytest.approx(row.value, rel=1e-7), row.name


def _on_rank(rank):
    x, y = samples()
    mine = slice(0, 8) if rank == 0 else slice(8, 24)
    group = torch.distributed.group.WORLD
    table = sharpness(
        network(),
        mean_loss,
        (x[mine], y[mine]),
        m=[8],
        micro_batch_size=4,
        process_group=group,
        progress=False,
    )
    return [(row.name, row.value, row.standard_error) for row in table.rows]


def test_two_processes_give_what_one_gives(tmp_path):
    alone = sharpness(network(), mean_loss, samples(), m=[8], micro_batch_size=4, progress=False)
    both = on_ranks(_on_rank, tmp_path)
    assert both[0] == both[1]
    for row, (name, value, error) in zip(alone.rows, both[0], strict=True):
        assert name == row.name
        assert value == pytest.approx(row.value, rel=1e-7), name
        assert error is None if row.standard_error is None else error == pytest.approx(row.standard_error, rel=1e-6)


# What the call leaves, lists and refuses


class Busy(nn.Module):
    """Batch normalisation, dropout, a frozen and an unused parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)
        self.unused = nn.Parameter(torch.ones(2))
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(F.dropout(self.norm(self.first(x)).relu(), 0.3, self.training))


def state_of(model):
    tensors = [t.clone() for t in (*model.parameters(), *model.buffers())]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    return tensors, grads, modes, torch.get_rng_state(), [p.requires_grad for p in model.parameters()]


def assert_same(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one[1], other[1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert one[2] == other[2]
    assert torch.equal(one[3], other[3])
    assert one[4] == other[4]


def float_batches():
    x, y = samples()
    return list(zip(x.float().split(8), y.split(8), strict=True))


@pytest.mark.parametrize("mode", ["eval", "train", "as is"])
def test_nothing_is_changed(mode):
    model = Busy()
    mean_loss(model, float_batches()[0]).backward()
    before = state_of(model)
    table = sharpness(model, mean_loss, float_batches(), m=[1, 8], draws=4, mode=mode, progress=False)
    assert_same(before, state_of(model))
    assert table.conditions.unused == ("unused",)
    assert table.conditions.frozen == ("last.bias",)
    assert "unused" in str(table)
    assert "last.bias" in str(table)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_nothing_is_changed_when_the_loss_raises(share):
    model, calls, after = Busy(), [], math.inf
    mean_loss(model, float_batches()[0]).backward()
    before = state_of(model)

    def breaking(model, batch):
        calls.append(1)
        if len(calls) >= after:
            raise RuntimeError("in the middle")
        return mean_loss(model, batch)

    def measured():
        sharpness(model, breaking, float_batches(), m=[1, 8], draws=4, mode="train", progress=False)

    measured()
    after = len(calls) + 1 + int(share * (len(calls) - 1))
    with pytest.raises(RuntimeError, match="in the middle"):
        measured()
    assert_same(before, state_of(model))


def test_the_same_seed_gives_the_same_numbers_and_another_other_noise():
    model, data = network(), samples()
    first, again = (sharpness(model, mean_loss, data, measures="averages") for _ in range(2))
    other = sharpness(model, mean_loss, data, measures="averages", seed=1)
    assert [r.value for r in first.rows] == [r.value for r in again.rows]
    assert first.row("average").value != other.row("average").value


def test_costs_add_up_to_what_was_evaluated():
    model, batches, counts = network(), samples(), {"forward": 0}

    def counting(model, batch):
        counts["forward"] += len(batch[1])
        return mean_loss(model, batch)

    table = sharpness(model, counting, batches, measures="first_order", m=[8], draws=4, steps=3)
    n = 24
    # Of each forward pass, those that were followed by a backward pass: the gradient at w, two more for every ball,
    # and one for the micro-batches.
    backward = 1 + 4 * 2 + 1
    assert table.cost.gradient_evaluations == pytest.approx(counts["forward"] / n / 3 + backward * 2 / 3)
    assert table.cost.gradient_evaluations == pytest.approx(sum(row.gradient_evaluations for row in table.rows))


def test_a_subset_costs_its_own():
    table = sharpness(network(), mean_loss, samples(), measures="one_step")
    assert [row.name for row in table.rows] == ["loss", "gradient_norm", "one_step"]
    assert table.cost.gradient_evaluations == pytest.approx(1 / 3 + 1 + 1 / 3)


def test_the_table_names_rho_and_m_with_every_number():
    table = sharpness(network(), mean_loss, samples(), measures="first_order", m=[8])
    lines = {line.split()[0]: line for line in str(table).split("\n\n")[0].splitlines()}
    for row in table.rows[2:]:
        assert "rho=" in lines[row.name]
        assert row.name[:2] != "m_" or "m=8" in lines[row.name]
    assert json.loads(json.dumps(table.as_dict(), allow_nan=True))["rows"][0]["name"] == "loss"


def test_names_in_a_notebook_are_escaped():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"<b>": nn.Linear(3, 4)})
            self.inner["<i>"] = nn.Linear(2, 2)

        def forward(self, x):
            return self.inner["<b>"](x)

    x, y = samples()
    table = sharpness(Odd(), mean_loss, (x.float(), y), measures="one_step")
    page = table._repr_html_()
    assert "<i>" not in page
    assert "&lt;i&gt;" in page
    assert "one_step" in page


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"measures": "one_stp"}, "did you mean 'one_step'"),
        ({"rho": 0}, "rho must be a finite number > 0"),
        ({"adaptive_rho": INF}, "adaptive_rho must be"),
        ({"eta": -1.0}, "eta must be"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"draws": 2.5}, "draws must be a whole number"),
        ({"m": [0]}, "every m must be"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(options, complaint):
    with pytest.raises(UserError, match=complaint) as raised:
        sharpness(network(), mean_loss, samples(), **options)
    assert "\n" not in str(raised.value)


def test_an_unknown_row_is_named():
    table = sharpness(network(), mean_loss, samples(), measures="one_step")
    with pytest.raises(UserError, match="did you mean 'one_step'"):
        table.row("onestep")
