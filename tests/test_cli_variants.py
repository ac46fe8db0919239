"""``flatwise variants``, and every method in ``flatwise compare``."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

import flatwise
from flatwise.cli import main
from flatwise.lab.variants import print_variants

pytest.importorskip("rich")

from rich.console import Console


def test_the_table_has_every_method_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in flatwise.list_variants():
        row = flatwise.variant_info(name)
        found = [line for line in lines if line.strip().startswith(f"| {name} ")]
        assert len(found) == 1, name
        assert row.source in found[0]
        assert row.evidence in found[0]
        assert row.passes in found[0]
    assert not any("\x1b" in line for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_off_on_a_terminal(width: int) -> None:
    file = io.StringIO()
    rows = [flatwise.variant_info(name) for name in flatwise.list_variants()]
    print_variants(rows, Console(file=file, force_terminal=True, width=width, highlight=False))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert max(map(len, plain.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in plain
    words = set(plain.split())
    for row in rows:
        low, high = row.rho_range
        assert {row.name, f"{row.rho:g}", f"({low:g}-{high:g})"} <= words


def test_one_method_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants", "looksam", "ae-sam"]) == 0
    out = capsys.readouterr().out
    assert "every=5" in out
    assert "Liu et al., CVPR 2022" in out
    assert "flatwise.create('ae-sam', base, total_steps=...)" in out


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants", "loksam"]) == 2
    assert "'loksam'" in capsys.readouterr().err
    assert main(["variants", "--all"]) == 2
    assert main(["variants", "--help"]) == 0


@pytest.mark.slow
def test_every_method_trains(tmp_path: Path) -> None:
    methods = ",".join(["sgd", *flatwise.list_variants()])
    arguments = ["compare", "--methods", methods, "--epochs", "1", "--seeds", "2", "--quiet", "--out", str(tmp_path)]
    assert main(arguments) == 0
    (file,) = tmp_path.glob("*/results.json")
    results = json.loads(file.read_text())["methods"]
    assert set(results) == {"sgd", *flatwise.list_variants()}
    passes = {name: record["gradient_evaluations_per_step"] for name, record in results.items()}
    for name, expected in {"msam": 1, "sam": 2, "multi-step": 3, "k-sam": 1, "esam-sds": 1.5, "quarter": 1.25}.items():
        assert passes[name] == pytest.approx(expected, abs=0.05), name


def test_a_method_that_cannot_serve_the_optimizer_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["compare", "--methods", "sgd,msam", "--momentum", "0", "--out", str(tmp_path)]) == 2
    assert "needs a base optimizer that has one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_ascii_stream_gets_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert main(["variants"]) == 0
    stream.flush()
    assert b"M?llenhoff" in stream.buffer.getvalue()  # type: ignore[attr-defined]
