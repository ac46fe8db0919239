"""The page on spectra shows what its records hold, and the command that made them runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from benchmarks.spectra import ITERATIONS, PROBES, SAMPLES, density_of, summary

ROOT = Path(__file__).parents[1]
RECORDS = json.loads((ROOT / "docs" / "results" / "spectra.json").read_text())


def test_the_page_shows_the_records():
    assert summary(RECORDS) in (ROOT / "docs" / "spectra.md").read_text()


def test_the_records_are_whole_and_converged():
    settings = RECORDS["settings"]
    assert (settings["samples"], settings["iterations"], settings["probes"]) == (SAMPLES, ITERATIONS, PROBES)
    assert {(run["method"], run["seed"]) for run in RECORDS["runs"]} == {
        (name, seed) for name in ("sgd", "sam:rho=0.1") for seed in range(5)
    }
    for run in RECORDS["runs"]:
        for look in run["looks"]:
            largest = max(map(abs, look["eigenvalues"]))
            assert all(residual <= 0.011 * largest for residual in look["residuals"])
            # the density's own end of the spectrum is the same eigenvalue
            assert max(map(max, look["nodes"])) == pytest.approx(look["eigenvalues"][0], rel=0.01)


def test_a_density_integrates_to_one():
    import torch

    look = RECORDS["runs"][0]["looks"][0]
    grid = torch.linspace(-5, 20, 4001, dtype=torch.float64)
    assert float(torch.trapezoid(density_of(look, grid, 0.1), grid)) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_the_command_runs_and_continues(tmp_path):
    out = tmp_path / "spectra.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "spectra.py"), "--quick", "--workers", "1", "--out", str(out)]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "4 of 4" in first
    records = json.loads(out.read_text())
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert " of " not in again
    assert json.loads(out.read_text()) == records
    assert out.with_suffix(".png").stat().st_size > 10_000
