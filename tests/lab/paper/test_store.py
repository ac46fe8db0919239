"""Records on disk, the pictures, and the page that is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.lab.paper.made_up import record, result, study

from flatwise.errors import UserError
from flatwise.lab.environment import describe
from flatwise.lab.paper.figures import PICTURES, draw
from flatwise.lab.paper.findings import find
from flatwise.lab.paper.page import page_of
from flatwise.lab.paper.protocol import plan
from flatwise.lab.paper.record import Record, line_of
from flatwise.lab.paper.small import STUDIES
from flatwise.lab.paper.store import Stored, read_record, write_record
from flatwise.lab.paper.study import Study

ROOT = Path(__file__).parents[3]
BETTER = {"SGD": [0.60, 0.61, 0.62], "SAM": [0.70, 0.71, 0.72], "Bootstrap + SAM": [0.71, 0.72, 0.73]}
RECORDS = sorted((ROOT / "docs" / "results" / "reproduction").glob("*.json"))
LARGEST = 300_000


def made_of(of: Study) -> Record:
    """Make a record of a real study, with plausible numbers for all that it measures."""
    lines = []
    for run in plan(of, lambda config: result(0.5), Path("out")):
        seed = run.config.seed
        value = 0.7 + 0.01 * (seed % 3) + 0.001 * len(run.arm)
        keys = [*(key for key, _ in of.quantities), *of.rank, *(f"cosine_{n}" for n in (1, 2, 4, 6, 8, 10, 12, 15))]
        measured = {key: 0.1 * len(run.arm) + 0.01 * (seed % 5) for key in (*keys, "gap")}
        lines.append(line_of(run, result(0.5 + 0.001 * seed, value), measured if of.measure else None))
    return Record(of, lines, of.seeds)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = record(study(), BETTER)
    path = tmp_path / "r.json"
    write_record(path, Stored(made, {"wall_seconds": 3.0}))
    stored = read_record(path, study())
    assert stored is not None
    assert list(stored.record.lines) == list(made.lines)
    assert stored.record.seeds == made.seeds
    assert stored.about["wall_seconds"] == 3.0
    assert json.loads(path.read_text())["study"] == "made-up"


def test_no_record_and_a_foreign_one(tmp_path: Path) -> None:
    assert read_record(tmp_path / "r.json", study()) is None
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(UserError, match="is no record of the study made-up; flatwise reproduce made-up"):
        read_record(tmp_path / "r.json", study())


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_gives_tables_and_its_picture(name: str, tmp_path: Path) -> None:
    made = made_of(STUDIES[name])
    found = find(made)
    assert all(cell is None or cell.ours is not None for row in found.rows for cell in row.cells)
    assert all(part[1] is not None for claim in found.claims for part in claim.parts)
    assert draw(made, tmp_path / "p.png") == (name in PICTURES)
    assert not draw(Record(made.study, [], made.seeds), tmp_path / "q.png")
    assert not (tmp_path / "q.png").exists()


def test_the_page_holds_every_study_and_says_what_is_missing(tmp_path: Path) -> None:
    for name in ("table4", "m"):
        write_record(tmp_path / f"{name}.json", Stored(made_of(STUDIES[name]), {"environment": describe(2)}))
    page = page_of(tmp_path, tmp_path / "none.json")
    assert all(f"## {of.title}" in page for of in STUDIES.values())
    assert page.count("Not run yet") == len(STUDIES) - 2
    assert "| SAM | 95.1 / 71" in page
    assert "with SAM the Hessian" in page_of(tmp_path, ROOT / "docs" / "results" / "spectra.json")


def test_the_page_in_the_docs_is_what_its_records_give() -> None:
    records = ROOT / "docs" / "results" / "reproduction"
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert page == page_of(records, ROOT / "docs" / "results" / "spectra.json")


def test_the_records_in_the_docs_are_whole_and_small() -> None:
    for path in RECORDS:
        stored = read_record(path, STUDIES[path.stem])
        assert stored is not None
        assert path.stat().st_size < LARGEST
        of = stored.record.study
        expected = {(s.name, a.name, seed) for s in of.settings for a in s.arms for seed in of.seeds}
        got = {(x["setting"], x["arm"], x["seed"]) for x in stored.record.lines if x["stage"] == "final"}
        assert got == expected


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_each_choice_in_the_docs_is_that_of_the_held_out_tenth(path: Path) -> None:
    of = STUDIES[path.stem]
    stored = read_record(path, of)
    assert stored is not None
    for setting in of.settings:
        for arm in setting.arms:
            means: dict[str, list[float]] = {}
            for line in stored.record.select(setting.name, arm.name, "tuning"):
                means.setdefault(json.dumps(line["choice"], sort_keys=True), []).append(line["held_out_accuracy"])
            if not means:
                continue
            final = stored.record.select(setting.name, arm.name, "final")[0]["choice"]
            assert sum(means[json.dumps(final, sort_keys=True)]) == pytest.approx(max(map(sum, means.values())))
