"""The loop: paired between methods, equal to a loop written by hand, and honest in what it counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from flatwise.lab.config import CompareConfig
from flatwise.lab.data import load_data
from flatwise.lab.loop import Trainer, score
from flatwise.lab.methods import parse_methods
from flatwise.lab.models import build_model
from flatwise.seeds import derive, stream

SMALL = {"train_size": 200, "epochs": 3, "batch_size": 32}


def trainer(method: str, seed: int = 0, **settings: object) -> Trainer:
    config = CompareConfig(methods=method, **{**SMALL, **settings})
    return Trainer(config, parse_methods(config)[0], seed, load_data("digits"))


def weights(made: Trainer) -> torch.Tensor:
    return torch.cat([value.detach().flatten().float() for value in made.model.state_dict().values()])


def batches_of(made: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    original = made.batch

    def recorded(indices: torch.Tensor, shifts: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        batch = original(indices, shifts)
        seen.append(batch[0].clone())
        return batch

    monkeypatch.setattr(made, "batch", recorded)
    for epoch in range(2):
        made.train_epoch(epoch)
    return seen


def test_every_method_starts_from_the_same_weights_and_labels() -> None:
    plain, sam, asam = trainer("sgd"), trainer("sam"), trainer("asam")
    for other in (sam, asam):
        assert torch.equal(weights(plain), weights(other))
        assert torch.equal(plain.split.labels, other.split.labels)
        assert torch.equal(plain.split.validation_inputs, other.split.validation_inputs)
    assert not torch.equal(weights(plain), weights(trainer("sgd", seed=1)))


@pytest.mark.parametrize("augment", ["none", "basic"])
def test_no_method_shifts_the_sample_order_or_the_augmentation(augment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = batches_of(trainer("sgd", augment=augment), monkeypatch)
    greedy = trainer("sam", augment=augment)
    step = greedy.step

    def drawing(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        torch.rand(13)  # a method that draws from the global stream
        return step(batch)

    greedy.step = drawing
    drawn = batches_of(greedy, monkeypatch)
    assert len(plain) == len(drawn) == 2 * (180 // 32)
    assert all(torch.equal(mine, its) for mine, its in zip(plain, drawn, strict=True))


def test_the_base_is_a_loop_written_by_hand() -> None:
    made = trainer("sgd")
    losses = [made.train_epoch(epoch) for epoch in range(3)]

    model = build_model("cnn-small", (1, 8, 8), 10, derive(0, "weights"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    inputs, labels = made.split.inputs, made.split.labels
    step, by_hand = 0, []
    for epoch in range(3):
        order = torch.randperm(180, generator=stream(0, "order", epoch))
        total = []
        for start in range(0, 160, 32):
            chosen = order[start : start + 32]
            optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 15))
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            total.append(loss.detach())
            step += 1
        by_hand.append(float(torch.stack(total).mean()))
    assert losses == by_hand
    expected = torch.cat([value.flatten().float() for value in model.state_dict().values()])
    assert torch.equal(weights(made), expected.detach())


def test_a_radius_of_zero_is_the_base_bit_for_bit() -> None:
    plain, still = trainer("sgd"), trainer("sam:rho=0.0")
    for epoch in range(2):
        assert plain.train_epoch(epoch) == still.train_epoch(epoch)
    assert torch.equal(weights(plain), weights(still))


def test_sam_trains_to_other_weights() -> None:
    plain, sam = trainer("sgd"), trainer("sam:rho=0.05")
    plain.train_epoch(0)
    sam.train_epoch(0)
    assert not torch.equal(weights(plain), weights(sam))


@pytest.mark.parametrize(("method", "passes"), [("sgd", 1.0), ("sam", 2.0), ("sam:m=8", 2.0)])
def test_gradient_evaluations_are_counted_where_they_happen(method: str, passes: float) -> None:
    made = trainer(method)
    made.train_epoch(0)
    assert made.samples_differentiated == passes * made.steps_per_epoch * 32


def test_a_method_that_skips_steps_is_counted_as_it_ran() -> None:
    made = trainer("sam:every=5")
    made.train_epoch(0)
    assert made.samples_differentiated == (made.steps_per_epoch + 1) * 32


def test_predictions_are_those_of_evaluation_and_train_nothing() -> None:
    made = trainer("sgd")
    made.train_epoch(0)
    before = weights(made)
    logits = made.predict(made.split.inputs)
    assert torch.equal(before, weights(made))
    assert not made.model.training
    torch.testing.assert_close(logits, made.model(made.split.inputs).detach())


def test_score_counts_and_averages() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    scores = score(logits, torch.tensor([0, 1, 1, 1]))
    assert scores.accuracy == 0.75
    terms = [
        math.log1p(math.exp(-2)),
        math.log1p(math.exp(-1)),
        math.log1p(math.exp(3)),
        math.log1p(math.exp(-5)),
    ]
    assert scores.loss == pytest.approx(sum(terms) / 4, rel=1e-6)


def test_residual_networks_train_on_digits() -> None:
    made = trainer("sam:rho=0.05", model="resnet8", epochs=6, label_noise=0.0)
    losses = [made.train_epoch(epoch) for epoch in range(6)]
    assert losses[-1] < 0.6 * losses[0]


def test_adamw_is_a_base_too() -> None:
    made = trainer("adamw", optimizer="adamw")
    assert isinstance(made.base, torch.optim.AdamW)
    assert made.train_epoch(1) < trainer("adamw", optimizer="adamw", lr=0.0).train_epoch(1)
