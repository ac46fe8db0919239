"""The bound of Theorem 2, term by term, against closed forms and the derivation in the paper's appendix."""

import json
import math

import pytest
import torch
from tests.ranks.start import on_ranks
from torch import nn
from torch.nn import functional as F

from flatwise.errors import UserError
from flatwise.measure import bounded_loss, pac_bayes_bound
from flatwise.measure.theorem import gaussian_terms, noise, printed_terms


def errors(model, batch):
    return (model(batch[0]).argmax(1) != batch[1]).double().mean()


cut = bounded_loss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), 3.0)


def network():
    torch.manual_seed(0)
    return nn.Linear(3, 4).double()


def samples(count=40, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=g).double(), torch.randint(4, (count,), generator=g)


class Bowl(nn.Module):
    """``1/2 |w|^2`` for every sample."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * self.w.square().sum() + 0 * x


def own_loss(model, batch):
    return model(batch).mean()


def test_both_forms_are_the_formulas_of_the_paper():
    w, n, rho, delta = [0.3, -0.4, 0.1], 5000, 0.2, 0.05
    k, squared = 3, 0.3**2 + 0.4**2 + 0.1**2
    found = pac_bayes_bound(Bowl(w), own_loss, torch.zeros(n), rho=rho, delta=delta, draws=400, steps=3)
    sigma = rho / (math.sqrt(k) + math.sqrt(math.log(n)))
    root = math.sqrt(
        (k / 4 * math.log(1 + squared / (k * sigma**2)) + 0.25 + math.log(n / delta) + 2 * math.log(6 * n + 3 * k))
        / (n - 1)
    )
    # E 1/2 |w + eps|^2 = 1/2 |w|^2 + k sigma^2 / 2; the highest point of the ball is w (1 + rho / |w|).
    noisy = squared / 2 + k * sigma**2 / 2
    assert found.sigma == pytest.approx(sigma)
    assert abs(found.noisy_loss - noisy) < 4 * found.standard_error
    assert found.standard_error < 0.1 * k * sigma**2 / 2
    assert found.value == pytest.approx(found.noisy_loss + root)
    inside = k * math.log(1 + squared / rho**2 * (1 + math.sqrt(math.log(n) / k)) ** 2)
    printed = math.sqrt((inside + 4 * math.log(n / delta) + 8 * math.log(6 * n + 3 * k)) / (n - 1))
    assert found.worst_loss == pytest.approx((math.sqrt(squared) + rho) ** 2 / 2)
    assert found.printed == pytest.approx(found.worst_loss + printed)
    assert not found.vacuous
    assert "at most" in found.statement


def test_the_gaussian_form_is_never_above_the_printed_one():
    """The proof gets from one to the other by giving away; 1/sqrt(n) pays for noise that is longer than rho."""
    for n in (50, 1000, 60000):
        for k in (10, 1000, 10**6):
            for squared in (0.01, 1.0, 1e4):
                for rho in (0.01, 0.5):
                    tight, loose = (make(n, k, squared, rho, 0.05).root(n) for make in (gaussian_terms, printed_terms))
                    assert tight + 1 / math.sqrt(n) <= loose * (1 + 1e-9)


def test_the_complexity_is_the_divergence_of_the_two_gaussians():
    """KL(N(w, sigma^2) | N(0, sigma^2 + |w|^2 / k)) = k/2 log(1 + |w|^2 / (k sigma^2)); the terms hold half of it."""
    n, k, rho = 1000, 7, 0.3
    w = torch.randn(k).double()
    sigma = noise(n, k, rho)
    prior = math.sqrt(sigma**2 + float(w.square().sum()) / k)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(w, sigma), torch.distributions.Normal(torch.zeros(k).double(), prior)
    ).sum()
    assert gaussian_terms(n, k, float(w.square().sum()), rho, 0.05).complexity == pytest.approx(float(divergence) / 2)


def test_noise_is_longer_than_rho_no_more_often_than_the_proof_says():
    n, k, rho = 400, 20, 0.3
    longer = (noise(n, k, rho) * torch.randn(20000, k)).norm(dim=1) > rho
    assert float(longer.double().mean()) <= 1 / math.sqrt(n)


def test_a_vacuous_bound_says_so():
    found = pac_bayes_bound(network(), cut, samples())
    assert found.vacuous
    assert found.value >= 1
    assert "vacuous" in found.statement
    for words in ("complexity", "confidence", "union", "bound", "no certificate"):
        assert words in str(found)
    assert json.loads(json.dumps(found.as_dict()))["terms"]["constant"] == 0.25


def test_a_loss_without_a_gradient_leaves_the_printed_form_out():
    found = pac_bayes_bound(network(), errors, samples(), draws=6)
    assert found.printed is None
    assert any("no gradient" in note for note in found.conditions.notes)
    assert 0 <= found.noisy_loss <= 1
    assert found.value == pytest.approx(found.noisy_loss + found.terms.root(40))


def test_a_cut_loss_is_that_of_each_sample():
    model, (x, y) = network(), samples()
    each = F.cross_entropy(10 * model(x), y, reduction="none")
    loss_fn = bounded_loss(lambda model, batch: F.cross_entropy(10 * model(batch[0]), batch[1], reduction="none"), 2.0)
    assert float(loss_fn(model, (x, y)).detach()) == pytest.approx(float(each.detach().clamp(max=2).mean() / 2))


def test_larger_losses_are_divided():
    half, whole = network(), network()
    scaled = pac_bayes_bound(half, lambda model, batch: 5 * cut(model, batch), samples(), largest_loss=5.0)
    assert scaled.value == pytest.approx(pac_bayes_bound(whole, cut, samples()).value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rho": 0.0}, "rho must be"),
        ({"delta": 1.0}, "delta must be between"),
        ({"draws": 0}, "draws must be a whole number"),
        ({"largest_loss": -1.0}, "largest_loss must be"),
        ({"largest_loss": 0.1}, "bounded_loss"),
    ],
)
def test_what_the_theorem_does_not_allow_is_refused(options, complaint):
    with pytest.raises(UserError, match=complaint):
        pac_bayes_bound(network(), cut, samples(), **options)


def test_one_sample_is_refused():
    with pytest.raises(UserError, match="2 samples"):
        pac_bayes_bound(network(), cut, samples(1))
    with pytest.raises(UserError, match="largest must be"):
        bounded_loss(errors, 0.0)


@pytest.mark.parametrize("size", [1, 7])
def test_the_bound_does_not_depend_on_the_micro_batch_size(size):
    whole, parts = (pac_bayes_bound(network(), cut, samples(), micro_batch_size=s) for s in (None, size))
    assert parts.value == pytest.approx(whole.value, rel=1e-9)
    assert parts.printed == pytest.approx(whole.printed, rel=1e-7)
    assert parts.standard_error == pytest.approx(whole.standard_error, rel=1e-6)


def _on_rank(rank):
    x, y = samples()
    mine = slice(0, 15) if rank == 0 else slice(15, 40)
    found = pac_bayes_bound(network(), cut, (x[mine], y[mine]), process_group=torch.distributed.group.WORLD)
    return found.value, found.printed, found.standard_error


def test_two_processes_give_the_bound_of_one(tmp_path):
    alone = pac_bayes_bound(network(), cut, samples())
    both = on_ranks(_on_rank, tmp_path)
    assert both[0] == both[1]
    assert both[0] == pytest.approx((alone.value, alone.printed, alone.standard_error), rel=1e-6)
