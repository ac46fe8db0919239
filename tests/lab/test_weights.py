"""The weights that a training ends with are kept, whole, and are those that were tested."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flatwise.errors import UserError
from flatwise.lab.config import CompareConfig
from flatwise.lab.data import load_data
from flatwise.lab.folder import RunFolder
from flatwise.lab.job import Job, run_job
from flatwise.lab.loop import Trainer
from flatwise.lab.methods import parse_methods
from flatwise.lab.weights import initial_model, save_weights, trained_model

Make = Callable[..., CompareConfig]


def trained(config: CompareConfig, path: Path) -> tuple[RunFolder, float]:
    folder = RunFolder(path)
    folder.create()
    result = run_job(config, Job(parse_methods(config)[1], 1), folder)
    return folder, result["test_accuracy"]


def test_the_weights_are_those_that_were_tested(tiny: Make, tmp_path: Path) -> None:
    config = tiny(model="cnn-small", methods="sgd,sam:rho=0.1").resolved()
    folder, accuracy = trained(config, tmp_path)
    model = trained_model(config, folder, "sam:rho=0.1", 1)
    assert not model.training
    data = load_data("digits")
    with torch.no_grad():
        right = (model(data.test_inputs).argmax(dim=1) == data.test_labels).double().mean()
    assert float(right) == accuracy
    state = torch.load(folder.weights("sam:rho=0.1", 1), weights_only=True)
    assert set(state) == set(model.state_dict())  # running statistics too


def test_the_first_weights_are_those_of_the_seed(tiny: Make) -> None:
    config = tiny().resolved()
    data = load_data("digits")
    for method in parse_methods(config):
        begun = Trainer(config, method, 1, data).model
        for a, b in zip(initial_model(config, 1).parameters(), begun.parameters(), strict=True):
            assert torch.equal(a, b)
    other = initial_model(config, 2)
    assert not torch.equal(next(other.parameters()), next(initial_model(config, 1).parameters()))


def test_a_file_holds_the_weights_alone(tmp_path: Path) -> None:
    storage = torch.zeros(100_000)
    model = torch.nn.Linear(2, 2)
    model.weight = torch.nn.Parameter(storage[:4].view(2, 2))
    save_weights(tmp_path / "w.pt", model)
    assert (tmp_path / "w.pt").stat().st_size < 10_000


def test_a_folder_from_before_says_how_to_get_them(tiny: Make, tmp_path: Path) -> None:
    config = tiny(methods="sgd,sam").resolved()
    folder, _ = trained(config, tmp_path / "runs" / "old")
    folder.weights("sam", 1).unlink()
    with pytest.raises(UserError, match=r"made before weights were kept.*flatwise compare .*--fresh"):
        trained_model(config, folder, "sam", 1)
    with pytest.raises(UserError, match=r"no finished training of sgd, seed 0.*flatwise compare "):
        trained_model(config, folder, "sgd", 0)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"not a file of torch"])
def test_damaged_weights_are_one_line(tiny: Make, tmp_path: Path, content: bytes) -> None:
    config = tiny(methods="sgd,sam").resolved()
    folder = RunFolder(tmp_path)
    folder.create()
    folder.weights("sam", 1).write_bytes(content)
    with pytest.raises(UserError, match="holds no weights of this network") as caught:
        trained_model(config, folder, "sam", 1)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_one_line(tiny: Make, tmp_path: Path) -> None:
    config = tiny(methods="sgd,sam").resolved()
    folder = RunFolder(tmp_path)
    folder.create()
    save_weights(folder.weights("sam", 1), torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="holds no weights of this network"):
        trained_model(config, folder, "sam", 1)


def test_the_weights_are_there_before_the_run_is_called_finished(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flatwise.lab.job.save_weights", stop)
    config = tiny(methods="sgd,sam").resolved()
    with pytest.raises(KeyboardInterrupt):
        trained(config, tmp_path)
    monkeypatch.undo()
    folder, _ = trained(config, tmp_path)  # from its checkpoint
    assert folder.weights("sam", 1).exists()
