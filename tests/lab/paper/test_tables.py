"""The printed numbers: sums over each table as typed from the paper, single cells, and what is printed wrongly."""

from __future__ import annotations

import pytest

from flatwise.errors import UserError
from flatwise.lab.paper.tables import errata, read_number, settings, table, table_names

# Table: rows, printed numbers, their sum, the sum of the spreads.
SUMS = {
    "1": (15, 60, 510.9, 7.9),
    "2": (9, 36, 472.29, 2.35),
    "3": (9, 54, 323.93, 1.89),
    "4": (13, 48, 3948.5, 0.0),
    "5": (4, 16, 41.96, 0.76),
    "8": (7, 28, 1022.3, 0.0),
    "9": (15, 60, 511.8, 0.0),
    "10": (8, 24, 141.88, 0.0),
    "11": (4, 16, 90.13, 0.77),
    "spectra": (2, 12, 151.8, 0.0),
    "m": (0, 0, 0.0, 0.0),
    "c4": (0, 0, 0.0, 0.0),
    "c5": (0, 0, 0.0, 0.0),
}


@pytest.mark.parametrize("name", SUMS)
def test_the_table_holds_every_printed_number(name: str) -> None:
    numbers = table(name).numbers.values()
    found = (len(table(name).rows), len(numbers), sum(n.value for n in numbers), sum(n.spread or 0.0 for n in numbers))
    assert found == pytest.approx(SUMS[name])
    assert table(name).claim.endswith(".")


def test_all_tables_are_counted() -> None:
    assert set(table_names()) == set(SUMS)


@pytest.mark.parametrize(
    ("name", "row", "column", "printed"),
    [
        ("1", "wrn28-10-basic", "cifar10/base", "3.5±0.1"),
        ("1", "pyramidnet-shakedrop-autoaugment", "cifar10/sam", "1.4±<0.1"),
        ("1", "pyramidnet-basic", "cifar100/base", "19.7±0.3"),
        ("2", "resnet152-200", "top5/base", "5.39±0.07"),
        ("2", "resnet101-400", "top1/sam", "19.0±<0.01"),
        ("3", "flowers", "l2/sam", "0.35±0.01"),
        ("3", "imagenet", "b7/base", "15.3"),
        ("3", "cars", "l2/previous", "3.8 (DAT)"),
        ("4", "bootstrap-sam", "80", "79.9"),
        ("5", "shakeshake-autoaugment", "svhn/sam", "1.07±0.02"),
        ("8", "0.05", "80", "21.0"),
        ("10", "aircraft", "b7/sam", "7.06"),
        ("11", "2", "cifar100/error", "16.59±0.08"),
        ("spectra", "sgd", "300/ratio", "11.4"),
    ],
)
def test_single_cells(name: str, row: str, column: str, printed: str) -> None:
    number = table(name).number(row, column)
    assert number is not None
    assert number.printed == printed
    assert number.usable == number.value
    assert not number.error


def test_a_number_is_taken_apart() -> None:
    number = read_number("2.1±<0.1")
    assert (number.value, number.spread, number.below, number.label) == (2.1, 0.1, True, "")
    number = read_number("5.3 (TBMSL-Net)")
    assert (number.value, number.spread, number.below, number.label) == (5.3, None, False, "TBMSL-Net")
    with pytest.raises(AssertionError, match="no number"):
        read_number("2.1 ± 0.1")


def test_what_is_printed_wrongly_stays_and_is_marked() -> None:
    wrong = {key: number for key, number in table("9").numbers.items() if number.error}
    pyramid = {"basic": (2.1, 2.7), "cutout": (1.6, 1.9), "autoaugment": (1.4, 1.6)}
    for word, (printed, correct) in pyramid.items():
        number = wrong.pop((f"pyramidnet-{word}", "cifar10/sam"))
        assert (number.value, number.correct, number.usable) == (printed, correct, correct)
        assert correct == table("1").number(f"pyramidnet-{word}", "cifar10/sam").value  # type: ignore[union-attr]
    assert len(wrong) == 6
    for (row, column), number in wrong.items():
        assert row.startswith("wrn28-10")
        assert column == "cifar100/sam"
        assert number.usable is None
        assert number.value == table("1").number(row, column).value  # type: ignore[union-attr]
    others = [n.error for name in table_names() if name != "9" for n in table(name).numbers.values()]
    assert not any(others)


def test_the_errors_of_section_10() -> None:
    assert [(entry.where.split(",")[0], entry.correct) for entry in errata()][:2] == [
        ("equations 6 and 9", "KL(Q‖P)"),
        ("appendix C.5", "rho / ||g||_2 * g"),
    ]
    assert len(errata()) == 8
    assert "error" in table("8").quantity


def test_the_one_cell_where_sam_loses() -> None:
    losses = []
    for name in ("1", "2", "3", "5", "9", "10"):
        for row in table(name).rows:
            for cell in table(name).cells:
                sam, base = (table(name).number(row, f"{cell}/{method}") for method in ("sam", "base"))
                assert sam is not None
                assert base is not None
                losses += [(name, row, cell)] * (sam.value > base.value)
    assert losses == [("5", "shakeshake-autoaugment", "svhn")]


def test_cells_that_the_paper_leaves_empty() -> None:
    assert table("4").number("lee-2019", "80") is None
    with pytest.raises(UserError, match="did you mean 'lee-2019'"):
        table("4").number("lee-2018", "80")
    with pytest.raises(UserError, match=r"unknown column of table 4 '90'"):
        table("4").number("lee-2019", "90")
    with pytest.raises(UserError, match="unknown table '6'"):
        table("6")


def test_the_printed_settings() -> None:
    six, seven = settings()["table-6"], settings()["table-7"]
    assert six["wrn28-10-1800"] == {"lr": 0.05, "weight_decay": 1e-3, "rho": {"cifar10": 0.05, "cifar100": 0.1}}
    assert six["pyramidnet"]["rho"] == {"cifar10": 0.05, "cifar100": 0.2}
    assert six["pyramidnet-shakedrop"]["lr"] == {"cifar10": 0.02, "cifar100": 0.05}
    assert seven["fashion-mnist"]["shakeshake"] == {"lr": 0.1, "weight_decay": 5e-4, "rho": 0.02}
    assert settings()["search"] == {"rho": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5], "held_out": 0.1}
