"""``flatwise measure``, ``landscape``, ``report``, ``doctor``: of a run, of a file of weights, of one's own problem."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from flatwise.cli import main
from flatwise.commands import SUMMARIES
from flatwise.lab.config import CompareConfig

OWN = """
import torch
from torch import nn

calls = 0

def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batches = [(torch.randn(16, 3), torch.randint(2, (16,))) for _ in range(4)]
    def loss_fn(model, batch):
        global calls
        calls += 1
        return nn.functional.cross_entropy(model(batch[0]), batch[1])
    return model, loss_fn, batches

def with_optimizer():
    import flatwise
    model, loss_fn, batches = problem()
    return model, loss_fn, batches, flatwise.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)

def wrong():
    return 3
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison; tests add to it and change nothing that is there."""
    from flatwise.lab.compare import compare

    patch = pytest.MonkeyPatch()
    patch.setattr("flatwise.lab.timing.BUDGET_SECONDS", 0.05)
    out = tmp_path_factory.mktemp("runs")
    config = CompareConfig(
        methods="sgd,sam:rho=0.1", model="mlp", train_size=100, epochs=1, seeds=2, workers=1, out=str(out)
    )
    _, folder, _ = compare(config)
    patch.undo()
    return folder.path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current folder."""
    (tmp_path / "my_problem.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("my_problem", None)
    return "my_problem"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    output = capsys.readouterr()
    assert output.err == ""
    return " ".join(output.out.split())


@pytest.mark.parametrize("command", list(SUMMARIES))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"flatwise {command}" in text
    assert "default: null" not in " ".join(text.split())
    assert main([]) == 0
    assert f"  {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["measur"], "did you mean 'measure'?"),
        (["measure", "x", "--sample", "3"], "unknown option '--sample'; did you mean '--samples'?"),
        (["measure", "nowhere"], "'nowhere' is no run folder, no file of weights and no module:function"),
        (["measure", "x", "--m", "a"], "--m takes whole numbers"),
        (["measure", "x", "--rho", "-1"], "--rho must be a number above 0, not -1"),
        (["measure", "x", "--rho", "0"], "--rho must be a number above 0, not 0"),
        (["measure", "x", "--probes", "-1"], "--probes must be 0 or more, not -1"),
        (["measure"], "required"),
        (["landscape", "x", "--style", "surfac"], "did you mean 'surface'?"),
        (["landscape", "x", "--point", "3"], "did you mean '--points'?"),
        (["landscape", "x", "--points", "many"], "--points: expected int, got many"),
        (["report", "nowhere"], "nowhere is no run folder (it has no results.json); flatwise compare makes one"),
        (["report"], "required"),
        (["doctor", "--method", "samm"], "did you mean 'sam'?"),
        (["doctor", "--method", "sam,asam"], "--method takes one method"),
        (["doctor", "no_such_module:problem"], "cannot import no_such_module:problem"),
        (["doctor", "--step", "3"], "did you mean '--steps'?"),
    ],
)
def test_a_mistake_is_one_clear_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("flatwise: error: ")
    assert message in output.err
    assert output.err.count("\n") == 1


