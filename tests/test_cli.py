"""The command: clear mistakes, defaults in the help, and quiet where nobody looks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from flatwise.cli import field_helps, main
from flatwise.lab.config import CompareConfig, flag

SMALL = ["--model", "mlp", "--train-size", "200", "--epochs", "1", "--seeds", "2", "--workers", "1"]


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatwise.lab.timing.BUDGET_SECONDS", 0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compar"], "unknown command 'compar'; did you mean 'compare'?"),
        (["compare", "--methods", "sgd,samm"], "unknown method 'samm'; did you mean 'sam'?"),
        (["compare", "--epoch", "3"], "unknown option '--epoch'; did you mean '--epochs'?"),
        (["compare", "--lable-noise=0.4"], "unknown option '--lable-noise'; did you mean '--label-noise'?"),
        (["compare", "--model", "resnet9"], "did you mean 'resnet8'?"),
        (["compare", "--epochs", "many"], "--epochs: expected int, got many"),
        (["compare", "--lr", "fast"], "--lr: expected float, got fast"),
        (["compare", "--lr", "-1"], "--lr must be a number of at least 0, not -1.0"),
        (["compare", "--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["compare", "--label-noise", "1"], "--label-noise must be a share"),
        (["compare", "--val-fraction", "0"], "--val-fraction must be a share"),
        (["compare", "--epochs"], "expected one argument"),
        (["compare", "sgd"], "unrecognized arguments: sgd"),
    ],
)
def test_a_mistake_is_one_clear_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("flatwise: error: ")
    assert message in output.err
    assert output.err.count("\n") == 1


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["compare", *SMALL, "--out", str(tmp_path / "file")]) == 1
    output = capsys.readouterr()
    assert "cannot write" in output.err
    assert output.err.count("\n") == 1


def test_help_has_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    helps = field_helps(CompareConfig)
    for field in fields(CompareConfig):
        assert flag(field.name) in text
        assert helps[field.name] in text
        if field.default is not None and field.type != "bool":
            assert f"default: {field.default})" in text


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "flatwise compare" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert re.fullmatch(r"flatwise \d+\.\d+\S*\n", capsys.readouterr().out)


def test_off_a_terminal_there_is_plain_text_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    words = ["compare", *SMALL, "--out", str(tmp_path)]
    assert main(words) == 0
    first = capsys.readouterr()
    assert first.err == ""
    assert "\x1b" not in first.out
    assert "\r" not in first.out
    assert re.search(r"^\| sam \(rho 0\.05\) +\|", first.out, flags=re.MULTILINE)
    assert "drawn other class" in " ".join(first.out.split())
    assert main(words) == 0
    second = capsys.readouterr().out
    assert second.startswith("Already finished; read from ")
    assert second.endswith(first.out)
    assert main([*words, "--quiet"]) == 0
    quiet = capsys.readouterr().out
    assert "training images, 72" not in quiet
    assert re.search(r"^\| sgd ", quiet, flags=re.MULTILINE)


def test_ctrl_c_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: CompareConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flatwise.lab.compare.compare", interrupted)
    assert main(["compare"]) == 130
    assert "The same command continues" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_a_terminal_gets_bars_with_the_time_left(tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    words = [sys.executable, "-m", "flatwise", "compare", *SMALL, "--out", str(tmp_path)]
    # COLUMNS, because a pseudo-terminal has no width.
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(words, stdout=follower, stderr=follower, stdin=follower, env=environment)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # Linux reports the end of a pseudo-terminal so
        pass
    os.close(leader)
    assert process.wait() == 0
    text = shown.decode()
    assert "left" in text
    assert re.search(r"asam.*\d+%", text)
    assert "╭" in text


def test_importing_the_package_leaves_the_lab_alone() -> None:
    code = (
        "import sys, flatwise\n"
        "heavy = {'torchvision', 'matplotlib', 'scipy', 'sklearn', 'rich', 'jsonargparse', 'flatwise.lab'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["variants"], ["compare", "--help"]])
def test_an_output_that_cannot_be_written_is_one_line(words: list[str]) -> None:
    command = [sys.executable, "-m", "flatwise", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "flatwise: error: No space left on device\n"


def test_no_option_states_two_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    assert "default: null" not in " ".join(capsys.readouterr().out.split())
