"""A run: resumed bit for bit, recorded by the epoch, and read against the test set once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flatwise
from flatwise.errors import UserError
from flatwise.lab.config import CompareConfig
from flatwise.lab.folder import RunFolder
from flatwise.lab.job import Job, all_jobs, finished, run_job
from flatwise.lab.loop import Trainer
from flatwise.lab.methods import parse_methods

Make = Callable[..., CompareConfig]


class StopError(Exception):
    """Stands for whatever ends a run in the middle."""


def folder_at(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create()
    return folder


def job_of(config: CompareConfig) -> Job:
    return Job(parse_methods(config)[0], 1)


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """Everything but the clock."""
    history = [{key: value for key, value in record.items() if key != "seconds"} for record in result["history"]]
    return {**{key: value for key, value in result.items() if key != "seconds"}, "history": history}


def stop_at(epoch: int) -> Callable[[int], None]:
    def stop(reached: int) -> None:
        if reached == epoch:
            raise StopError

    return stop


@pytest.mark.parametrize("method", ["sgd", "sam", "asam:m=8"])
@pytest.mark.parametrize("augment", ["none", "basic"])
def test_resuming_equals_never_having_stopped(tiny: Make, tmp_path: Path, method: str, augment: str) -> None:
    config = tiny(methods=method, epochs=5, model="cnn-small", augment=augment)
    whole = run_job(config, job_of(config), folder_at(tmp_path / "whole"))
    parts = folder_at(tmp_path / "parts")
    for epoch in (1, 3):
        with pytest.raises(StopError):
            run_job(config, job_of(config), parts, on_epoch=stop_at(epoch))
        torch.rand(3)  # the state of the process is another one each time
    resumed = run_job(config, job_of(config), parts)
    assert numbers(resumed) == numbers(whole)
    assert len(resumed["history"]) == 5


@pytest.mark.parametrize("method", flatwise.list_variants())
def test_every_method_resumes_and_records_a_loss(tiny: Make, tmp_path: Path, method: str) -> None:
    config = tiny(methods=method, epochs=3, model="cnn-small")
    whole = run_job(config, job_of(config), folder_at(tmp_path / "whole"))
    parts = folder_at(tmp_path / "parts")
    with pytest.raises(StopError):
        run_job(config, job_of(config), parts, on_epoch=stop_at(1))
    torch.rand(3)
    assert numbers(run_job(config, job_of(config), parts)) == numbers(whole)
    # Some methods know no loss at w themselves; what the lab records is what their step returns.
    assert all(0 < record["train_loss"] < 10 for record in whole["history"])


def test_a_run_begins_where_the_checkpoint_ends(tiny: Make, tmp_path: Path) -> None:
    config, folder = tiny(methods="sam", epochs=4), folder_at(tmp_path)
    with pytest.raises(StopError):
        run_job(config, job_of(config), folder, on_epoch=stop_at(3))
    epochs: list[int] = []
    run_job(config, job_of(config), folder, on_epoch=epochs.append)
    assert epochs == [3, 4]


@pytest.mark.parametrize("damage", ["truncated", "empty", "another version"])
def test_a_checkpoint_of_no_use_starts_the_run_again(tiny: Make, tmp_path: Path, damage: str) -> None:
    config, folder = tiny(methods="sam", epochs=3), folder_at(tmp_path / "damaged")
    with pytest.raises(StopError):
        run_job(config, job_of(config), folder, on_epoch=stop_at(2))
    path = folder.checkpoint("sam", 1)
    if damage == "another version":
        torch.save({**torch.load(path), "identity": "something else"}, path)
    else:
        path.write_bytes(path.read_bytes()[: 1000 if damage == "truncated" else 0])
    notices: list[str] = []
    epochs: list[int] = []
    again = run_job(config, job_of(config), folder, on_epoch=epochs.append, on_notice=notices.append)
    assert epochs == [0, 1, 2, 3]
    assert len(notices) == 1
    assert "starts again" in notices[0]
    assert numbers(again) == numbers(run_job(config, job_of(config), folder_at(tmp_path / "whole")))


def test_the_lines_follow_the_checkpoint(tiny: Make, tmp_path: Path) -> None:
    config, folder = tiny(methods="sam", epochs=4), folder_at(tmp_path)
    with pytest.raises(StopError):
        run_job(config, job_of(config), folder, on_epoch=stop_at(2))
    lines = folder.epochs("sam", 1)
    assert len(lines.read_text().splitlines()) == 2
    with lines.open("a") as file:
        file.write('{"epoch": 3, "train_lo')  # killed in the middle of a line
    result = run_job(config, job_of(config), folder)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert records == result["history"]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert set(records[0]) >= {
        "method",
        "seed",
        "epoch",
        "train_loss",
        "validation_loss",
        "validation_accuracy",
    }


def test_the_test_set_is_read_once_after_the_last_epoch(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    predict, train = Trainer.predict, Trainer.train_epoch

    def watched_predict(self: Trainer, inputs: torch.Tensor) -> torch.Tensor:
        named = {id(self.data.test_inputs): "test", id(self.split.validation_inputs): "validation"}
        seen.append(named.get(id(inputs), "training"))
        return predict(self, inputs)

    def watched_train(self: Trainer, epoch: int) -> float:
        seen.append("epoch")
        return train(self, epoch)

    monkeypatch.setattr(Trainer, "predict", watched_predict)
    monkeypatch.setattr(Trainer, "train_epoch", watched_train)
    config = tiny(methods="sam", epochs=3)
    run_job(config, job_of(config), folder_at(tmp_path))
    assert seen == ["epoch", "validation"] * 3 + ["training", "test"]
    run_job(config, job_of(config), folder_at(tmp_path))
    assert seen.count("test") == 1


def test_a_finished_run_leaves_a_result_and_no_checkpoint(tiny: Make, tmp_path: Path) -> None:
    config, folder = tiny(methods="sgd"), folder_at(tmp_path)
    assert finished(config, job_of(config), folder) is None
    result = run_job(config, job_of(config), folder)
    assert finished(config, job_of(config), folder) == result
    assert not folder.checkpoint("sgd", 1).exists()
    assert finished(tiny(methods="sgd", epochs=3), job_of(config), folder) is None


def test_the_share_of_fitted_wrong_labels(tiny: Make, tmp_path: Path) -> None:
    noisy, clean = tiny(methods="sgd", epochs=1), tiny(methods="sgd", epochs=1, label_noise=0.0)
    result = run_job(noisy, job_of(noisy), folder_at(tmp_path / "noisy"))
    assert result["wrong_labels"] == 72
    assert 0 <= result["wrong_labels_fitted"] < 1
    assert run_job(clean, job_of(clean), folder_at(tmp_path / "clean"))["wrong_labels_fitted"] is None


def test_a_folder_that_cannot_be_written_is_one_error(tiny: Make, tmp_path: Path) -> None:
    config, folder = tiny(methods="sgd"), folder_at(tmp_path)
    (tmp_path / "jobs").rmdir()
    (tmp_path / "jobs").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write") as caught:
        run_job(config, job_of(config), folder)
    assert "\n" not in str(caught.value)


def test_the_list_of_runs_has_every_method_with_every_seed(tiny: Make) -> None:
    jobs = all_jobs(tiny(methods="sgd,sam", seeds=3, equal_compute=True))
    assert len(jobs) == len({(job.method.name, job.seed) for job in jobs}) == 9
