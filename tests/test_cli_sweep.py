"""``flatwise sweep`` on the command line: its flags, its table, and the command that it offers."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from flatwise.cli import main, parse
from flatwise.lab.recipes import load_recipe
from flatwise.lab.sweep import SweepConfig
from flatwise.lab.sweep.results import Row, command
from flatwise.lab.train import TrainConfig

SMALL = ["--dataset", "digits", "--model", "mlp", "--epochs", "1", "--train-size", "200", "--batch-size", "32"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "sam"], "unknown option '--method'; did you mean '--methods'?"),
        (["--rho", "1:0.1"], "--rho must have its smaller number first, not '1:0.1'"),
        (["--methods", "sma"], "unknown method 'sma'; did you mean 'sam'?"),
        (["--val-fraction", "0"], "--val-fraction must be above 0"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--pruner", "medium"], "--pruner: 'medium' is none of median, hyperband, none; did you mean 'median'?"),
        (["--storage", "me:secret@host"], "--storage is no URL of a known database"),
    ],
)
def test_a_mistake_is_one_clear_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["sweep", *SMALL, "--out", str(tmp_path), *words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.count("\n") == 1
    assert "secret" not in output.err


def test_every_setting_of_a_training_is_a_flag_and_fixed_for_all_trials() -> None:
    config = parse(["sweep", *SMALL, "--no-nesterov", "--rho", "0.1", "--seeds", "2", "--label-noise", "0.4"])
    assert isinstance(config, SweepConfig)
    assert config.training == TrainConfig(
        dataset="digits", model="mlp", epochs=1, train_size=200, batch_size=32, nesterov=False, label_noise=0.4,
        val_fraction=0.1, tracker="none",
    )  # fmt: skip
    assert (config.rho, config.seeds) == ("0.1", 2)
    assert parse(["sweep"]) == SweepConfig()


def test_a_recipe_is_fixed_but_for_its_radius_where_no_flag_says_otherwise() -> None:
    name = "cifar100-wrn28-10-cutout-sam"
    recipe = TrainConfig(**load_recipe(name))
    config = parse(["sweep", "--recipe", name, "--batch-size", "64"])
    assert config.training == replace(
        recipe, batch_size=64, val_fraction=0.1, tracker="none", method="sam", rho=None, lr=0.1, weight_decay=0.0005
    )
    space = config.space
    assert space.methods == (recipe.method,)
    assert (space.lr.choices, space.weight_decay.choices) == ((recipe.lr,), (recipe.weight_decay,))
    assert set(space.radii) == {recipe.method}
    wider = parse(["sweep", "--recipe", name, "--methods", "base,sam", "--lr", "0.01:1:log"]).space
    assert wider.methods == ("base", "sam")
    assert wider.lr.log


def test_a_sweep_is_not_started_by_torchrun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", *SMALL, "--out", str(tmp_path)]) == 2
    assert "start it without torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_lists_the_search_and_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--rho", "--pruner", "--storage", "--label-smoothing", "--no-nesterov"))
    assert "--fixed" not in text


def test_a_sweep_prints_its_best_trials_and_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["sweep", *SMALL, "--augment", "none", "--methods", "base,sam", "--seeds", "2", "--out", str(tmp_path)]
    assert main([*words, "--trials", "2"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "2 trials: 2 to the end, 0 stopped early, 0 failed." in output.out
    assert main([*words, "--trials", "3"]) == 0
    text = capsys.readouterr().out
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert all(" ± " in line for line in table[2:])
    offered = next(line for line in text.splitlines() if line.startswith("flatwise train"))
    assert "--seed 2" in offered
    assert "results.json" in text.splitlines()[-1]


def test_the_offered_command_is_the_trial_itself_on_another_seed() -> None:
    fixed = {"dataset": "a folder/with 'quotes'", "model": "mlp", "nesterov": False, "pretrained": True, "epochs": 3}
    config = SweepConfig(fixed=fixed, seeds=2, seed=5)
    row = Row(
        number=3, method="sam:p=inf", rho=0.1 + 0.2, lr=1 / 3, weight_decay=1e-5, accuracy=0.9, accuracies=[0.9, 0.9],
        ci95=0.0, pruned=False, failed=None, epoch=6, seconds=1.0, machine="here",
    )  # fmt: skip
    words = shlex.split(command(config, row))
    assert words[:2] == ["flatwise", "train"]
    assert parse(words[1:]) == TrainConfig(
        **fixed, val_fraction=0.1, method="sam:p=inf", rho=0.1 + 0.2, lr=1 / 3, weight_decay=1e-5, seed=7
    )
