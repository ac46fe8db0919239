"""Tables and verdicts from made-up trainings with known answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tests.lab.paper.made_up import BASE, TINY, record, study

from flatwise.lab.paper.findings import find
from flatwise.lab.paper.layout import cells_of, choices_of, claims_of, quantities_of, ranks_of
from flatwise.lab.paper.ranks import kendall
from flatwise.lab.paper.record import Record
from flatwise.lab.paper.study import Arm, Claim, Setting
from flatwise.lab.paper.verdicts import Verdict

BETTER = {"SGD": [0.60, 0.61, 0.62], "SAM": [0.70, 0.71, 0.72], "Bootstrap + SAM": [0.71, 0.72, 0.73]}


def test_a_cell_has_the_papers_number_ours_and_a_verdict() -> None:
    found = find(record(study(), BETTER))
    sgd, sam, again = (row.cells[0] for row in found.rows)
    assert (sgd.printed, sam.printed, again.printed) == ("68.8", "93.4", "94.2")
    assert sam.ours.mean == pytest.approx(71.0)
    # t(0.975, 2) = 4.302653, s = 1 point, n = 3.
    assert sam.ours.ci95 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert sam.difference.mean == pytest.approx(10.0)
    assert sam.difference.ci95 == pytest.approx(0.0, abs=1e-9)  # paired: the seeds' ups and downs fall out
    assert sam.verdict is Verdict.CONFIRMED
    assert sgd.verdict is None


@pytest.mark.parametrize(
    ("sam", "word"),
    [([0.70, 0.71, 0.72], Verdict.CONFIRMED), ([0.50, 0.51, 0.52], Verdict.NOT_CONFIRMED),
     ([0.50, 0.61, 0.72], Verdict.NOT_DECIDED)],
)  # fmt: skip
def test_each_verdict_can_be_reached(sam: list[float], word: Verdict) -> None:
    found = find(record(study(), {**BETTER, "SAM": sam}))
    assert found.claims[0].verdict is word
    assert found.rows[1].cells[0].verdict is word


def test_errors_are_shown_where_the_paper_prints_errors() -> None:
    arms = (replace(BASE, printed="wrn28-10-basic/base"),
            Arm("SAM", {"method": "sam"}, ({"rho": 0.1},), printed="wrn28-10-basic/sam"))  # fmt: skip
    five = study(table="5", settings=(Setting("basic", TINY, arms, printed="fashion-mnist"),))
    found = find(record(five, {"SGD": [0.9, 0.9, 0.9], "SAM": [0.92, 0.92, 0.92]}))
    cell = found.rows[1].cells[0]
    assert found.quantity == "test error, %"
    assert (cell.printed, round(cell.ours.mean, 6), round(cell.difference.mean, 6)) == ("3.98±0.05", 8.0, -2.0)
    assert cell.verdict is Verdict.CONFIRMED
    worse = find(record(five, {"SGD": [0.9, 0.9, 0.9], "SAM": [0.88, 0.88, 0.88]})).rows[1].cells[0]
    assert worse.verdict is Verdict.NOT_CONFIRMED


def test_a_seed_that_is_missing_is_not_left_out_of_a_mean() -> None:
    made = record(study(), BETTER)
    lines = [line for line in made.lines if not (line["arm"] == "SAM" and line["seed"] == 2)]
    found = find(Record(made.study, lines, made.seeds))
    assert found.rows[1].cells[0].ours is None
    assert found.claims[0].verdict is Verdict.MISSING
    assert "missing" in cells_of(found).rows[1][1]
    assert "missing" in claims_of(found).rows[0][3]
    assert choices_of(found).rows[1][1] == "missing"


def test_one_seed_decides_nothing() -> None:
    assert find(record(study(seeds=(0,)), BETTER)).claims[0].verdict is Verdict.NOT_DECIDED


def test_a_measured_quantity_can_be_claimed_of() -> None:
    claim = Claim("sharper", "Table 11", "SAM", "SGD", of="sharpness")
    made = record(study(claims=(claim,), quantities=(("sharpness", "rise"),)), BETTER)
    for line in made.lines:
        line["measured"] = {"sharpness": 0.3 if line["arm"] == "SAM" else 0.1}
    found = find(made)
    assert found.claims[0].verdict is Verdict.CONFIRMED
    assert found.claims[0].parts[0][1].mean == pytest.approx(0.2)
    grid = quantities_of(found)
    assert grid is not None
    assert grid.headings == ("method", "rise")


def test_cost_is_counted_over_the_reported_trainings() -> None:
    row = find(record(study(), BETTER)).rows[1]
    assert (row.gradients, row.seconds) == (2.0, 1.0)


def test_kendall_against_its_definition() -> None:
    from scipy.stats import kendalltau

    first, second = [0.3, 0.1, 0.5, 0.5, 0.9, 0.2], [1.0, 2.0, 2.0, 4.0, 5.0, 0.5]
    assert kendall(first, second) == pytest.approx(kendalltau(first, second).statistic)
    assert kendall([1, 2, 3], [3, 2, 1]) == -1.0
    assert kendall([1, 1, 1], [3, 2, 1]) == 0.0


def test_ranks_say_whether_a_measure_follows_the_gap() -> None:
    arms = (BASE, *(Arm(f"a{n}", {"method": "sam"}, ({"rho": 0.1 * n},)) for n in (1, 2, 3)))
    made = record(
        study(settings=(Setting("a", TINY, arms),), claims=(), rank=("follows", "against")),
        {"SGD": [0.5], "a1": [0.6], "a2": [0.7], "a3": [0.8]},
    )
    for line in made.lines:
        gap = 1 - line["test_accuracy"]
        line["measured"] = {"gap": gap, "follows": 2 * gap, "against": -gap}
    found = find(made)
    assert dict(found.ranks)["follows"].mean == pytest.approx(1.0)
    assert dict(found.ranks)["against"].mean == pytest.approx(-1.0)
    assert found.claims[-1].verdict is Verdict.CONFIRMED
    assert ranks_of(found) is not None
