"""A whole comparison, in this process and in several."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flatwise.errors import TrainingError, UserError
from flatwise.lab import tasks
from flatwise.lab.compare import command, compare, protocol
from flatwise.lab.config import CompareConfig, flag
from flatwise.lab.data import load_data
from flatwise.lab.pool import Pool

Make = Callable[..., CompareConfig]


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatwise.lab.timing.BUDGET_SECONDS", 0.05)


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how and when a comparison ran: everything but the clock and the machine."""
    clock = {"wall_time", "relative_time", "relative_time_quartiles", "step_seconds"}
    methods = {
        name: {key: value for key, value in record.items() if key not in clock}
        for name, record in results["methods"].items()
    }
    return {"methods": methods, "paired": results["paired"], "data": results["data"]}


def curves(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.name: [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in path.read_text().splitlines()
        ]
        for path in sorted((folder / "epochs").iterdir())
    }


def test_the_folder_holds_what_is_promised(tiny: Make) -> None:
    results, folder, was_there = compare(tiny())
    assert not was_there
    assert {path.name for path in folder.path.iterdir()} == {
        ".lock", "config.json", "environment.json", "results.json", "timing.json", "curves.png",
        "epochs", "jobs", "weights", "report.html", "figures",
    }  # fmt: skip
    assert json.loads(folder.results.read_text()) == json.loads(json.dumps(results))
    assert folder.curves.read_bytes().startswith(b"\x89PNG")
    config = json.loads(folder.config.read_text())
    assert config["config"]["methods"] == "sgd,sam,asam"
    assert config["config"]["lr"] == 0.05
    assert [method["options"].get("rho") for method in config["methods"]] == [None, 0.05, 0.5]
    environment = json.loads(folder.environment.read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["threads_per_worker"] == 1
    assert len(curves(folder.path)) == 6
    assert [method["gradient_evaluations_per_step"] for method in results["methods"].values()] == [
        1.0,
        2.0,
        2.0,
    ]


def test_a_finished_folder_is_read_and_fresh_trains_again(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first, folder, _ = compare(tiny())
    trained: list[object] = []
    perform = tasks.perform
    monkeypatch.setattr("flatwise.lab.pool.perform", lambda *args: trained.append(args[2]) or perform(*args))
    again, _, was_there = compare(tiny())
    assert was_there
    assert not trained
    assert again == json.loads(folder.results.read_text())
    renewed, _, was_there = compare(tiny(fresh=True))
    assert not was_there
    assert len(trained) == 7
    assert numbers(renewed) == numbers(first)


def test_the_callers_threads_and_random_state_stay(tiny: Make) -> None:
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    try:
        compare(tiny(seeds=1))
        assert torch.get_num_threads() == 2
        assert torch.equal(state, torch.get_rng_state())
    finally:
        torch.set_num_threads(1)


def test_an_interrupt_is_continued(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _ = compare(tiny(fresh=True))
    perform, count = tasks.perform, 0

    def interrupted(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        perform(*args)

    monkeypatch.setattr("flatwise.lab.pool.perform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(tiny(fresh=True))
    resumed, _, was_there = compare(tiny())
    assert not was_there
    assert count == 4 + 3 + 1  # three finished runs were kept; three more and the timing were left
    assert numbers(resumed) == numbers(whole)


def test_equal_compute_reports_one_base_and_keeps_both(tiny: Make) -> None:
    results, folder, _ = compare(tiny(methods="sgd,sam", equal_compute=True))
    assert list(results["methods"]) == ["sgd", "sam"]
    candidates = results["equal_compute"]["candidates"]
    assert {name: record["epochs"] for name, record in candidates.items()} == {"sgd": 2, "sgd-2x-epochs": 4}
    assert results["methods"]["sgd"] == candidates[results["equal_compute"]["chosen"]]
    assert len(curves(folder.path)["sgd-2x-epochs-seed0.jsonl"]) == 4


def test_nothing_is_written_where_the_settings_are_wrong(tiny: Make, tmp_path: Path) -> None:
    for settings in ({"methods": "sgd,samm"}, {"train_size": 5000}):
        with pytest.raises(UserError):
            compare(tiny(**settings))
    assert not (tmp_path / "runs").exists()


def test_the_number_of_processes_changes_no_number(tiny: Make) -> None:
    alone, _, _ = compare(tiny(methods="sgd,sam"))
    together, _, _ = compare(tiny(methods="sgd,sam", workers=2, fresh=True))
    assert numbers(alone) == numbers(together)


def test_a_worker_that_dies_is_one_error(tiny: Make) -> None:
    config = tiny(methods="sgd,sam", epochs=500, workers=2).resolved()
    from flatwise.lab.folder import RunFolder

    folder = RunFolder(Path(config.out) / "dies")
    folder.create()

    def kill(event: dict[str, Any]) -> None:
        pool._children[0].kill()

    with (
        pytest.raises(TrainingError, match="ended on its own") as caught,
        Pool(config, folder, 2, kill) as pool,
    ):
        pool.run([0, 1])
    assert "out of memory?" in str(caught.value)
    assert not pool._children


def test_an_error_in_a_worker_is_one_error(tiny: Make) -> None:
    config = tiny(workers=2).resolved()
    from flatwise.lab.folder import RunFolder

    folder = RunFolder(Path(config.out) / "fails")
    folder.create()
    with (
        pytest.raises(TrainingError, match="IndexError"),
        Pool(config, folder, 2, lambda event: None) as pool,
    ):
        pool.run([999])
    assert "Traceback" in folder.worker_log(0).read_text()


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended, perhaps between two looks
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def begun(lines: Path) -> bool:
    """Tell whether an epoch is written; a file that is renamed between two looks is looked for again."""
    try:
        return any(path.stat().st_size for path in lines.iterdir())
    except FileNotFoundError:
        return False


def started(config: CompareConfig) -> subprocess.Popen[str]:
    """Start the command and come back when its first epoch is written."""
    words = [sys.executable, "-m", "flatwise", "compare", "--quiet"]
    for name in ("methods", "model", "epochs", "workers", "out", "train_size", "seeds", "batch_size"):
        words += [flag(name), str(asdict(config)[name])]
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background of a shell would hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    lines = Path(config.out) / config.folder_name() / "epochs"
    deadline = time.monotonic() + 240
    while not begun(lines):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def all_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(alive, processes)):
        assert time.monotonic() < deadline, "a worker outlived its comparison"
        time.sleep(0.02)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the children through /proc")


@needs_proc
def test_a_killed_comparison_leaves_no_process_and_continues_bit_for_bit(tiny: Make, tmp_path: Path) -> None:
    config = tiny(methods="sgd,sam", model="cnn-small", epochs=12, workers=2)
    whole, folder, _ = compare(replace(config, workers=1))
    expected = curves(folder.path)
    elsewhere = replace(config, out=str(tmp_path / "killed"))
    with started(elsewhere) as process:
        # A random moment, another one in each run of the suite: the promise holds at every moment.
        time.sleep(random.SystemRandom().uniform(0, 0.6))
        workers = children(process.pid)
        process.kill()
    all_gone(workers)
    resumed, folder, _ = compare(elsewhere)
    assert numbers(resumed) == numbers(whole)
    assert curves(folder.path) == expected


@needs_proc
def test_ctrl_c_ends_every_process_with_one_sentence(tiny: Make, tmp_path: Path) -> None:
    config = tiny(methods="sgd,sam", epochs=5000, workers=2, out=str(tmp_path / "interrupted"))
    with started(config) as process:
        workers = children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 130
    assert said == "\nInterrupted. The same command continues where this one stopped.\n"
    assert len(workers) == 2
    all_gone(workers)


def test_the_command_that_repeats_it(tiny: Make) -> None:
    written = command(CompareConfig(methods="sgd,sam:rho=0.5", epochs=3, equal_compute=True).resolved())
    assert written == "flatwise compare --methods sgd,sam:rho=0.5 --epochs 3 --lr 0.05 --equal-compute"


def test_the_protocol_says_what_is_noisy_and_what_is_clean(tiny: Make) -> None:
    config = tiny(seeds=1)
    results, _, _ = compare(config)
    said = protocol(config, results)
    assert "180 training images, 72 of them (40 %) with a label made wrong, a uniformly drawn other class" in said
    assert "validation and test labels are right" in said
    assert "all labels as they are" in protocol(replace(config, label_noise=0.0), results)


@pytest.mark.slow
def test_the_default_comparison_shows_the_gain(tmp_path: Path) -> None:
    methods = "sgd,sam:rho=0.1,sam:rho=0.5,asam"
    results, _, _ = compare(CompareConfig(methods=methods, out=str(tmp_path), seeds=3))
    gains = {name: pair["difference"] for name, pair in results["paired"].items()}
    assert gains["sam:rho=0.5"]["mean"] - gains["sam:rho=0.5"]["ci95"] > 0.10
    assert gains["sam:rho=0.1"]["mean"] < 0.05
    assert gains["asam"]["mean"] > 0.10


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet8", "resnet20"])
def test_residual_networks_on_fashion_mnist(tmp_path: Path, model: str) -> None:
    try:
        load_data("fashion-mnist")
    except UserError as error:
        pytest.skip(str(error))
    config = CompareConfig(
        methods="sgd,sam",
        dataset="fashion-mnist",
        model=model,
        train_size=600,
        epochs=6,
        batch_size=32,
        seeds=1,
        label_noise=0.0,
        augment="basic",
        out=str(tmp_path),
    )
    results, _, _ = compare(config)
    assert results["methods"]["sgd"]["test_accuracy"]["mean"] > 0.3


def test_a_failure_in_this_process_is_one_error_too(tiny: Make) -> None:
    # 31 of 32 samples leave a last part of one, which BatchNorm refuses.
    with pytest.raises(TrainingError, match="more than 1 value per channel"):
        compare(tiny(methods="sgd,sam:m=31", model="cnn-small", seeds=1, workers=1))


def test_a_resumed_run_records_the_workers_of_the_whole(tiny: Make) -> None:
    config = tiny(methods="sgd,sam", workers=2)
    whole, folder, _ = compare(config)
    folder.results.unlink()
    next(iter(sorted(folder.path.glob("jobs/*.json")))).unlink()
    again, _, _ = compare(config)
    assert again["environment"]["workers"] == whole["environment"]["workers"] == 2
