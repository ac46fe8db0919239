"""The benchmark against the peers runs from end to end at a toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quick_benchmark_measures_every_contestant(tmp_path):
    for name in ("curvlinops", "pyhessian", "hessian_eigenthings", "torchvision"):
        pytest.importorskip(name)
    out = tmp_path / "record.json"
    command = [sys.executable, "benchmarks/curvature.py", "--quick", "--networks", "sgd", "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())["networks"]["sgd"]
    assert set(record["eigenvalues"]) >= {"flatwise", "curvlinops + eigsh", "pyhessian", "hessian-eigenthings"}
    assert set(record["density"]) == {"flatwise", "curvlinops", "pyhessian", "hessian-eigenthings"}
    ours = record["eigenvalues"]["flatwise"][-1]
    theirs = record["eigenvalues"]["plain double backward + eigsh"][-1]
    assert ours["residual"] <= 1e-3
    assert ours["values"] == pytest.approx(theirs["values"], rel=2e-3)
    assert ours["products"] <= theirs["products"]
