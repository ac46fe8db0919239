"""Networks of timm by name: sizes, heads, pretrained weights from a file, and one clear error where there are none."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.models import MODELS, build_model
from flatwise.lab.models.from_timm import SHORT, TIMM

timm = pytest.importorskip("timm")
torch.set_num_threads(1)

# Millions of parameters on ImageNet, as printed.
PUBLISHED = {
    "resnet50": "25.6",  # timm and torchvision; the SAM paper has no counts
    "resnet152": "60.2",
    "tf_efficientnet_b0": "5.3",  # Tan & Le, ICML 2019, table 2
    "tf_efficientnet_b7": "66",
    "tf_efficientnet_l2": "480",  # Xie et al., CVPR 2020, table 7
    "vit_small": "22",  # Touvron et al., 2021, table 1
    "vit_base": "86",  # Dosovitskiy et al., ICLR 2021, table 1 (cut)
    "mixer_b16": "59",  # Tolstikhin et al., NeurIPS 2021, table 1 (cut)
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(name, (3, 224, 224), 1000, seed=0).parameters()) / 1e6
    digits = len(PUBLISHED[name].partition(".")[2])
    assert f"{math.floor(count) if name in ('vit_base', 'mixer_b16') else count:.{digits}f}" == PUBLISHED[name]


def test_the_names_that_are_shown_exist() -> None:
    assert all(timm.is_model(SHORT.get(name, name)) for name in TIMM)
    assert len(set(MODELS)) == len(MODELS)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_classes_channels_size_and_seed(name: str) -> None:
    state = torch.get_rng_state()
    model = build_model(name, (1, 32, 32), 7, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.training
    again, other = build_model(name, (1, 32, 32), 7, seed=3), build_model(name, (1, 32, 32), 7, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_network_of_one_size_is_made_for_the_images() -> None:
    with torch.device("meta"):
        for name in ("vit_small", "mixer_b16"):
            model = build_model(name, (3, 64, 96), 10, seed=0)
            assert model(torch.empty(2, 3, 64, 96)).shape == (2, 10)


@pytest.mark.parametrize(("name", "rate"), [("tf_efficientnet_b0", 0.2), ("tf_efficientnet_b7.ra_in1k", 0.5)])
def test_an_efficientnet_drops_as_its_paper_says(name: str, rate: float) -> None:
    with torch.device("meta"):
        model = build_model(name, (3, 64, 64), 10, seed=0)
    assert model.drop_rate == rate
    paths = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert 0.15 < max(paths) < 0.2  # falls from block to block


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Let timm find the weights of ``test_efficientnet`` in a file instead of fetching them."""
    torch.manual_seed(5)
    state = timm.create_model("test_efficientnet", num_classes=1000).state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    create = timm.create_model

    def local(name: str, **options: Any) -> nn.Module:
        if options.get("pretrained"):
            options["pretrained_cfg_overlay"] = {"file": str(path)}
        return create(name, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(timm, "create_model", local)
    return state  # type: ignore[no-any-return]


@pytest.mark.parametrize("classes", [10, 1000])
def test_pretrained_weights_with_a_new_head(weights: dict[str, torch.Tensor], classes: int) -> None:
    model = build_model("test_efficientnet", (3, 64, 64), classes, seed=0, pretrained=True)
    found = model.state_dict()
    assert all(torch.equal(found[key], weights[key]) for key in weights if not key.startswith("classifier"))
    head = found["classifier.weight"]
    bound = 1 / math.sqrt(classes)
    assert head.shape[0] == classes
    assert not found["classifier.bias"].any()
    assert 0.99 * bound < head.abs().max() <= bound
    again = build_model("test_efficientnet", (3, 64, 64), classes, seed=0, pretrained=True)
    other = build_model("test_efficientnet", (3, 64, 64), classes, seed=1, pretrained=True)
    assert torch.equal(again.state_dict()["classifier.weight"], head)
    assert not torch.equal(other.state_dict()["classifier.weight"], head)


def test_pretrained_weights_with_their_head(weights: dict[str, torch.Tensor]) -> None:
    kept = build_model("test_efficientnet", (3, 64, 64), 1000, seed=0, pretrained=True, keep_head=True).state_dict()
    assert all(torch.equal(kept[key], weights[key]) for key in weights)
    with pytest.raises(UserError, match="has 1000 classes and the data 10: leave out --keep-head"):
        build_model("test_efficientnet", (3, 64, 64), 10, seed=0, pretrained=True, keep_head=True)


def test_weights_that_cannot_be_fetched_give_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    with pytest.raises(UserError, match=r"3×64×64 \(Name or service not known\).*connect, or copy them") as caught:
        build_model("test_vit", (3, 64, 64), 10, seed=0, pretrained=True)
    assert "\n" not in str(caught.value)
    state = torch.get_rng_state()
    with pytest.raises(UserError):
        build_model("test_vit", (3, 64, 64), 10, seed=0, pretrained=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_do_not_exist() -> None:
    with pytest.raises(UserError, match=r"timm has no pretrained weights of efficientnet_l2"):
        build_model("efficientnet_l2", (3, 64, 64), 10, seed=0, pretrained=True)
    with pytest.raises(UnknownNameError, match=r"unknown weights .*b7.ra_in1'; did you mean '.*ra_in1k'"):
        build_model("tf_efficientnet_b7.ra_in1", (3, 64, 64), 10, seed=0)


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("wrn28-10", "wrn-28-10"),
        ("pyramidnet-272-200-shakdrop", "pyramidnet-272-200-shakedrop"),
        ("tf_efficientnet_b9", "tf_efficientnet_b8"),
        ("convnext_tinny", "convnext_tiny"),
    ],
)
def test_an_unknown_name_gets_the_nearest_of_both_lists(word: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown model '{word}'; did you mean '{near}'"):
        build_model(word, (3, 32, 32), 10, seed=0)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"^resnet50 is a network of timm: pip install 'flatwise\[timm\]'$"):
        build_model("resnet50", (3, 32, 32), 10, seed=0)
    with pytest.raises(UserError, match=r"own; did you mean 'wrn-28-10'\? For those of timm: pip install"):
        build_model("wrn28-10", (3, 32, 32), 10, seed=0)
    with pytest.raises(UserError, match=r"'zzz' is none of flatwise's own\. For those of timm"):
        build_model("zzz", (3, 32, 32), 10, seed=0)
    assert build_model("wrn-10-1", (3, 32, 32), 10, seed=0) is not None