def test_measure_a_run(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["measure", str(run), "--samples", "48", "--m", "8", "--probes", "0", "--quiet"]
    assert main(words) == 0
    text = said(capsys)
    assert "one step" in text
    assert "How much the loss rises by SAM's own step" in text
    assert text.endswith(f"On the page: flatwise report {run}")
    content = json.loads((run / "measures.json").read_text())
    assert content["schema"] == "flatwise.measures/1"
    assert set(content["methods"]) == {"sgd", "sam:rho=0.1"}
    entry = content["methods"]["sgd"]
    assert entry["sharpness"]["conditions"]["samples"] == 48
    rows = {row["name"]: row for row in entry["sharpness"]["rows"]}
    assert rows["one_step"]["settings"]["rho"] == 0.05
    assert rows["one_step_inf"]["settings"]["p"] == "inf"
    assert isinstance(content["cautions"], list)

    # Again: what is there is read. Other settings: it is measured anew, but only for the method that was asked for.
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("flatwise.lab.measuring.sharpness", refuse)
        assert main(words) == 0
        assert said(capsys) == text
        with pytest.raises(AssertionError, match="measured again"):
            main([*words, "--fresh"])
    assert main([*words, "--method", "sgd", "--rho", "0.1"]) == 0
    changed = json.loads((run / "measures.json").read_text())["methods"]
    assert changed["sgd"]["settings"]["rho"] == 0.1
    assert changed["sam:rho=0.1"] == content["methods"]["sam:rho=0.1"]


def test_measure_a_file_of_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "weights" / "sam_rho=0.1-seed1.pt"
    words = ["measure", str(file), "--samples", "32", "--m", "8", "--probes", "0", "--out", str(tmp_path)]
    assert main(words) == 0
    content = json.loads((tmp_path / "measures.json").read_text())["methods"]
    assert list(content) == ["sam:rho=0.1"]
    assert content["sam:rho=0.1"]["seed"] == 1
    torch.save({}, tmp_path / "other.pt")
    capsys.readouterr()
    assert main(["measure", str(tmp_path / "other.pt")]) == 2
    assert "other.pt is no file of weights in a run folder, such as" in capsys.readouterr().err


def test_the_time_is_said_first_and_what_is_interrupted_goes_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flatwise.lab import measuring

    words = ["measure", str(run), "--samples", "32", "--m", "8", "--probes", "1", "--out", str(tmp_path)]

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "hessian_density", stop)
        assert main(words) == 130
    assert capsys.readouterr().err.startswith("2 networks: about ")
    first = json.loads((tmp_path / "measures.json").read_text())["methods"]
    assert list(first) == ["sgd"]
    assert "density" not in first["sgd"]
    assert main(words) == 0
    output = capsys.readouterr()
    assert "sgd (1 of 2)" in output.err
    assert "sam:rho=0.1 (2 of 2)" in output.err
    whole = json.loads((tmp_path / "measures.json").read_text())["methods"]
    assert whole["sgd"]["sharpness"] == first["sgd"]["sharpness"]  # not measured again
    assert list(whole) == ["sgd", "sam:rho=0.1"]
    assert all(sorted(entry) == ["density", "seed", "settings", "sharpness"] for entry in whole.values())
    # Other probes: the table of sharpness stays, the spectrum is measured anew.
    assert main([*words, "--probes", "2", "--quiet"]) == 0
    again = json.loads((tmp_path / "measures.json").read_text())["methods"]
    assert again["sgd"]["sharpness"] == first["sgd"]["sharpness"]
    assert again["sgd"]["settings"]["probes"] == 2
    assert again["sgd"]["density"] != whole["sgd"]["density"]


def test_measures_that_are_damaged_are_as_if_they_were_not_there(run: Path, tmp_path: Path) -> None:
    from flatwise.files import write_json
    from flatwise.lab.folder import RunFolder
    from flatwise.lab.reporting import read_measures

    folder = RunFolder(tmp_path)
    for methods in (None, 4, {"sgd": 3}, {"sgd": {"seed": 0}}):
        write_json(folder.measures, {"schema": "flatwise.measures/1", "identity": "one", "methods": methods})
        assert read_measures(folder, "one") == ({}, [])


