"""A training that was interrupted, wherever and however, ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from flatwise.files import read_json
from flatwise.lab.train import TrainConfig, train
from flatwise.lab.train.checkpoint import Checkpoints
from flatwise.lab.train.folder import TrainFolder
from flatwise.lab.train.loop import Trainer
from flatwise.lab.weights import save_weights

Tiny = Callable[..., TrainConfig]
EVERYTHING: dict[str, Any] = {
    "method": "gsam:alpha=0.4,rho_min=0.02", "ema": 0.8, "clip": 0.5, "augment": "basic", "mixup": 0.3,
    "keep_epochs": "0,1,2", "warmup": 0.5, "checkpoint_minutes": 0.0,
}  # fmt: skip


def folder_of(config: TrainConfig) -> TrainFolder:
    return TrainFolder(Path(config.out) / config.folder_name())


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """Everything but times and the place."""
    history = [{k: v for k, v in record.items() if k != "seconds"} for record in result["history"]]
    config = {k: v for k, v in result["config"].items() if k not in ("out", "checkpoint_minutes")}
    return {**{k: v for k, v in result.items() if k != "seconds"}, "history": history, "config": config}


def assert_alike(config: TrainConfig, other: TrainConfig) -> None:
    one, two = folder_of(config), folder_of(other)
    assert numbers(read_json(one.result)) == numbers(read_json(two.result))
    names = [path.name for path in sorted(one.path.iterdir()) if path.suffix == ".pt"]
    assert names == [path.name for path in sorted(two.path.iterdir()) if path.suffix == ".pt"]
    for name in names:
        first, second = (torch.load(where.path / name, weights_only=True) for where in (one, two))
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert len(two.epochs.read_text().splitlines()) == len(read_json(two.result)["history"])


class Stop(BaseException):
    """What ends a training from inside."""


def stopping_at(monkeypatch: pytest.MonkeyPatch, step: int, *, before: bool) -> None:
    run = Trainer.step

    def stepping(self: Trainer, number: int) -> Any:
        if before and number == step:
            raise Stop
        loss = run(self, number)
        if number == step:
            raise Stop
        return loss

    monkeypatch.setattr(Trainer, "step", stepping)


@pytest.mark.usefixtures("with_dropout")
@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("gsam:alpha=0.4,rho_min=0.02", range(8)),
        ("base", [3]),
        ("looksam:every=3", [4]),
        ("fsam", [5]),
        ("sam:m=8", [2]),
    ],
)
def test_interrupted_after_each_step(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, method: str, steps: list[int]
) -> None:
    settings = {**EVERYTHING, "method": method}
    whole = tiny("whole", **{**settings, "checkpoint_minutes": 60.0})
    train(whole)
    for step in steps:
        config = tiny(f"stopped-{step}", **settings)
        with monkeypatch.context() as patched:
            stopping_at(patched, step, before=bool(step % 2))
            with pytest.raises(Stop):
                train(config)
        begun: list[int] = []
        train(config, on_step=lambda done, total, begun=begun: begun.append(done))  # type: ignore[misc]
        assert begun[0] == step  # it did not begin anew
        assert_alike(whole, config)


@pytest.mark.usefixtures("with_dropout")
@pytest.mark.parametrize("place", [Checkpoints.save, save_weights])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_interrupted_while_writing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, place: Any, call: int) -> None:
    """The write itself is broken off half-way, after which nothing more is done."""
    whole, config = tiny("whole", **EVERYTHING), tiny("stopped", **EVERYTHING)
    train(whole)
    import flatwise.lab.train.checkpoint as checkpoints
    import flatwise.lab.weights as weights

    module = checkpoints if place is Checkpoints.save else weights
    write, calls = module.write_atomically, 0

    def broken(path: Path, content: Any, **options: Any) -> None:
        nonlocal calls
        if calls == call:
            path.with_name(f".{path.name}.0.part").write_bytes(b"half")  # what a kill leaves
            raise Stop
        calls += 1
        write(path, content, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_atomically", broken)
        with pytest.raises(Stop):
            train(config)
    train(config)
    assert_alike(whole, config)
    assert not list(folder_of(config).path.glob(".*.part"))


@pytest.mark.usefixtures("with_dropout")
def test_stopped_by_the_caller_and_continued(tiny: Tiny) -> None:
    whole, config = tiny("whole", epochs=3), tiny("stopped", epochs=3)
    train(whole)
    stopped = train(config, lambda record: record["epoch"] == 2)
    assert (stopped["finished"], stopped["epochs"], stopped["steps"]) == (False, 2, 8)
    seen: list[int] = []
    assert train(config, lambda record: seen.append(record["epoch"]))["finished"]
    assert seen == [3]
    assert_alike(whole, config)


def test_lines_follow_the_checkpoint(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    with monkeypatch.context() as patched:
        stopping_at(patched, 5, before=True)
        with pytest.raises(Stop):
            train(config)
    with folder_of(config).epochs.open("a") as lines:
        lines.write('{"epoch": 2, "train_lo')
    train(config)
    assert [line[:10] for line in folder_of(config).epochs.read_text().splitlines()] == ['{"epoch": ', '{"epoch": ']


KILLER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from tests.lab.train import conftest
from flatwise.lab.train import network, train
from flatwise.lab.train.config import train_config_from
network.build_model = conftest.dropping
config = train_config_from(json.loads(sys.argv[1]))
draws = random.Random(0)
for _ in range(20):
    reading, writing = os.pipe()
    child = os.fork()  # everything is imported: what is killed is the training
    if child == 0:
        train(config, on_step=lambda done, total: os.write(writing, b"."))
        os._exit(0)
    os.close(writing)
    for _ in range(draws.randrange(5)):  # so many steps after it has begun, and a little more
        os.read(reading, 1)
    time.sleep(draws.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reading)
    print(killed, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.usefixtures("with_dropout")
def test_killed_at_random_moments(tiny: Tiny) -> None:
    """SIGKILL, twenty times: in a step, between the passes, while a file is written, while the folder is opened."""
    settings = {**EVERYTHING, "epochs": 20, "keep_epochs": "0,3"}
    whole, config = tiny("whole", **settings), tiny("killed", **settings)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), "."]))}
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(asdict(config))], capture_output=True, text=True, env=environment
    )
    assert killed.stdout.split() == [str(-signal.SIGKILL)] * 20, killed.stderr
    assert not folder_of(config).result.exists()
    begun: list[int] = []
    train(config, on_step=lambda done, total: begun.append(done))
    assert begun[0] > 4
    train(whole)
    assert_alike(whole, config)
