"""How networks begin: variances as printed, the last layer, and a deep network without normalisation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatwise.lab.models import build_model

AUTHORS = ["wrn-16-4", "shakeshake-8-2x32d", "pyramidnet-11-64", "pyramidnet-11-64-shakedrop", "vgg16-bn"]


@pytest.mark.parametrize("name", [*AUTHORS, "resnet20"])
def test_convolutions_are_normal_with_variance_two_over_fan_out(name: str) -> None:
    seen = 0
    for module in build_model(name, (3, 32, 32), 100, seed=0).modules():
        if isinstance(module, nn.Conv2d):
            weights = module.weight.detach()
            expected = math.sqrt(2 / (module.out_channels * module.kernel_size[0] * module.kernel_size[1]))
            count = weights.numel()
            # The deviation of an estimated deviation is sigma / sqrt(2 n), that of the mean sigma / sqrt(n).
            assert abs(weights.std().item() / expected - 1) < 5 / math.sqrt(2 * count)
            assert abs(weights.mean().item() / expected) < 5 / math.sqrt(count)
            if count > 50_000:  # normal, not uniform: the fourth moment
                assert (weights**4).mean().item() / expected**4 == pytest.approx(3, rel=0.1)
                seen += 1
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    assert seen or name == "resnet20"


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("name", AUTHORS)
def test_the_last_layer_is_uniform_by_the_number_of_classes(name: str, classes: int) -> None:
    head = [m for m in build_model(name, (3, 32, 32), classes, seed=0).modules() if isinstance(m, nn.Linear)][-1]
    bound = 1 / math.sqrt(classes)
    assert not head.bias.any()
    largest = head.weight.abs().max().item()
    assert bound * (1 - 20 / head.weight.numel()) < largest <= bound
    assert head.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_without_normalisation_branches_begin_as_zero_and_scaled_by_their_number() -> None:
    for depth, branches in ((10, 3), (40, 18)):
        model = build_model(f"wrn-{depth}-4-nobn", (3, 32, 32), 10, seed=0)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        firsts = [p for n, p in model.named_parameters() if n.endswith("first.weight")]
        seconds = [p for n, p in model.named_parameters() if n.endswith("second.weight")]
        assert len(firsts) == len(seconds) == branches
        assert not any(p.any() for p in seconds)
        expected = math.sqrt(2 / (9 * firsts[-1].shape[1]) / branches)
        assert firsts[-1].std().item() == pytest.approx(expected, rel=0.02)


def updates(depth: int) -> Tensor:
    """Return how much the output of a network without normalisation moves by each of four steps."""
    model = build_model(f"wrn-{depth}-1-nobn", (3, 8, 8), 10, seed=0)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():  # what the output is made of at first, alike in all depths
        if name == "stem.weight" or name.endswith("shortcut.weight"):
            nn.init.kaiming_normal_(weight, mode="fan_in")
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    outputs = [model(x).detach()]
    for _ in range(4):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        outputs.append(model(x).detach())
    return torch.stack([(after - before).norm() for before, after in itertools.pairwise(outputs)])


def test_without_normalisation_a_step_moves_the_output_as_much_at_any_depth() -> None:
    shallow, deep = updates(10), updates(100)  # 3 and 48 branches
    assert torch.equal(shallow[0], deep[0])
    assert ((deep / shallow < 1.5) & (deep / shallow > 1 / 1.5)).all(), (shallow, deep)


def test_a_deep_network_without_normalisation_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:512, None] / 8 - 1
    y = torch.tensor(digits.target)[:512]
    model = build_model("wrn-28-1-nobn", (1, 8, 8), 10, seed=0)
    opt = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for indices in torch.randperm(512, generator=generator).split(64):
            opt.zero_grad()
            F.cross_entropy(model(x[indices]), y[indices]).backward()
            opt.step()
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    assert accuracy > 0.8, accuracy
