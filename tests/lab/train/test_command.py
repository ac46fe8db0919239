"""The command line: every field a flag, a recipe below them, and what is printed."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from flatwise import cli
from flatwise.commands import train as command
from flatwise.commands.flags import parse_given
from flatwise.errors import UserError
from flatwise.lab.sets.disk import BrokenImageError
from flatwise.lab.train import TrainConfig

ARGUMENTS = [
    "--dataset", "digits", "--model", "mlp", "--train-size", "72", "--val-fraction", "0.1", "--batch-size", "16",
    "--epochs", "2", "--augment", "none", "--tracker", "none", "--label-noise", "0.2",
]  # fmt: skip


def given(*words: str) -> dict[str, object] | None:
    return parse_given(TrainConfig, words, "train", "d", {"recipe": "r"})


def test_only_what_is_given_is_told() -> None:
    assert given() == {}
    assert given("--lr", "0.1", "--no-nesterov", "--pretrained", "--rho", "null", "--recipe", "x") == {
        "lr": 0.1, "nesterov": False, "pretrained": True, "rho": None, "recipe": "x",
    }  # fmt: skip
    assert given("--lr=0.1") == {"lr": 0.1}  # the default's own value, and yet given
    with pytest.raises(UserError, match="did you mean '--no-nesterov'"):
        given("--no-nesterof")


def test_each_field_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert given("--help") is None
    text = capsys.readouterr().out
    for field in fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in text, field.name


def test_flags_override_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    import flatwise.lab.recipes as recipes

    recipe = {"lr": 0.3, "nesterov": True, "freeze_norm": True, "rho": 0.2, "epochs": 7, "model": "mlp"}
    monkeypatch.setattr(recipes, "load_recipe", lambda name: dict(recipe))
    assert command.parse(["--recipe", "mine"]) == TrainConfig(**recipe)  # type: ignore[arg-type]
    changed = command.parse(
        ["--recipe", "mine", "--no-nesterov", "--no-freeze-norm", "--rho", "null", "--lr", "0.1", "--epochs", "200"]
    )
    assert changed == TrainConfig(nesterov=False, lr=0.1, model="mlp")


def test_train_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*ARGUMENTS, "--out", str(tmp_path)]
    assert cli.main(["train", *arguments]) == 0
    printed = capsys.readouterr()
    assert "digits, mlp, sam, seed 0: test error" in printed.out
    assert "of 13 wrong labels fitted; m = 16; 2 gradients a step" in printed.out
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["epoch 1", "epoch 2"]
    folder = next(tmp_path.iterdir())
    assert str(folder) in printed.out
    assert cli.main(["train", *arguments, "--quiet"]) == 0
    again = capsys.readouterr()
    assert again.err == ""
    assert "Already finished" in again.out
    assert cli.main(["evaluate", str(folder)]) == 0
    assert "(as recorded)" in capsys.readouterr().out
    assert cli.main(["train", *arguments, "--method", "nothing"]) == 2
    assert "unknown method 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "said"), [(UserError("x is wrong"), False), (BrokenImageError("x is wrong"), True)])
def test_what_one_process_alone_finds_is_said_by_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: UserError, said: bool
) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("flatwise.lab.train.train", failing)
    assert cli.main(["train", *ARGUMENTS]) == 2
    assert ("x is wrong" in capsys.readouterr().err) is said
