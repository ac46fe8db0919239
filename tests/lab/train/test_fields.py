"""Each setting against a loop written by hand, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.train.by_hand import by_hand
from torch import Tensor

from flatwise.lab.train import TrainConfig, train

Tiny = Callable[..., TrainConfig]


def trained(config: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    result = train(config)
    return torch.load(Path(config.out) / config.folder_name() / "weights.pt", weights_only=True), result


def assert_same(config: TrainConfig, variant: str | None, **options: Any) -> None:
    state, result = trained(config)
    expected, losses = by_hand(config, variant, **options)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    per_epoch = result["steps_per_epoch"]
    for record in result["history"]:
        first = (record["epoch"] - 1) * per_epoch
        of_epoch = losses[first : first + per_epoch]
        assert record["train_loss"] == pytest.approx(sum(of_epoch) / len(of_epoch), rel=1e-6)
    assert result["steps"] == len(losses)


FIELDS: list[dict[str, Any]] = [
    {}, {"seed": 3}, {"nesterov": False}, {"momentum": 0.5}, {"optimizer": "adamw", "lr": 0.002},
    {"optimizer": "rmsprop", "lr": 0.002}, {"weight_decay": 0.05}, {"weight_decay": 0.05, "decay": "matrices"},
    {"weight_decay": 0.05, "decay_in_loss": True}, {"weight_decay": 0.05, "decay_in_loss": True, "decay": "matrices"},
    {"schedule": "step", "milestones": "0.3,0.6", "gamma": 0.3}, {"schedule": "linear"}, {"schedule": "constant"},
    {"warmup": 0.75}, {"warmup": 1.0, "schedule": "step"}, {"clip": 0.3}, {"label_smoothing": 0.2}, {"ema": 0.8},
    {"ema": 0.2}, {"steps": 6}, {"epochs": 3}, {"batch_size": 24}, {"batch_size": 1000}, {"accumulate": 3},
    {"mixup": 0.4}, {"cutmix": 0.4}, {"mixup": 0.4, "label_smoothing": 0.1}, {"augment": "basic"},
    {"augment": "basic+cutout", "cutout": 3}, {"noise": "asymmetric"}, {"label_noise": 0.0}, {"val_fraction": 0.0},
    {"train_size": 90}, {"freeze_norm": True}, {"channels_last": True, "model": "cnn-small"}, {"precision": "bf16"},
]  # fmt: skip


@pytest.mark.usefixtures("with_dropout")
@pytest.mark.parametrize("settings", FIELDS, ids=str)
def test_a_setting_of_the_base_optimizer(tiny: Tiny, settings: dict[str, Any]) -> None:
    assert_same(tiny(method="base", **settings), None)


SAM_FIELDS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({}, "sam", {}),
    ({"rho": 0.3}, "sam", {"rho": 0.3}),
    ({"m": 8}, "sam", {"micro_batch_size": 8}),
    ({"method": "sam:m=8:rho=0.2"}, "sam", {"micro_batch_size": 8, "rho": 0.2}),
    ({"method": "asam", "rho": 0.4}, "asam", {"rho": 0.4}),
    ({"method": "gsam:alpha=0.3,rho_min=0.02"}, "gsam", {"alpha": 0.3, "rho_min": 0.02}),
    ({"clip": 0.3, "rho": 0.3}, "sam", {"rho": 0.3}),
    ({"clip": 0.3, "m": 8}, "sam", {"micro_batch_size": 8}),
    ({"accumulate": 2, "rho": 0.3}, "sam", {"rho": 0.3}),
    ({"weight_decay": 0.1, "decay_in_loss": True, "rho": 0.3}, "sam", {"rho": 0.3}),
    ({"mixup": 0.4, "label_smoothing": 0.1, "ema": 0.7, "clip": 0.5, "warmup": 0.5}, "sam", {}),
    ({"freeze_norm": True}, "sam", {}),
    ({"precision": "bf16"}, "sam", {}),
    ({"method": "sam:window=(0.5,1.0)"}, "sam", {"window": (0.5, 1.0), "total_steps": 8}),
]


@pytest.mark.usefixtures("with_dropout")
@pytest.mark.parametrize(("settings", "variant", "options"), SAM_FIELDS, ids=lambda value: str(value))
def test_a_setting_with_two_passes(tiny: Tiny, settings: dict[str, Any], variant: str, options: dict[str, Any]) -> None:
    assert_same(tiny(**settings), variant, **options)


@pytest.mark.usefixtures("with_dropout")
def test_compiled_is_the_same_within_rounding(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    assert_same(tiny(compile=True), "sam")
    assert len(compiled) == 1


def test_sam_from_the_formula(tiny: Tiny) -> None:
    """Two passes without the core: w + rho g / |g|, clip what the base gets, average."""
    config = tiny(rho=0.3, clip=0.5, ema=0.7, label_smoothing=0.1, weight_decay=0.01, momentum=0.0, nesterov=False)
    state, _ = trained(config)
    from flatwise.lab.models import build_model
    from flatwise.lab.train.samples import load_samples
    from flatwise.seeds import derive, stream

    samples = load_samples(config)
    model = build_model("mlp", samples.shape, samples.classes, derive(0, "weights"))
    weights = [w for _, w in model.named_parameters()]
    average = [w.detach().clone() for w in weights]
    for step in range(8):
        epoch, place = divmod(step, 4)
        positions = torch.randperm(65, generator=stream(0, "order", epoch))[16 * place : 16 * place + 16]
        images = samples.plain("training", positions)
        targets = torch.nn.functional.one_hot(samples.labels[positions], 10) * 0.9 + 0.01

        def gradient(images: Tensor = images, targets: Tensor = targets) -> list[Tensor]:
            loss = -(targets * model(images).log_softmax(1)).sum(1).mean()
            return list(torch.autograd.grad(loss, weights))

        with torch.no_grad():
            kept = [w.clone() for w in weights]
        first = gradient()
        norm = torch.cat([g.flatten() for g in first]).norm()
        with torch.no_grad():
            for w, g in zip(weights, first, strict=True):
                w += 0.3 * g / norm
        second = gradient()
        factor = min(1.0, 0.5 / float(torch.cat([g.flatten() for g in second]).norm()))
        lr = 0.05 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 8))).item()
        with torch.no_grad():
            for w, old, g, a in zip(weights, kept, second, average, strict=True):
                w.copy_(old - lr * (factor * g + 0.01 * old))
                d = min(0.7, (1 + step) / (10 + step))
                a.copy_(d * a + (1 - d) * w)
    for (name, _), value in zip(model.named_parameters(), average, strict=True):
        assert torch.allclose(state[name], value, atol=1e-6), name
