"""The answer says what the numbers say, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.report.pages import entry, results, sharpness

from flatwise.report.content import Comparison
from flatwise.report.words import answers, difference, headline, is_flatter, question


def comparison(*names: str, **settings: bool) -> Comparison:
    return replace(entry(list(names)).comparison, results=results(list(names), **settings))


def test_better_worse_and_undecided() -> None:
    found = answers(comparison("sgd", "sam", "asam", "msam"))
    assert [(a.name, a.verdict) for a in found] == [("sam", "better"), ("asam", "worse"), ("msam", "undecided")]
    assert difference(found[0]) == "+25.0 points (95 % interval +23.0 to +27.0, 2 paired seeds)"
    assert headline(found) == "In part: sam did better; asam did worse; msam is not decided."
    assert headline(found[:1]) == "Yes: sam did better."
    assert headline(found[1:2]) == "No: asam did worse."
    assert headline(found[2:]) == "Not decided: chance alone may have made the difference."
    assert headline(found[1:]) == "Not shown to: asam did worse; msam is not decided."


def test_one_seed_decides_nothing() -> None:
    found = answers(comparison("sgd", "sam", one_seed=True))
    assert found[0].verdict == "undecided"
    assert headline(found) == "Not decided: one seed says nothing about chance."
    assert difference(found[0]) == "+25.0 points (one seed)"


def test_the_same_from_every_seed_is_not_undecided() -> None:
    base = comparison("sgd", "sam")
    gap = {"per_seed": [0.0, 0.0], "mean": 0.0, "ci95": 0.0}
    same = {**base.results, "paired": {"sam": {"reference": "sgd", "difference": gap}}}
    (found,) = answers(replace(base, results=same))
    assert found.verdict == "the same"
    assert headline([found]) == "No: sam did the same."


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["sgd"], "How did sgd do?"),
        (["sgd", "sam"], "Did sam help, against sgd?"),
        (["sgd", "sam", "asam"], "Did sam or asam help, against sgd?"),
        (["sgd", "a", "b", "c", "d"], "Which of 4 methods helped, against sgd?"),
    ],
)
def test_the_question(names: list[str], text: str) -> None:
    assert question([comparison(*names)]) == text


def measured(**tables: object) -> Comparison:
    measures = {name: {"sharpness": table} for name, table in tables.items()}
    return replace(comparison("sgd", "sam"), measures=measures)


def test_flatter_counts_measures_that_differ_by_more_than_their_errors() -> None:
    assert is_flatter(measured(sgd=sharpness(1), sam=sharpness(0.2))) == ["sam is flatter than sgd by all 3 measures."]
    assert is_flatter(measured(sgd=sharpness(1), sam=sharpness(2))) == ["sam is sharper than sgd by all 3 measures."]
    wide = is_flatter(measured(sgd=sharpness(1, error=0.1), sam=sharpness(0.2, error=0.1)))
    assert wide == [
        "sam is flatter than sgd by 2 of 3 measures; within the noise by 1 (average). "
        "Where measures disagree, none of them alone says what is flat."
    ]


def test_nothing_is_said_without_the_reference_or_without_numbers() -> None:
    assert is_flatter(measured(sam=sharpness(1))) == []
    lost = sharpness(1)
    for row in lost["rows"]:
        row["value"] = None
    assert is_flatter(measured(sgd=lost, sam=sharpness(1))) == []
