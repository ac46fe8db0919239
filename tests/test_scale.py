"""docs/scale.md is what the formulas give, and the formulas are what was counted."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scale")


@pytest.fixture
def record(scale: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(scale.RECORD.read_text())
    return found


def test_the_page_holds_what_the_formulas_give(scale: Any, record: dict[str, Any]) -> None:
    page = scale.PAGE.read_text()
    assert scale.filled(page, record, scale.Device()) == page
    assert scale.filled(page, record, scale.Device(memory=10)) != page
    assert "≠" not in page
    assert 0 < scale.PICTURE.stat().st_size < 200_000


def test_the_record_is_what_the_formulas_give(scale: Any, record: dict[str, Any]) -> None:
    wanted = [
        (world, s.name, s.method.name, scale.expected(s)) for world in scale.WORLDS for s in scale.settings(world)
    ]
    rows = record["settings"]
    assert [(row["processes"], row["mode"], row["method"], row["formula"]) for row in rows] == wanted
    scale.check(rows)


@pytest.mark.parametrize("field", ["between steps", "during the last pass", "calls"])
def test_a_number_that_is_not_the_formulas_is_noticed(scale: Any, record: dict[str, Any], field: str) -> None:
    rows = copy.deepcopy(record["settings"][:3])
    rows[1]["counted"][field] = rows[1]["counted"][field] * 2
    with pytest.raises(AssertionError, match="1 of 3 settings"):
        scale.check(rows)


def test_formulas_of_a_case_by_hand(scale: Any) -> None:
    """A matrix of 3 rows and 2 columns over 2 devices is padded to 4 rows: 8 numbers, 32 bytes."""
    formula = importlib.import_module("scale_formula")
    model = formula.Model("tiny", ((3, 2),), ((4, 4),), 2, (), width=4)
    layout = formula.Layout("fsdp", replicas=3, shards=2)
    calls = formula.traffic(model, layout, formula.Method("sam"), formula.Precision())
    assert dict(calls) == {
        (("all-gather", "shard"), 32): 2,
        (("reduce-scatter", "shard"), 32): 2,
        (("all-reduce", "replica"), 16): 2,
        (("all-gather", "shard"), 64): 8,
        (("reduce-scatter", "shard"), 64): 4,
        (("all-reduce", "replica"), 32): 4,
        (("all-reduce", "shard"), 8): 1,
        (("all-reduce", "shard"), 4): 1,
    }
    sizes = formula.sent(calls, layout.axes)
    # Half of what is gathered and scattered, and all of a number; of a sum over three replicas four thirds.
    assert sizes["shard"] == (4 * 32 + 12 * 64) / 2 + 12
    assert sizes["replica"] == pytest.approx((2 * 16 + 4 * 32) * 4 / 3)
    held = formula.held(model, layout, formula.Method("sam"), formula.Precision())
    assert held["weights"] == held["copies"] == 4 * (2 * 2 + 2 * 2 * 4)
    assert held["gathered"] == 32 + 2 * 64
    assert formula.buckets([5, 6, 4, 20, 1], cap=10, first=4) == [5, 10, 20, 1]


def test_sizes_are_those_of_the_published_models(scale: Any) -> None:
    wanted = [1_100_048_384, 6_738_415_616, 13_015_864_320, 68_976_648_192]
    assert [model.parameters for model in scale.MODELS] == wanted


def test_the_ratios_that_the_page_rests_on(scale: Any) -> None:
    def ratio(mode: str, name: str) -> float:
        layout, precision = scale.modes(512)[mode]
        both = [sum(scale.per_step(scale.SEVEN, layout, which, precision)[0].values()) for which in (name, "plain")]
        return both[0] / both[1]

    for mode in ("DDP", "FSDP2", "FSDP2, no reshard", "HSDP, 8 shards", "FSDP2 × TP 8"):
        assert ratio(mode, "sam") == pytest.approx(2, abs=1e-6)
        assert ratio(mode, "every-k") == pytest.approx(1.2, abs=1e-6)
        assert ratio(mode, "msam") == pytest.approx(1, abs=1e-6)
    assert ratio("DDP, `sync_ascent=False`", "sam") == 1


def test_other_devices_are_printed_only(scale: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["scale.py", "--memory", "40"])
    with pytest.raises(SystemExit):
        scale.main()
    assert "add --print" in capsys.readouterr().err
    page = scale.PAGE.read_text()
    monkeypatch.setattr("sys.argv", ["scale.py", "--memory", "10", "--print"])
    scale.main()
    assert "7 B, 8 | 135 → 162 ✗ | 14.8 → 18.2 ✗" in capsys.readouterr().out
    assert scale.PAGE.read_text() == page


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_count_again_what_the_record_holds(scale: Any, record: dict[str, Any]) -> None:
    rows = scale.rows_of(2, scale.counted(2))
    scale.check(rows)
    assert rows == [row for row in record["settings"] if row["processes"] == 2]
