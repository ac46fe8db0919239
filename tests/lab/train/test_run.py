"""A training as a whole: what it leaves, what it refuses, what stops it."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.data_files import write_tree
from tests.lab.train.test_resume import folder_of, numbers
from torch import Tensor

from flatwise.errors import TrainingError, UserError
from flatwise.files import read_json
from flatwise.lab.models import build_model
from flatwise.lab.train import TrainConfig, train
from flatwise.lab.train.distributed import World
from flatwise.lab.train.evaluate import Predictions
from flatwise.lab.train.finished import evaluate
from flatwise.lab.train.relabel import relabelled
from flatwise.lab.train.samples import load_samples
from flatwise.lab.train.trackers import usable_trackers
from flatwise.lab.train.watch import SKIPS, Watch
from flatwise.seeds import derive

Tiny = Callable[..., TrainConfig]


def test_what_a_training_leaves(tiny: Tiny) -> None:
    config = tiny(keep_epochs="0,2", label_noise=0.25)
    result = train(config)
    folder = folder_of(config)
    assert {path.name for path in folder.path.iterdir()} == {
        ".lock", "config.json", "environment.json", "epochs.jsonl", "result.json", "weights.pt", "weights-epoch-0.pt",
        "weights-epoch-2.pt",
    }  # fmt: skip
    assert read_json(folder.result) == result
    samples = load_samples(config)
    model = build_model("mlp", samples.shape, samples.classes, derive(0, "weights"))
    start = torch.load(folder.kept_weights(0), weights_only=True)
    assert all(torch.equal(start[name], value) for name, value in model.state_dict().items())
    end = torch.load(folder.weights, weights_only=True)
    kept = torch.load(folder.kept_weights(2), weights_only=True)
    assert all(torch.equal(end[name], kept[name]) for name in end)
    model.load_state_dict(end)
    model.eval()
    with torch.no_grad():
        logits, labels = model(samples.plain("test", torch.arange(359))), samples.labels_of("test")
        right = logits.argmax(1) == labels
        above = (logits > logits.gather(1, labels[:, None])).sum(1)
        guesses = model(samples.plain("training", torch.arange(65))).argmax(1)
    assert result["test_accuracy"] == int(right.sum()) / 359
    assert result["test_top5_accuracy"] == int((above < 5).sum()) / 359
    assert result["test_accuracy"] < result["test_top5_accuracy"] < 1
    assert result["train_accuracy"] == int((guesses == samples.labels).sum()) / 65
    wrong = samples.labels != samples.true_labels
    assert (result["wrong_labels"], result["noise"]["wrong"]) == (16, 16)
    assert int(wrong.sum()) == 16
    assert result["wrong_labels_fitted"] == pytest.approx(int((guesses == samples.labels)[wrong].sum()) / 16)
    assert (result["steps"], result["gradient_evaluations"], result["effective_m"]) == (8, 2 * 8 * 16, 16)
    assert result["method"] == {"name": "sam", "variant": "sam", "options": {"rho": 0.05}}
    assert [record["steps"] for record in result["history"]] == [4, 8]
    assert result["validation_accuracy"] == result["history"][-1]["validation_accuracy"]


def test_a_finished_training_is_read_and_fresh_trains_it_again(tiny: Tiny) -> None:
    config = tiny()
    first = train(config)
    calls: list[Any] = []
    assert train(config, calls.append, on_step=lambda *done: calls.append(done)) == first
    assert calls == []
    again = train(replace(config, fresh=True), calls.append)
    assert len(calls) == 2
    assert again["weights_digest"] == first["weights_digest"]


def test_a_second_process_is_refused(tiny: Tiny) -> None:
    config = tiny()
    folder = folder_of(config)
    folder.create()
    code = f"""
