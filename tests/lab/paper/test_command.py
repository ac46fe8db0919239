"""The command: what it takes, what it refuses, what it prints and leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.lab.paper.made_up import TINY

from flatwise.cli import main
from flatwise.errors import UserError
from flatwise.lab.paper import reproduce as module
from flatwise.lab.paper.reproduce import ReproduceConfig, settings_of, studies_of
from flatwise.lab.paper.small import STUDIES, TABLE4
from flatwise.lab.paper.study import Arm, Claim, Setting, Study

SGD = Arm("SGD", {"method": "base"}, ({"lr": 0.05},))
TEACHER = Arm("SAM", {"method": "sam"}, ({"rho": 0.05}, {"rho": 0.1}))
ROWS = Setting("20 %", TINY, (SGD, TEACHER)), Setting("40 %", TINY, (SGD,))
SMALL = Study("table4", "Label noise", "Table 4", ROWS,
              (Claim("SAM is better", "Table 4", "SAM", "SGD", settings=("20 %",)),), tuning_seeds=(100,))  # fmt: skip


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "name a study (table4"),
        (["tabel4"], "did you mean 'table4'"),
        (["table4", "--seeds", "0"], "must be at least 1"),
        (["table4", "--tune"], "--tune goes with --scale full"),
        (["table4", "--sed", "3"], "did you mean '--seeds'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *words]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_a_row_is_found_by_how_it_begins() -> None:
    assert settings_of(TABLE4, "40") == ["40 %"]
    assert settings_of(TABLE4, None) == ["20 %", "40 %", "60 %", "80 %"]
    with pytest.raises(UserError, match="unknown row of table4 '50'"):
        settings_of(TABLE4, "50")


def test_all_means_every_study_and_seeds_are_counted() -> None:
    assert [study.name for study in studies_of(ReproduceConfig("all", seeds=2))] == list(STUDIES)
    assert {study.seeds for study in studies_of(ReproduceConfig("all", seeds=2))} == {(0, 1)}


def test_a_study_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(STUDIES, "table4", SMALL)
    out = ["--out", str(tmp_path / "runs"), "--seeds", "2", "--workers", "1", "--records", str(tmp_path / "records")]
    assert main(["reproduce", "table4", "20", *out]) == 0
    shown = capsys.readouterr()
    assert "Label noise (Table 4)" in shown.out
    assert "SAM is better" in shown.out
    assert "missing" in shown.out  # the other row
    assert (tmp_path / "records" / "table4.json").exists()
    assert "6 of 6 trainings" in shown.err
    assert main(["reproduce", "table4", *out, "--quiet"]) == 0
    assert "missing" not in capsys.readouterr().out


def test_the_page_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "--page"]) == 2
    assert "checkout of flatwise" in capsys.readouterr().err
    (tmp_path / "docs").mkdir()
    assert main(["reproduce", "--page"]) == 0
    assert "Not run yet" in (tmp_path / "docs" / "reproduction.md").read_text()


def test_the_spectra_need_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "spectra"]) == 2
    assert "benchmarks/spectra.py" in capsys.readouterr().err


def test_the_spectra_are_those_of_the_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    calls: list[Any] = []

    class Ended:
        returncode = 0

    monkeypatch.setattr("subprocess.run", lambda words, **more: calls.append(words) or Ended())
    assert main(["reproduce", "spectra", "--workers", "1"]) == 0
    assert calls[0][1:] == ["benchmarks/spectra.py", "--workers", "1"]
    assert "largest eigenvalue is smaller" in capsys.readouterr().out
    assert module.SPECTRA.exists()