def test_a_landscape_of_a_run_and_its_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["landscape", str(run), "--samples", "32", "--points", "5", "--quiet"]
    assert main(words) == 0
    assert "loss on a plane of 5 x 5 points" in said(capsys)
    content = json.loads((run / "landscape.json").read_text())
    assert main(words) == 0  # again: nothing is measured
    again = json.loads((run / "landscape.json").read_text())
    assert again["values"] == content["values"]
    assert again["cost"]["gradient_evaluations"] == content["cost"]["gradient_evaluations"]
    said(capsys)
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert said(capsys) == f"Report: {tmp_path / 'page.html'}"
    page = (tmp_path / "page.html").read_text()
    assert page.count("<canvas") == 2
    assert "directions: random, filter-normalised" in page
    assert (tmp_path / "figures" / "landscape.svg").exists()
    assert (run / "landscape.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_of_another_landscape_or_a_damaged_one_says_how_to_go_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["landscape", str(run), "--samples", "32", "--quiet", "--method", "sgd", "--out", str(tmp_path)]
    assert main([*words, "--points", "3"]) == 0
    capsys.readouterr()
    assert main([*words, "--points", "5"]) == 2
    assert "holds another landscape" in (text := capsys.readouterr().err)
    assert "--fresh measures anew" in text
    whole = json.loads((tmp_path / "landscape.json").read_text())
    for damaged in ("{", json.dumps({"flatwise": "landscape", "version": whole["version"], "names": ["sgd"]})):
        (tmp_path / "landscape.json").write_text(damaged)
        assert main([*words, "--points", "3"]) == 2
        assert "--fresh measures anew" in capsys.readouterr().err
    assert main([*words, "--points", "3", "--fresh"]) == 0


def test_a_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["landscape", str(run), "--style", "line", "--directions", "sam", "--samples", "32", "--points", "5"]
    assert main([*words, "--method", "sgd", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "landscape.json").read_text())
    assert content["names"] == ["sgd"]
    assert len(content["axes"]) == 1


def test_a_report_of_two_runs_names_what_is_missing(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("results.json", "config.json"):
        (other / name).write_bytes((run / name).read_bytes())
    (other / "jobs").mkdir()
    for file in (run / "jobs").iterdir():
        (other / "jobs" / file.name).write_bytes(file.read_bytes())
    assert main(["report", str(other), str(run)]) == 0
    page = (other / "report.html").read_text()
    assert f"flatwise measure {other}" in page
    assert page.count("<article") == 2


def test_a_damaged_landscape_is_named_and_keeps_no_page_from_being_made(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "jobs").mkdir(parents=True)
    (other / "results.json").write_bytes((run / "results.json").read_bytes())
    (other / "landscape.json").write_text("{")
    for file in (run / "jobs").iterdir():
        (other / "jobs" / file.name).write_bytes(file.read_bytes())
    assert main(["report", str(other)]) == 0
    page = (other / "report.html").read_text()
    assert "it does not hold JSON" in page
    assert f"flatwise landscape {other} --fresh" in page


def test_a_run_without_weights_says_how_to_get_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    (old / "jobs").mkdir(parents=True)
    (old / "results.json").write_bytes((run / "results.json").read_bytes())
    for file in (run / "jobs").iterdir():
        (old / "jobs" / file.name).write_bytes(file.read_bytes())
    assert main(["measure", str(old)]) == 2
    assert "it was made before weights were kept" in capsys.readouterr().err


def test_a_run_that_is_not_finished_says_how_to_go_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    assert main(["report", str(tmp_path)]) == 2
    assert "is not finished; this continues it: flatwise compare" in capsys.readouterr().err


def test_a_seed_and_a_method_that_are_not_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", str(run), "--seed", "5"]) == 2
    assert "--seed must be from 0 to 1" in capsys.readouterr().err
    assert main(["landscape", str(run), "--method", "sgdd"]) == 2
    assert "did you mean 'sgd'?" in capsys.readouterr().err


def test_measures_of_another_comparison_are_not_kept(run: Path, tmp_path: Path) -> None:
    from flatwise.files import write_json
    from flatwise.lab.folder import RunFolder
    from flatwise.lab.reporting import read_measures

    folder = RunFolder(tmp_path)
    methods = {"sgd": {"seed": 0, "sharpness": {"rows": []}}}
    write_json(folder.measures, {"schema": "flatwise.measures/1", "identity": "one", "methods": methods})
    assert read_measures(folder, "one") == (methods, [])
    assert read_measures(folder, "another") == ({}, [])


def test_report_full_makes_what_is_missing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatwise.commands import report

    made: list[str] = []
    monkeypatch.setattr("flatwise.lab.measuring.measure_all", lambda subjects, *_, **__: made.append("measures"))
    monkeypatch.setattr("flatwise.lab.measuring.survey", lambda subjects, *_, **__: made.append("landscape"))
    held = (run / "landscape.json").read_bytes() if (run / "landscape.json").exists() else None
    (run / "landscape.json").unlink(missing_ok=True)
    try:
        report._complete(str(run), quiet=True)
        assert made == ["measures", "landscape"]
    finally:
        if held is not None:
            (run / "landscape.json").write_bytes(held)


def test_ones_own_problem(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", f"{own}:problem", "--m", "4", "--probes", "0", "--quiet"]) == 0
    assert "64 samples, 26 weights" in said(capsys)
    assert list(json.loads((tmp_path / "measures.json").read_text())["methods"]) == ["model"]
    assert main(["landscape", f"{own}:problem", "--points", "3", "--quiet"]) == 0
    assert json.loads((tmp_path / "landscape.json").read_text())["names"] == ["model"]
    capsys.readouterr()
    assert main(["doctor", f"{own}:with_optimizer", "--steps", "6", "--quiet"]) == 0
    assert "verdict" in said(capsys)
    wrong = (["measure", f"{own}:wrong"], ["doctor", f"{own}:problem"])
    for words in (*wrong, ["measure", f"{own}:nothing"], ["measure", f"{own}:calls"]):
        assert main(words) == 2
        assert "(model, loss_fn, data" in capsys.readouterr().err


def test_the_doctor_of_the_lab(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "mlp", "--method", "sam", "--rho", "0.05", "--steps", "6", "--quiet"]) == 0
    text = said(capsys)
    assert "verdict" in text
    assert "radius 0.05" in text
