"""Where a method's options make it SAM it is SAM, bit for bit; and what happens at its edges."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests.family_cases import ranks
from tests.family_world import batches, flat, network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import flatwise


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **options})


def train(name: str, model: nn.Module, steps: int = 12, opt: Any = None, **options: Any) -> Any:
    opt = opt or flatwise.create(name, sgd(model), **options)
    reduction = "none" if ranks(name) and min(opt._batching.top_fraction, opt._batching.rising_fraction) < 1 else "mean"
    for t, batch in enumerate(batches(steps, torch.float32)):
        torch.manual_seed(t)
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1], reduction=reduction), batch)
    return opt


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gsam", {"alpha": 0.0, "rho": 0.05}),
        ("wsam", {"gamma": 0.5, "decoupled": False}),
        ("pgn", {"alpha": 1.0, "rho": 0.05}),
        ("fsam", {"sigma": 0.0, "rho": 0.05}),
        ("vasso", {"theta": 1.0, "rho": 0.05}),
        ("looksam", {"every": 1, "rho": 0.05}),
        ("k-sam", {"top_fraction": 1.0}),
        ("esam-sds", {"rising_fraction": 1.0}),
        ("every-k", {"every": 1}),
        ("bernoulli", {"probability": 1.0}),
        ("warmup-off", {"warmup_steps": 0}),
        ("late", {"window": (0.0, 1.0), "total_steps": 12}),
        ("m-sam", {"micro_batch_size": 12}),
        ("quarter", {"ascent_fraction": 1.0}),
        ("multi-step", {"ascent_steps": 1}),
        ("lp", {"p": 2}),
        ("asam", {"adaptive": False, "eta": 0.0, "rho": 0.05}),
    ],
)
def test_it_is_sam(name: str, options: dict[str, Any]) -> None:
    model, plain = network(dtype=torch.float32), network(dtype=torch.float32)
    train(name, model, **options)
    train("sam", plain)
    for (key, got), want in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(got, want), key


def test_sam_on_of_a_network_that_is_all_norm_is_sam() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.LayerNorm(6), nn.ReLU(), nn.LayerNorm(6))

    def run(name: str, **options: Any) -> Tensor:
        model = make()
        opt = flatwise.create(name, sgd(model), rho=0.05, **({"model": model} if name == "sam-on" else {}))
        for batch in batches(8, torch.float32):
            opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch)
        return flat(model)

    assert torch.equal(run("sam-on"), run("sam"))


def test_layerwise_with_one_tensor_is_sam() -> None:
    def run(name: str) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(6, 3, bias=False)
        opt = flatwise.create(name, sgd(model), rho=0.05)
        for batch in batches(8, torch.float32):
            opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch)
        return flat(model)

    torch.testing.assert_close(run("layerwise"), run("sam"), rtol=1e-6, atol=1e-7)


def test_msam_is_the_form_with_displaced_weights() -> None:
    """The authors' form: weights at rest are w - rho v / ||v||."""
    model, rho, lr = network(), 0.3, 0.05
    opt = flatwise.create("msam", sgd(model), rho=rho)
    other = network()
    shift = [torch.zeros_like(p) for p in other.parameters()]
    momentum = [torch.zeros_like(p) for p in other.parameters()]
    for t, (x, y) in enumerate(batches(20)):
        torch.manual_seed(t)
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (x, y))
        torch.manual_seed(t)
        other.zero_grad()
        F.cross_entropy(other(x), y).backward()
        with torch.no_grad():
            for p, s, v in zip(other.parameters(), shift, momentum, strict=True):
                p -= s
                v.mul_(0.9).add_(p.grad)
                p -= lr * v
            norm = torch.cat([v.flatten() for v in momentum]).norm()
            for p, s, v in zip(other.parameters(), shift, momentum, strict=True):
                s.copy_(-rho * v / norm)
                p += s
    rest = torch.cat([(p - s).detach().flatten() for p, s in zip(other.parameters(), shift, strict=True)])
    torch.testing.assert_close(flat(model), rest, rtol=0, atol=1e-10)


