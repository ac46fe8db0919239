"""What is measured of trained weights, against closed forms and slow oracles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.lab.paper.made_up import TINY
from torch import nn
from torch.nn import functional

from flatwise import measure
from flatwise.lab.paper.measures import by_epoch, by_size, by_spectrum, by_steps, cosine_of_updates, loss_fn
from flatwise.lab.paper.trained import load_trained
from flatwise.lab.train import TrainConfig, train


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_the_cosine_against_the_derivative_of_the_whole_objective() -> None:
    model, rho = network(), 0.3
    inputs, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    names = [name for name, _ in model.named_parameters()]
    shapes = [value.shape for value in model.parameters()]
    start = torch.cat([value.detach().flatten() for value in model.parameters()])

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        values = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return functional.cross_entropy(torch.func.functional_call(model, values, (inputs,)), labels)

    def objective(flat: torch.Tensor) -> float:
        at = flat.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(at), at)
        return float(loss(flat + rho * g / g.norm()))

    step = 1e-5
    whole = torch.tensor([
        (objective(start + step * unit) - objective(start - step * unit)) / (2 * step)
        for unit in torch.eye(len(start), dtype=torch.float64)
    ], dtype=torch.float64)  # fmt: skip
    at = start.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(at), at)
    moved = (start + rho * g / g.norm()).requires_grad_()
    (first,) = torch.autograd.grad(loss(moved), moved)
    expected = float(torch.dot(first, whole) / (first.norm() * whole.norm()))
    assert expected < 0.999  # so that a cosine of 1 would not pass
    assert cosine_of_updates(model, (inputs, labels), rho) == pytest.approx(expected, abs=1e-7)


def test_without_a_radius_the_updates_are_the_same() -> None:
    batch = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    assert cosine_of_updates(network(), batch, 1e-9) == pytest.approx(1.0, abs=1e-9)


def trained(folder: Path, **changes: object) -> TrainConfig:
    fields = {**TINY, "train_size": 600, "batch_size": 64, "epochs": 4, "val_fraction": 0.1, "tracker": "none"}
    config = TrainConfig(**{**fields, "quiet": True, "out": str(folder), "seed": 1, "lr": 0.05, **changes})
    train(config)
    return config


def test_sharpness_by_steps(tmp_path: Path) -> None:
    one = by_steps(trained(tmp_path, method="sam", rho=0.1))
    five = by_steps(trained(tmp_path, method="multi-step:ascent_steps=5", rho=0.1))
    # One step is SAM's own; twenty keep the highest point that they met, which is no lower than that of one.
    assert 0 < one["sharpness_own_steps"] <= one["sharpness_common_steps"]
    assert 0 < five["sharpness_own_steps"] <= five["sharpness_common_steps"]
    assert by_steps(trained(tmp_path, method="base")) == {}


def test_m_sharpness_falls_with_m_and_the_gap_is_that_of_the_accuracies(tmp_path: Path) -> None:
    config = trained(tmp_path, method="base")
    values = by_size(config)
    rises = [values[f"m_sharpness_{m}"] for m in (1, 4, 16, 64)]
    assert rises == sorted(rises, reverse=True)
    result = train(config)
    assert values["train_accuracy"] == pytest.approx(result["train_accuracy"])
    assert values["gap"] == pytest.approx(result["train_accuracy"] - result["test_accuracy"])


def test_the_cosine_over_training_and_kept_weights_that_are_made_again(tmp_path: Path) -> None:
    config = trained(tmp_path, method="sam", rho=0.1, keep_epochs="1,2,3")
    values = by_epoch(config)
    assert set(values) == {"cosine_1", "cosine_2", "cosine_3", "cosine_4", "cosine_first_half", "cosine_end"}
    assert values["cosine_first_half"] == pytest.approx((values["cosine_1"] + values["cosine_2"]) / 2)
    assert values["cosine_end"] == values["cosine_4"]
    assert all(0 < value <= 1 + 1e-9 for value in values.values())
    for path in tmp_path.rglob("weights-epoch-*"):
        path.unlink()
    assert by_epoch(config) == values
    assert by_epoch(trained(tmp_path, method="base", keep_epochs="1")) == {}


def test_the_spectrum_of_each_kept_epoch(tmp_path: Path) -> None:
    config = trained(tmp_path, method="sam", rho=0.1, keep_epochs="1,4", epochs=4)
    values = by_spectrum(config)
    assert set(values) == {"largest_1", "ratio_1", "largest_4", "ratio_4"}
    assert values["largest_1"] != values["largest_4"]
    assert min(values["ratio_1"], values["ratio_4"]) >= 1.0
    last = load_trained(config)
    (top,) = measure.hessian_eigenvalues(
        last.model, loss_fn, last.batches(64, 8), 1, which="largest", progress=False
    ).values
    assert values["largest_4"] == pytest.approx(top, rel=1e-2)
