"""float16's scaler, without float16: what Accelerate makes on a GPU, on a CPU, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.train.by_hand import by_hand
from tests.lab.train.test_resume import EVERYTHING, Stop, assert_alike, folder_of, numbers, stopping_at

from flatwise.errors import TrainingError
from flatwise.files import read_json
from flatwise.lab.train import TrainConfig, distributed, train

Tiny = Callable[..., TrainConfig]


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the next trainings have a scaler that begins with this scale."""
    make = distributed._accelerator

    def begin(scale: float, growth: int = 3) -> None:
        def accelerator(*given: Any) -> Any:
            made = make(*given)
            made.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth)
            return made

        monkeypatch.setattr(distributed, "_accelerator", accelerator)

    return begin


@pytest.mark.usefixtures("with_dropout")
@pytest.mark.parametrize("settings", [{}, {"m": 8}, {"accumulate": 2}, {"clip": 0.3}, {"method": "base"}], ids=str)
def test_a_scale_changes_nothing(tiny: Tiny, scaled: Callable[[float], None], settings: dict[str, Any]) -> None:
    plain = train(tiny("plain", **settings))
    scaled(1024.0)
    assert numbers(train(tiny("scaled", **settings))) == numbers(plain)


@pytest.mark.usefixtures("with_dropout")
def test_steps_that_overflow_are_skipped(tiny: Tiny, scaled: Callable[[float], None]) -> None:
    """Twice the largest scale that a first step survives: some are skipped, and the training goes on."""
    scaled(2.0**127)
    result = train(tiny("scaled", lr=0.01, label_noise=0.0))
    assert all(record["train_loss"] < 10 for record in result["history"])
    state, _ = by_hand(tiny(lr=0.01, label_noise=0.0), "sam")
    ended = torch.load(folder_of(tiny("scaled", lr=0.01, label_noise=0.0)).weights, weights_only=True)
    assert not all(torch.equal(ended[name], state[name]) for name in state)


@pytest.mark.usefixtures("with_dropout")
def test_the_scale_is_brought_back(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, scaled: Callable[[float], None]
) -> None:
    scaled(2.0**127)
    settings = {**EVERYTHING, "label_noise": 0.0}
    whole, config = tiny("whole", **settings), tiny("stopped", **settings)
    train(whole)
    with monkeypatch.context() as patched:
        stopping_at(patched, 5, before=True)
        with pytest.raises(Stop):
            train(config)
    train(config)
    assert_alike(whole, config)


def test_a_scaler_that_finds_no_scale_ends_the_training(tiny: Tiny, scaled: Callable[[float], None]) -> None:
    scaled(1.0)
    config = tiny(lr=1e30, schedule="constant", epochs=20, clip=0.0)
    with pytest.raises(TrainingError, match="or use --precision bf16"):
        train(config)
    assert read_json(Path(folder_of(config).result)) is None
