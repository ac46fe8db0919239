"""The networks: sizes known from the literature, shapes, and weights that the seed alone decides."""

from __future__ import annotations

import pytest
import torch

from flatwise.errors import UserError
from flatwise.lab.models import MODELS, build_model


@pytest.mark.parametrize("side", [8, 28])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_fits_every_size(name: str, side: int) -> None:
    model = build_model(name, side, 10, seed=0)
    assert model(torch.randn(4, 1, side, side)).shape == (4, 10)


@pytest.mark.parametrize(("name", "blocks", "count"), [("resnet8", 1, 75_290), ("resnet20", 3, 269_722)])
def test_residual_networks_have_the_size_of_the_paper(name: str, blocks: int, count: int) -> None:
    # The paper's count is for three colours; the first layer is 2 x 16 x 9 smaller with one.
    size = sum(weight.numel() for weight in build_model(name, 28, 10, seed=0).parameters())
    assert size == count - 2 * 16 * 9
    layers = [m for m in build_model(name, 28, 10, seed=0).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(layers) + 1 == 6 * blocks + 2


def test_the_seed_alone_decides_the_weights() -> None:
    state = torch.get_rng_state()
    first = build_model("cnn-small", 8, 10, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    second, other = build_model("cnn-small", 8, 10, seed=7), build_model("cnn-small", 8, 10, seed=8)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'resnet8'"):
        build_model("resnet9", 8, 10, seed=0)