def test_the_kept_part_of_looksam_is_orthogonal_to_the_gradient() -> None:
    model = network()
    model[3].p = 0.0
    opt = flatwise.create("looksam", sgd(model), every=2)
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    opt.zero_grad()
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (x, y))
    kept = torch.cat([entries["sam_kept"].flatten() for entries in opt.state_dict()["state"].values()])
    assert abs(float(kept @ g)) < 1e-12 * float(kept.norm() * g.norm())
    assert kept.norm() > 0.01 * g.norm()


def test_looksam_without_radius_forgets_to_reuse() -> None:
    model = network(dtype=torch.float32)
    opt = train("looksam", model)
    twin, base = copy.deepcopy((model, opt.base_optimizer))
    opt.param_groups[0]["rho"] = 0.0
    x, y = batches(1, torch.float32)[0]
    torch.manual_seed(0)
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (x, y))
    torch.manual_seed(0)
    base.zero_grad()
    F.cross_entropy(twin(x), y).backward()
    base.step()
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("name", ["vasso", "fsam", "stale", "looksam", "ae-sam"])
def test_one_bad_batch_spoils_no_memory(name: str) -> None:
    model = network(dtype=torch.float32)
    options = {"total_steps": 12} if name == "ae-sam" else {}
    opt = train(name, model, **options)
    x, y = batches(1, torch.float32)[0]
    opt.step(lambda b: math.nan * F.cross_entropy(model(b[0]), b[1]), (x, y))
    reasons = []
    for _ in range(6):
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (x, y))
        reasons.append(opt.last.reason)
    assert "perturbed" in reasons
    assert "non-finite update" not in reasons


