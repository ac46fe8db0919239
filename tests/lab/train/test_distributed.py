"""Two processes that train together: the single process's result for the same global batch, and what differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.train import processes
from tests.lab.train.test_resume import assert_alike, folder_of

from flatwise.errors import UserError
from flatwise.files import read_json
from flatwise.lab.train import TrainConfig, train
from flatwise.lab.train import network as networks

Tiny = Callable[..., TrainConfig]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
EVERYTHING: dict[str, Any] = {
    "freeze_norm": True, "augment": "basic", "ema": 0.8, "clip": 0.5, "label_smoothing": 0.1, "weight_decay": 0.01,
    "rho": 0.3, "keep_epochs": "1",
}  # fmt: skip


def launch(trainings: list[dict[str, Any]], environment: dict[str, str], word: str = "answer: ") -> list[str]:
    """Train one after the other, each in two processes; returns what the first one says of each, or its notices."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "tests.lab.train.processes", json.dumps(trainings)]  # fmt: skip
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), "."]))
    alone = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **alone, **environment}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.removeprefix(word) for line in done.stdout.splitlines() if line.startswith(word)]


def state(config: TrainConfig, name: str = "weights.pt") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder_of(config).path / name, weights_only=True)
    return found


def assert_close(one: TrainConfig, two: TrainConfig, tolerance: float = 2e-6) -> None:
    for name in ("weights.pt", "weights-epoch-1.pt"):
        first, second = state(one, name), state(two, name)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.allclose(first[key], second[key], atol=tolerance, rtol=1e-4), (name, key)
    here, there = read_json(folder_of(one).result), read_json(folder_of(two).result)
    shares = ("test_accuracy", "test_top5_accuracy", "validation_accuracy", "wrong_labels_fitted")
    for name in (*shares, "gradient_evaluations", "effective_m"):
        assert here[name] == there[name], name
    for name in ("test_loss", "validation_loss"):
        assert here[name] == pytest.approx(there[name], rel=1e-4)
    for first_record, second_record in zip(here["history"], there["history"], strict=True):
        assert first_record["train_loss"] == pytest.approx(second_record["train_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_global_perturbation_is_the_single_process(tiny: Tiny, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "build_model", processes.normed)
    cases = [
        {**EVERYTHING, "perturbation": "global"},
        {**EVERYTHING, "perturbation": "global", "method": "base"},
        {**EVERYTHING, "perturbation": "global", "decay_in_loss": True, "decay": "matrices", "optimizer": "adamw",
         "lr": 0.002, "accumulate": 2},
    ]  # fmt: skip
    pairs = [(tiny(f"one-{n}", **case), tiny(f"two-{n}", **case)) for n, case in enumerate(cases)]
    answers = launch([asdict(two) for _, two in pairs], SHARDED if kind == "fsdp2" else {})
    assert answers == ["2 16"] * 3
    for one, two in pairs:
        train(one)
        assert_close(one, two)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_stopped_and_continued_in_two_processes(tiny: Tiny, kind: str) -> None:
    """With batch statistics of each process's own."""
    case = {**EVERYTHING, "freeze_norm": False, "perturbation": "global", "method": "gsam:alpha=0.4"}
    whole, stopped = tiny("whole", **case), tiny("stopped", **case)
    launch([asdict(whole), {**asdict(stopped), "stop": 1}, asdict(stopped)], SHARDED if kind == "fsdp2" else {})
    first, second = state(whole), state(stopped)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_json(folder_of(stopped).result)["finished"]


def test_broken_off_within_an_epoch_in_two_processes(tiny: Tiny) -> None:
    """The epoch's loss too is that of both processes, before and after."""
    case = {**EVERYTHING, "checkpoint_minutes": 0.0}
    whole, broken = tiny("whole", **case), tiny("broken", **case)
    answers = launch([asdict(whole), {**asdict(broken), "broken": 2}, asdict(broken)], {})
    assert answers == ["2 8", "broken off", "2 8"]
    assert_alike(whole, broken)


def test_local_perturbation_is_m_sharpness_in_one_process(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of a process share a perturbation: m of a single process."""
    monkeypatch.setattr(networks, "build_model", processes.normed)
    one, two = tiny("one", **EVERYTHING, m=8), tiny("two", **EVERYTHING)
    half = tiny("half", **EVERYTHING, m=4)
    answers = launch([asdict(two), asdict(half)], {})
    assert answers == ["2 8", "2 4"]
    train(one)
    assert_close(one, two)
    assert not torch.allclose(state(one)["end.weight"], state(half)["end.weight"], atol=1e-4)
    quarter = tiny("quarter", **EVERYTHING, m=4, seed=0)
    train(quarter)
    assert_close(quarter, half)


def test_the_images_that_share_a_perturbation_are_said_at_the_start(tiny: Tiny) -> None:
    cases: list[dict[str, Any]] = [{}, {"m": 4}, {"perturbation": "global"}]
    said = launch([asdict(tiny(steps=1, **case)) for case in cases], {}, "notice: ")
    assert said == [f"2 processes; {m} of the 16 images of a step share a perturbation" for m in (8, 4, 16)]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="processes meet on the accelerator here")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_without_an_accelerator_processes_meet_on_the_cpu(tiny: Tiny, kind: str) -> None:
    """As torchrun and accelerate launch start them: nobody says that it is a CPU."""
    environment = {"ACCELERATE_USE_CPU": "false", **(SHARDED if kind == "fsdp2" else {})}
    assert launch([asdict(tiny(steps=1, perturbation="global"))], environment) == ["2 16"]


def test_processes_that_do_not_meet_are_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    class Alone:
        def __init__(self, **_: Any) -> None:
            self.num_processes, self.device = 1, torch.device("mps")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "Accelerator", Alone)
    with pytest.raises(UserError, match="2 processes were started, and Accelerate lets 1 of them train together on mp"):
        train(tiny())


def test_what_several_processes_refuse(tiny: Tiny) -> None:
    answers = launch(
        [
            asdict(tiny(batch_size=15)),
            asdict(tiny(m=4, perturbation="global")),
            asdict(tiny(method="gsam")),
            asdict(tiny(method="samm")),
            asdict(tiny(out=str(Path(__file__)))),
        ],
        {},
    )
    assert "cannot be divided among 2 processes" in answers[0]
    assert "leave --m out" in answers[1]
    assert "--perturbation global" in answers[2]
    assert "did you mean" in answers[3]
    assert "cannot write" in answers[4]
    answers = launch([asdict(tiny("cut"))], SHARDED)
    assert "add --perturbation global" in answers[0]
    answers = launch([asdict(tiny("cut"))], {**SHARDED, "FSDP_VERSION": "1"})
    assert "--fsdp_version 2" in answers[0]


def test_another_number_of_processes_does_not_continue(tiny: Tiny) -> None:
    config = tiny(perturbation="global")
    launch([{**asdict(config), "stop": 1}], {})
    notices: list[str] = []
    train(config, on_notice=notices.append)
    assert any("number of processes" in notice for notice in notices)