import sys
from pathlib import Path
from flatwise.lab.lock import locked
with locked(Path({str(folder.path)!r})):
    print("in", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(UserError, match=f"another process .pid {holder.pid}. is writing"):
            train(config)
        holder.kill()


def test_the_processes_that_read_images_end_with_the_epoch(tiny: Tiny, tmp_path: Path) -> None:
    write_tree(tmp_path / "images", {"train": {"a": 8, "b": 8}, "test": {"a": 1}})
    config = tiny(dataset=str(tmp_path / "images"), resolution=8, train_size=None, label_noise=0.0, batch_size=4)
    left: list[int] = []
    result = train(config, lambda record: left.append(len(multiprocessing.active_children())))
    assert (left, result["steps"]) == ([0, 0], 6)


def test_the_test_set_is_looked_at_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    scores = Predictions.scores

    class Looking(type(load_samples(tiny()))):  # type: ignore[misc]
        def labels_of(self, part: str) -> Tensor:
            looked.append(part)
            labels: Tensor = super().labels_of(part)
            return labels

    assert scores is not None
    import flatwise.lab.train.run as running

    load = running.load_samples
    monkeypatch.setattr(running, "load_samples", lambda *given: Looking(**vars(load(*given))))
    result = train(tiny(epochs=3, evaluate_every=2))
    assert looked == ["validation", "validation", "training", "test"]
    assert [record["validation_accuracy"] is None for record in result["history"]] == [True, False, False]


def test_without_a_held_out_part_the_history_has_no_accuracy(tiny: Tiny) -> None:
    result = train(tiny(val_fraction=0.0))
    assert result["validation_images"] == 0
    assert all(record["validation_accuracy"] is None for record in result["history"])
    assert result["validation_accuracy"] is None


def test_labels_from_a_finished_training(tiny: Tiny) -> None:
    teacher = tiny("teacher", epochs=6)
    given = train(teacher)
    config = tiny("student", labels_from=str(folder_of(teacher).path), augment="basic")
    result = train(config)
    samples = load_samples(teacher)
    model = build_model("mlp", samples.shape, samples.classes, 0)
    model.load_state_dict(torch.load(folder_of(teacher).weights, weights_only=True))
    model.eval()
    with torch.no_grad():
        labels = model(samples.plain("training", torch.arange(65))).argmax(1)
    noise = result["noise"]
    differing = int((labels != samples.labels).sum())
    assert differing > 0
    assert (noise["differing"], noise["differing_share"]) == (differing, differing / 65)
    assert noise["wrong"] == int((labels != samples.true_labels).sum()) == result["wrong_labels"]
    assert noise["weights_digest"] == given["weights_digest"]
    assert noise["given_digest"] == given["noise"]["digest"] != noise["digest"]


def test_labels_from_a_training_on_other_images_are_refused(tiny: Tiny) -> None:
    teacher = tiny("teacher", steps=1)
    train(teacher)
    config = tiny("student", dataset="mnist", labels_from=str(folder_of(teacher).path))
    with pytest.raises(UserError, match="was trained on digits, not on mnist"):
        relabelled(config, load_samples(teacher), World(config))


def test_evaluate_reads_the_weights(tiny: Tiny) -> None:
    config = tiny(ema=0.5)
    result = train(config)
    again = evaluate(str(folder_of(config).path))
    assert again.scores.accuracy == again.recorded == result["test_accuracy"]
    assert again.scores.loss == result["test_loss"]
    weights = folder_of(config).weights
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        evaluate(str(folder_of(config).path))
    with pytest.raises(UserError, match="is not the folder of a finished training"):
        evaluate(config.out)


@pytest.mark.parametrize("method", ["base", "sam", "sam:m=8"])
def test_a_loss_that_is_no_number_stops_the_training(tiny: Tiny, method: str) -> None:
    config = tiny(lr=1e8, method=method, epochs=20, schedule="constant", clip=0.0, label_noise=0.0)
    with pytest.raises(TrainingError, match=r"in step \d+, with learning rate 1e\+08 and rho [\d.]+: lower --lr"):
        train(config)
    assert read_json(folder_of(config).result) is None


def test_the_watch_names_the_first_bad_step() -> None:
    losses = torch.tensor([1.0, 2.0, float("nan"), float("inf")])
    with pytest.raises(TrainingError, match=r"the loss is nan in step 13, with learning rate 0\.3 and rho 0\.05"):
        Watch(scaled=False).look(losses, [0.1, 0.2, 0.3, 0.4], 10, 0.05, updated=True)
    with pytest.raises(TrainingError, match=r"the gradient is not finite in step 12, with learning rate 0\.2"):
        Watch(scaled=False).look(losses[:2], [0.1, 0.2], 10, 0.05, updated=False)
    Watch(scaled=False).look(losses[:2], [0.1, 0.2], 10, 0.05, updated=True)


def test_a_scaler_may_skip_steps_but_not_for_ever() -> None:
    watch, bad = Watch(scaled=True), torch.full((SKIPS - 1,), float("inf"))
    rates = [0.1] * SKIPS
    watch.look(bad, rates, 0, 0.05, updated=False)
    watch.look(torch.tensor([1.0]), rates, 40, 0.05, updated=True)
    watch.look(bad, rates, 50, 0.05, updated=False)
    with pytest.raises(TrainingError, match=r"step 81.*or use --precision bf16"):
        watch.look(bad[:1], rates, 80, 0.05, updated=False)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "sam,base"}, "--method names one method"),
    ({"method": "samm"}, "did you mean 'sam'"),
    ({"method": "base", "m": 4}, "--m divides the batch for a perturbation"),
    ({"method": "sam:m=4", "m": 4}, "m is given twice"),
    ({"m": 4, "accumulate": 2}, "leave --accumulate out"),
    ({"m": 17}, "--m 17 is more than the 16 images"),
    ({"accumulate": 17}, "--accumulate 17 is more than the 16 images"),
    ({"warmup": 2.0}, "leaves none of the 8 steps"),
    ({"train_size": 5000}, "more than the 1438 training images"),
    ({"val_fraction": 0.001}, "leaves 0 to validate"),
    ({"precision": "fp16"}, "needs a GPU"),
    ({"tracker": "wandbb"}, "did you mean 'wandb'"),
    ({"labels_from": "nowhere"}, "is not the folder of a finished training"),
    ({"method": "bsam", "clip": 1.0}, "does not know"),
    ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
    ({"optimizer": "adam"}, "did you mean 'adamw'"),
    ({"precision": "int8"}, "known: fp32, bf16, fp16"),
    ({"schedule": "step", "gamma": -0.1}, "--gamma must be a number of at least 0"),
    ({"schedule": "step", "milestones": "60,120,160"}, "shares of the training, between 0 and 1, not '60,120,160'"),
    ({"milestones": "0.5,half"}, "--milestones must be numbers"),
    ({"momentum": 1.0}, "--momentum must be from 0 up to, not including, 1"),
    ({"keep_epochs": "1.5"}, "--keep-epochs must be whole numbers"),
    ({"keep_epochs": "inf"}, "--keep-epochs must be whole numbers"),
    ({"loader_workers": -1}, "--loader-workers must be"),
]


