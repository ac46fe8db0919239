"""float16's scaler, without float16: what Accelerate makes on a GPU, on a CPU, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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
    """Gradients of 10 and more, which the first scale takes beyond float32: the scaler finds a smaller one."""
    settings = {"lr": 0.001, "weight_decay": 100.0, "decay_in_loss": True, "momentum": 0.0, "nesterov": False}
    plain = train(tiny("plain", **settings))
    scaled(2.0**127)
    result = train(tiny("scaled", **settings))
    assert result["weights_digest"] != plain["weights_digest"]  # fewer steps
    assert result["history"][0]["train_loss"] > plain["history"][0]["train_loss"]
    assert result["history"][1]["train_loss"] < result["history"][0]["train_loss"]


@pytest.mark.usefixtures("with_dropout")
def test_the_scale_is_brought_back(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, scaled: Callable[[float], None]
) -> None:
    scaled(2.0**127)
    settings = {**EVERYTHING, "lr": 0.001, "weight_decay": 100.0, "decay_in_loss": True}
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
