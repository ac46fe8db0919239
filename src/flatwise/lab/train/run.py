"""One training from its first step to its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flatwise.files import read_json, write_json
from flatwise.lab.config import CompareConfig
from flatwise.lab.data import load_data
from flatwise.lab.loop import Trainer, score
from flatwise.lab.methods import parse_methods
from flatwise.lab.train.config import TrainConfig
from flatwise.lab.weights import save_weights


def train(config: TrainConfig, on_epoch: Callable[[dict[str, Any]], object] = lambda record: None) -> dict[str, Any]:
    """Train, or read the result of the same training where it is finished.

    Args:
        config: the settings.
        on_epoch: called after each epoch with its record; where it returns True, the training stops there.

    Returns:
        The result, as it is in ``result.json`` of the run's folder.
    """
    folder = Path(config.out) / config.folder_name()
    found = read_json(folder / "result.json")
    if found is not None and not config.fresh:
        assert isinstance(found, dict)
        return found
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("rho", "dataset", "model", "batch_size", "lr", "weight_decay", "momentum", "label_noise")
    }
    compared = CompareConfig(
        methods=config.method, epochs=config.epochs, train_size=config.train_size,
        val_fraction=config.val_fraction or 0.1, **settings,
    )  # fmt: skip
    data = load_data(config.dataset, config.data_root)
    trainer = Trainer(compared, replace(parse_methods(compared)[0]), config.seed, data)
    history: list[dict[str, Any]] = []
    for epoch in range(trainer.epochs):
        loss = trainer.train_epoch(epoch)
        held = score(trainer.predict(trainer.split.validation_inputs), trainer.split.validation_labels)
        history.append({"epoch": epoch + 1, "train_loss": loss, "validation_accuracy": held.accuracy})
        if on_epoch(history[-1]) is True:
            break
    save_weights(folder / "weights.pt", trainer.model)
    test = score(trainer.predict(data.test_inputs), data.test_labels)
    result = {"config": asdict(config), "test_accuracy": test.accuracy, "history": history}
    write_json(folder / "result.json", result)
    return result