@pytest.mark.parametrize(("settings", "text"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_meant_is_refused(tiny: Tiny, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        train(tiny(**settings))


def test_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    import flatwise.lab.train.trackers as trackers

    notices: list[str] = []
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert usable_trackers("tensorboard", notices.append) == []
    assert "pip install tensorboard" in notices[0]
    with pytest.raises(UserError, match="pip install mlflow"):
        usable_trackers("mlflow", notices.append)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    assert usable_trackers("tensorboard, wandb", notices.append) == ["tensorboard", "wandb"]
    assert usable_trackers("none", notices.append) == []
    assert len(notices) == 1


def test_curves_for_tensorboard(tiny: Tiny) -> None:
    pytest.importorskip("tensorboard", reason="needs flatwise[lab]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny(tracker="tensorboard")
    for fresh in (False, True):  # trained again, it is one curve, not two
        result = train(replace(config, fresh=fresh))
        curves = folder_of(config).curves
        found = EventAccumulator(str(curves))
        found.Reload()
        for name in ("train_loss", "lr", "validation_accuracy"):
            points = [(record["steps"], record[name]) for record in result["history"]]
            drawn = [(scalar.step, scalar.value) for scalar in found.Scalars(name)]
            assert drawn == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], name
        assert len(list(curves.glob("events*"))) == 1


def test_two_trainings_of_one_process_do_not_meet(tiny: Tiny) -> None:
    first = numbers(train(tiny("one")))
    train(tiny("two", precision="bf16", seed=5))
    assert numbers(train(tiny("three"))) == first


@pytest.mark.parametrize(("settings", "m"), [({}, 16), ({"m": 8}, 8), ({"method": "m-sam"}, 4), ({"m": 16}, 16)])
def test_the_images_of_a_perturbation_are_recorded(tiny: Tiny, settings: dict[str, Any], m: int) -> None:
    assert train(tiny(steps=1, **settings))["effective_m"] == m
