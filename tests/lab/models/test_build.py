"""The networks: the published numbers of parameters, shapes, one step each, and weights that the seed alone decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.models import build_model
from flatwise.lab.models.names import COMPARED, OWN

torch.set_num_threads(1)

# name -> parameters on CIFAR-10 in millions, as printed
PUBLISHED = {
    "resnet20": "0.27",  # He et al., CVPR 2016, table 6
    "resnet32": "0.46",
    "resnet44": "0.66",
    "resnet56": "0.85",
    "wrn-40-1": "0.6",  # Zagoruyko & Komodakis, 2016
    "wrn-40-2": "2.2",
    "wrn-16-8": "11.0",
    "wrn-28-10": "36.5",
    "wrn-40-10": "55.8",
    "wrn-22-8": "17.2",
    "shakeshake-26-2x32d": "2.9",  # Gastaldi, 2017
    "shakeshake-26-2x96d": "26.2",
    "pyramidnet-200-240": "26.6",  # Han et al., CVPR 2017, table 4
    "pyramidnet-236-220": "26.8",
    "pyramidnet-272-200": "26.0",
    "pyramidnet-272-200-shakedrop": "26.0",
    "vgg16-bn": "14.7",  # the usual count of this form; the paper's network is for ImageNet
}

# One of each family, narrow and shallow.
SMALL = [
    *COMPARED,
    "resnet32",
    "vgg16-bn",
    "wrn-10-1",
    "wrn-16-2",
    "wrn-10-1-nobn",
    "shakeshake-8-2x4d",
    "pyramidnet-11-8",
    "pyramidnet-20-9-shakedrop",
]


def parameters(name: str, classes: int = 10) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(name, (3, 32, 32), classes, seed=0).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_has_the_published_number_of_parameters(name: str) -> None:
    digits = len(PUBLISHED[name].partition(".")[2])
    assert f"{parameters(name) / 1e6:.{digits}f}" == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Counted by hand: convolutions, two for each normalised channel, head.
        (
            "wrn-10-1",
            3 * 144 + (2304 + 2304 + 64) + (4608 + 9216 + 512 + 96) + (18432 + 36864 + 2048 + 192) + 128 + 650,
        ),
        ("wrn-10-1-nobn", 3 * 144 + 16 + 4641 + (13824 + 512 + 97) + (55296 + 2048 + 193) + 650),
        ("resnet8", 75_290),
    ],
)
def test_a_small_network_has_the_parameters_counted_by_hand(name: str, count: int) -> None:
    assert parameters(name) == count


@pytest.mark.parametrize(
    ("name", "depth"),
    [("wrn-16-1", 16), ("shakeshake-26-2x4d", 26), ("pyramidnet-29-9", 29), ("resnet44", 44), ("wrn-16-1-nobn", 16)],
)
def test_the_depth_in_the_name_counts_convolutions_along_a_path_and_the_head(name: str, depth: int) -> None:
    with torch.device("meta"):
        model = build_model(name, (3, 32, 32), 10, seed=0)
    kernels = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    shortcuts = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" in n]
    twice = sum(1 for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and ".second." in n and "shake" in name)
    extra = 1 if name.startswith("wrn") else 0  # Zagoruyko & Komodakis count one of the shortcuts: 6n + 4
    assert len(kernels) - len(shortcuts) - twice + 1 + 2 * extra == depth


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 15, 15)])
@pytest.mark.parametrize("name", SMALL)
def test_every_network_fits_every_image(name: str, shape: tuple[int, ...]) -> None:
    model = build_model(name, shape, 7, seed=0)
    assert model(torch.randn(4, *shape)).shape == (4, 7)
    model.eval()
    assert model(torch.randn(1, *shape)).shape == (1, 7)


@pytest.mark.parametrize("method", ["sgd", "sam"])
@pytest.mark.parametrize("name", SMALL)
def test_training_steps_move_every_parameter(name: str, method: str) -> None:
    model = build_model(name, (3, 8, 8), 10, seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
    base = torch.optim.SGD(model.parameters(), lr=0.02)
    opt = base if method == "sgd" else flatwise.SAM(base, rho=0.05)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    # Without normalisation the head, then the ends of the branches leave 0, and then the rest feels a gradient.
    for _ in range(8 if "nobn" in name else 1):
        opt.step(closure)
    for (label, after), was in zip(model.named_parameters(), before, strict=True):
        assert torch.isfinite(after).all()
        assert not torch.equal(after, was), label


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OWN if name not in COMPARED])
def test_the_full_network_makes_a_forward_and_a_backward_pass(name: str) -> None:
    model = build_model(name, (3, 32, 32), 10, seed=0)
    loss = F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert sum(p.grad is None for p in model.parameters()) == 0


@pytest.mark.parametrize("name", ["cnn-small", "wrn-10-1", "shakeshake-8-2x4d", "pyramidnet-11-8-shakedrop"])
def test_the_seed_alone_decides_the_weights(name: str) -> None:
    state = torch.get_rng_state()
    first = build_model(name, (1, 8, 8), 10, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    second, other = build_model(name, (1, 8, 8), 10, seed=7), build_model(name, (1, 8, 8), 10, seed=8)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_networks_of_compare_begin_as_they_always_did() -> None:
    # The order in which layers draw decides their weights.
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Conv2d(1, 16, 3, bias=False), nn.Conv2d(16, 32, 3, bias=False), nn.Linear(512, 128, bias=False)]
        layers.append(nn.Linear(128, 10))
    model = build_model("cnn-small", (1, 8, 8), 10, seed=3)
    made = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(made, layers, strict=True))
    assert all(
        p.is_contiguous(memory_format=torch.channels_last)
        for p in build_model("cnn-small", (1, 28, 28), 10, 0).parameters()
        if p.dim() == 4
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        default = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        for shape in ((16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)):
            nn.Conv2d(*shape, 3, bias=False)
        head = nn.Linear(64, 10)
        nn.init.kaiming_normal_(default.weight, mode="fan_out")
    first = build_model("resnet8", (1, 28, 28), 10, seed=3)
    assert torch.equal(first.stem.weight, default.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(first.head.weight, head.weight)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn-29-10", "depth must be 6n \\+ 4; did you mean wrn-28-10 or wrn-34-10"),
        ("wrn-4-1", "did you mean wrn-10-1 or wrn-16-1"),
        ("wrn-28-0", "width must be at least 1"),
        ("shakeshake-26-2x1d", "width must be at least 2"),
        ("shakeshake-27-2x32d", "6n \\+ 2; did you mean shakeshake-26-2x32d or shakeshake-32-2x32d"),
        ("pyramidnet-270-200-shakedrop", "did you mean pyramidnet-263-200-shakedrop or pyramidnet-272-200-shakedrop"),
    ],
)
def test_a_depth_that_does_not_exist_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(name, (3, 32, 32), 10, seed=0)


def test_images_that_are_not_square() -> None:
    with pytest.raises(UserError, match="mlp needs square images, not 8×10"):
        build_model("mlp", (1, 8, 10), 10, seed=0)
    assert build_model("wrn-10-1", (3, 16, 24), 10, seed=0)(torch.randn(2, 3, 16, 24)).shape == (2, 10)
    assert build_model("vgg16-bn", (3, 16, 24), 10, seed=0)(torch.randn(2, 3, 16, 24)).shape == (2, 10)


def test_pretrained_weights_that_do_not_exist() -> None:
    with pytest.raises(UserError, match="no pretrained weights of wrn-28-10"):
        build_model("wrn-28-10", (3, 32, 32), 10, seed=0, pretrained=True)
    with pytest.raises(UserError, match="add --pretrained"):
        build_model("resnet50", (3, 32, 32), 10, seed=0, keep_head=True)


def test_an_unknown_model_names_the_nearest() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UnknownNameError, match="did you mean 'resnet8'"):
        build_model("resnet9", (1, 8, 8), 10, seed=0)
