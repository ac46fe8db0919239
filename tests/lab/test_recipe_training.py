"""Every recipe builds and trains: two steps with a narrow network of the same family, on images that are made here.

The networks themselves are built at full size on the meta device, which has shapes and no numbers; the slow test trains
each of them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flatwise.lab.models import build_model
from flatwise.lab.paper.experiments import WRN_28_10_SIZE
from flatwise.lab.paper.steps import facts, passes_of
from flatwise.lab.recipes import load_recipe, recipe_names
from flatwise.lab.train.config import TrainConfig, train_config_from

if importlib.util.find_spec("flatwise.lab.images") is None:
    pytest.skip("the lab's data sets are not connected yet", allow_module_level=True)

from flatwise.lab.images import Images
from flatwise.lab.sets.memory import InMemory, mean_and_deviation
from flatwise.lab.train import train

# Narrow networks with the same parts: mixing of branches, pyramids, frozen normalisation, none at all.
NARROW = {
    "wrn-28-10": "wrn-10-1",
    "wrn-40-2": "wrn-10-1",
    "wrn-40-10-nobn": "wrn-10-1-nobn",
    "shakeshake-26-2x96d": "shakeshake-8-2x4d",
    "pyramidnet-272-200": "pyramidnet-11-6",
    "pyramidnet-272-200-shakedrop": "pyramidnet-11-6-shakedrop",
    "resnet20": "resnet8",
    "resnet32": "resnet8",
    "resnet50": "resnet18",
    "resnet101": "resnet18",
    "resnet152": "resnet18",
    "tf_efficientnet_b7.ra_in1k": "tf_efficientnet_b0",
    "tf_efficientnet_l2.ns_jft_in1k_475": "tf_efficientnet_b0",
}
RECIPES = {name: train_config_from(load_recipe(name)) for name in recipe_names()}
NETWORKS = {
    (config.model, facts(config).channels, facts(config).side, facts(config).classes): name
    for name, config in RECIPES.items()
}
# Recipes that differ in numbers alone (learning rate, radius, length, depth) are one kind; the slow run has all.
KINDS = {
    (
        NARROW[config.model],
        config.method,
        config.augment,
        config.mixup,
        config.labels_from,
        config.label_smoothing,
    ): name
    for name, config in RECIPES.items()
}


def made_up(name: str, channels: int, side: int, classes: int, count: int) -> Images:
    """Random images in the form of a data set."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count + 8, channels, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count + 8,), generator=generator)
    mean, std = mean_and_deviation(images[:count])
    return Images(
        name=name, train=InMemory(images[:count]), train_labels=labels[:count], test=InMemory(images[count:]),
        test_labels=labels[count:], class_names=tuple(str(number) for number in range(classes)), mean=mean, std=std,
        flips=True, padding=4, policy="svhn" if name == "svhn" else "cifar",
    )  # fmt: skip


@pytest.fixture
def two_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Train two steps with a recipe's settings, on random images."""

    def run(config: TrainConfig, *, side: int, images: int) -> dict[str, Any]:
        data = facts(config)
        made = made_up(config.dataset, data.channels, side, data.classes, 3 * images)
        monkeypatch.setattr("flatwise.lab.train.samples.load_images", lambda *_, **__: made)
        small = replace(
            config, resolution=None, steps=2, batch_size=images,
            m=None if config.m is None else min(config.m, images // 2),
            pretrained=False, keep_head=False, keep_epochs="0", out=str(tmp_path), tracker="none", loader_workers=0,
        )  # fmt: skip
        if small.labels_from is not None:
            first = replace(small, labels_from=None)
            train(first)
            small = replace(small, labels_from=str(tmp_path / first.folder_name()))
        result = train(small)
        return {**result, "folder": tmp_path / small.folder_name(), "small": small}

    return run


def check(result: dict[str, Any], config: TrainConfig) -> None:
    """The training was the recipe's: what it says about itself, and what it did."""
    small: TrainConfig = result["small"]
    assert (result["finished"], result["steps"]) == (True, 2)
    assert math.isfinite(result["history"][-1]["train_loss"])
    assert math.isfinite(result["test_loss"])
    assert result["method"]["options"].get("rho") == config.rho
    assert result["effective_m"] == (small.m or small.batch_size)
    assert result["gradient_evaluations_per_step"] == passes_of(config)
    if config.labels_from is None:
        assert result["wrong_labels"] == round(config.label_noise * result["training_images"])
    first, last = (
        torch.load(result["folder"] / name, weights_only=True) for name in ("weights-epoch-0.pt", "weights.pt")
    )
    changed = [name for name, value in last.items() if not torch.equal(value, first[name])]
    assert changed
    if config.freeze_norm:
        assert not [name for name in changed if "running_" in name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS.values() else pytest.mark.slow) for name in RECIPES]
)
def test_every_recipe_trains_two_steps(name: str, two_steps: Callable[..., dict[str, Any]]) -> None:
    config = RECIPES[name]
    if "resnet18" in NARROW[config.model] or "efficientnet" in config.model:
        pytest.importorskip("timm")
    narrow = replace(config, model=NARROW[config.model])
    check(two_steps(narrow, side=min(facts(config).side, 32), images=4), config)


@pytest.mark.parametrize(("model", "channels", "side", "classes"), NETWORKS)
def test_every_network_takes_the_images_of_its_data_set(model: str, channels: int, side: int, classes: int) -> None:
    if model.startswith(("resnet50", "resnet1", "tf_")):
        pytest.importorskip("timm")
    with torch.device("meta"):
        network = build_model(model, (channels, side, side), classes, 0)
        assert network(torch.empty(2, channels, side, side)).shape == (2, classes)


def test_the_length_of_a_random_direction_is_for_the_network_that_is_there() -> None:
    with torch.device("meta"):
        network = build_model("wrn-28-10", (3, 32, 32), 10, 0)
    assert sum(weight.numel() for weight in network.parameters()) == WRN_28_10_SIZE


@pytest.mark.slow
@pytest.mark.parametrize(("model", "channels", "side", "classes"), NETWORKS)
def test_every_network_trains_two_steps(
    model: str, channels: int, side: int, classes: int, two_steps: Callable[..., dict[str, Any]]
) -> None:
    config = RECIPES[NETWORKS[model, channels, side, classes]]
    check(two_steps(config, side=min(side, 64), images=2), config)