def test_a_bad_second_gradient_does_not_reach_the_weights_late() -> None:
    model = network(dtype=torch.float32)
    opt = train("wsam", model)
    before, calls = flat(model), 0

    def loss_fn(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(model(batch[0]), batch[1]) * (math.nan if calls == 2 else 1.0)

    opt.step(loss_fn, batches(1, torch.float32)[0])
    assert opt.last.reason == "non-finite update"
    assert torch.equal(flat(model), before)
    train("wsam", model, opt=opt)
    assert not torch.equal(flat(model), before)
    assert flat(model).isfinite().all()


class Gated(nn.Module):
    """A norm layer that the loss may not see."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head, self.gate = nn.LayerNorm(6), nn.Linear(6, 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.gate * self.norm(x))


def test_sam_on_steps_where_its_layers_have_no_gradient() -> None:
    model, plain = Gated(), Gated()
    model.gate = plain.gate = 0.0
    opt, base = flatwise.create("sam-on", sgd(model), model=model), sgd(plain)
    x, y = batches(1, torch.float32)[0]
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (x, y))
    assert opt.last.reason == "zero gradient"
    F.cross_entropy(plain(x), y).backward()
    base.step()
    assert torch.equal(flat(model), flat(plain))
    assert not torch.equal(flat(model), flat(Gated()))


def test_sam_on_computes_no_weight_gradients_in_its_first_pass() -> None:
    model = Gated()
    opt = flatwise.create("sam-on", sgd(model), model=model)
    seen: list[tuple[str, ...]] = []

    def loss_fn(batch: Any) -> Tensor:
        seen.append(tuple(name for name, p in model.named_parameters() if p.requires_grad))
        return F.cross_entropy(model(batch[0]), batch[1])

    opt.step(loss_fn, batches(1, torch.float32)[0])
    assert seen == [("norm.weight", "norm.bias"), ("norm.weight", "norm.bias", "head.weight", "head.bias")]


def test_ties_and_single_samples() -> None:
    for name, option in (("k-sam", "top_fraction"), ("esam-sds", "rising_fraction")):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        opt = flatwise.create(name, sgd(model), **{option: 0.3})
        sizes: list[int] = []

        def loss_fn(batch: Any, model: nn.Module = model, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(batch[0]))
            return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

        opt.step(loss_fn, (torch.ones(10, 6), torch.zeros(10, dtype=torch.long)))
        assert sizes == ([10, 3, 3] if name == "k-sam" else [10, 10, 3])
        opt.step(loss_fn, (torch.ones(1, 6), torch.zeros(1, dtype=torch.long)))
        assert sizes[3:] == [1, 1, 1]
        with pytest.raises(ValueError, match="must return one loss for each of the 10 samples"):
            opt.step(
                lambda b, model=model: F.cross_entropy(model(b[0]), b[1]),
                (torch.ones(10, 6), torch.zeros(10, dtype=torch.long)),
            )


def test_random_decisions_are_the_same_on_every_rank() -> None:
    def decisions(seed: int) -> list[bool]:
        schedule = flatwise.Schedule(probability=0.3, seed=seed)
        return [schedule.active(step) for step in range(500)]

    torch.manual_seed(1)
    one = decisions(7)
    torch.manual_seed(2)
    assert decisions(7) == one
    assert decisions(8) != one
    assert 0.2 < sum(one) / 500 < 0.4


def test_the_radius_of_gsam_follows_the_learning_rate_and_is_saved() -> None:
    model = network(dtype=torch.float32)
    opt = flatwise.create("gsam", sgd(model, lr=0.1), rho=0.5, rho_min=0.1)
    batch = batches(1, torch.float32)[0]
    radii = []
    for lr in (0.1, 0.05, 0.0):
        opt.param_groups[0]["lr"] = lr
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch)
        radii.append(opt.param_groups[0]["rho"])
    assert radii == pytest.approx([0.5, 0.3, 0.1])
    fresh = flatwise.create("gsam", sgd(network(dtype=torch.float32), lr=0.1), rho=0.9, rho_min=0.1)
    fresh.load_state_dict(opt.state_dict())
    assert fresh.param_groups[0]["sam_rho_max"] == 0.5


@pytest.mark.parametrize("name", ["sam", "msam", "looksam"])
def test_averages_of_the_weights_stack(name: str) -> None:
    model = network(dtype=torch.float32)
    opt = flatwise.create(name, sgd(model))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    expected = flat(model)
    for t, batch in enumerate(batches(10, torch.float32)):
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch)
        ema.update_parameters(model)
        expected = flat(model) if t == 0 else 0.9 * expected + 0.1 * flat(model)
    torch.testing.assert_close(flat(ema.module), expected)
    update_bn([x for x, _ in batches(10, torch.float32)], ema)
    assert not torch.equal(ema.module[1].running_mean, model[1].running_mean)


def test_a_tensor_with_nothing_uphill_does_not_spoil_the_second_order_term() -> None:
    model = network(dtype=torch.float32)  # whose BatchNorm has biases of zero, so that T g is zero there
    opt = flatwise.create("second-order", sgd(model), adaptive=True, scope="tensor")
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batches(1, torch.float32)[0])
    assert opt.last.updated
    assert flat(model).isfinite().all()


def test_a_gradient_that_is_cleared_in_place_is_remembered() -> None:
    """``stale`` keeps a copy: what the user does with ``.grad`` between steps is not its business."""
    ends = []
    for set_to_none in (True, False):
        model = network(dtype=torch.float32)
        opt = flatwise.create("stale", sgd(model))
        for t, (x, y) in enumerate(batches(6, torch.float32)):
            torch.manual_seed(t)

            def closure(opt: Any = opt, model: Any = model, x: Any = x, y: Any = y, keep: bool = set_to_none) -> Tensor:
                opt.zero_grad(set_to_none=keep)
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            if not set_to_none and t:
                opt.zero_grad(set_to_none=False)
            opt.step(closure)
        ends.append(flat(model))
    assert torch.equal(*ends)
