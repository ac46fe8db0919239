"""``results.json``: the documented schema, numbers computed by hand, and the choice of the base."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from flatwise.lab.config import CompareConfig
from flatwise.lab.data import load_data
from flatwise.lab.methods import trained_methods
from flatwise.lab.results import assemble
from flatwise.lab.table import console_for, print_table
from flatwise.lab.verdict import verdict

SGD, SAM = [0.70, 0.72, 0.68], [0.95, 0.96, 0.94]
TIMING = {
    "rounds": 50,
    "methods": {
        "sgd": {"ratio": 1.0, "quartiles": [1.0, 1.0], "step_seconds": 0.001},
        "sam": {"ratio": 2.1, "quartiles": [2.0, 2.2], "step_seconds": 0.0021},
        "asam": {"ratio": 2.2, "quartiles": [2.1, 2.4], "step_seconds": 0.0022},
    },
}


def runs(
    test: list[float], *, validation: float = 0.8, train: float = 0.9, epochs: int = 40, peak: float = 0.0
) -> list[dict[str, Any]]:
    return [
        {
            "seed": seed, "epochs": epochs, "steps": 10 * epochs, "test_accuracy": value,
            "validation_accuracy": validation, "train_accuracy": train, "wrong_labels_fitted": 0.5,
            "gradient_evaluations_per_step": 2.0, "seconds": 4.0 + seed,
            "history": [{"validation_accuracy": value} for value in (0.5, validation + peak, validation)],
        }
        for seed, value in enumerate(test)
    ]  # fmt: skip


def results(table: dict[str, list[dict[str, Any]]], **settings: object) -> dict[str, Any]:
    config = CompareConfig(methods=",".join(name for name in table if "2x" not in name), seeds=3, **settings)
    assert [method.name for method in trained_methods(config)] == list(table)
    made = assemble(config, load_data("digits"), table, TIMING, {"python": "3"})
    return {**made, "verdict": verdict(made)}


def test_the_schema_that_is_promised() -> None:
    made = results({"sgd": runs(SGD), "sam": runs(SAM)})
    assert made["schema"] == "flatwise.compare/1"
    assert made["methods"]["sam"]["test_accuracy"]["per_seed"] == SAM
    assert made["methods"]["sam"]["relative_time"] == 2.1
    assert set(made["paired"]) == {"sam"}
    assert made["data"] == {
        "name": "digits", "classes": 10, "train": 1294, "validation": 144, "test": 359,
        "wrong_training_labels": 518,
    }  # fmt: skip


def test_the_numbers_are_scipys() -> None:
    made = results({"sgd": runs(SGD), "sam": runs(SAM)})
    interval = stats.ttest_rel(SAM, SGD).confidence_interval(0.95)
    difference = made["paired"]["sam"]["difference"]
    assert difference["mean"] == pytest.approx(0.25)
    assert difference["mean"] - difference["ci95"] == pytest.approx(interval.low)
    assert difference["mean"] + difference["ci95"] == pytest.approx(interval.high)
    single = stats.ttest_1samp(SAM, 0).confidence_interval(0.95)
    accuracy = made["methods"]["sam"]["test_accuracy"]
    assert accuracy["mean"] + accuracy["ci95"] == pytest.approx(single.high)
    assert made["methods"]["sam"]["wall_time"]["mean"] == 5.0


@pytest.mark.parametrize(
    ("once", "twice", "chosen"),
    [(0.70, 0.75, "sgd-2x-epochs"), (0.75, 0.70, "sgd"), (0.70, 0.70, "sgd")],
)
def test_the_better_base_is_chosen_by_validation_not_by_test(once: float, twice: float, chosen: str) -> None:
    # The test accuracies point the other way on purpose.
    first, second = [0.9 - once] * 3, [0.9 - twice] * 3
    made = results(
        {
            "sgd": runs(first, validation=once),
            "sam": runs(SAM),
            "sgd-2x-epochs": runs(second, validation=twice, epochs=80),
        },
        equal_compute=True,
    )
    assert made["equal_compute"]["chosen"] == chosen
    assert set(made["equal_compute"]["candidates"]) == {"sgd", "sgd-2x-epochs"}
    assert list(made["methods"]) == ["sgd", "sam"]
    longer = chosen != "sgd"
    assert made["methods"]["sgd"]["epochs"] == (80 if longer else 40)
    assert made["methods"]["sgd"]["relative_time"] == (2.0 if longer else 1.0)
    assert made["paired"]["sam"]["difference"]["per_seed"] == pytest.approx(
        [value - (second if longer else first)[0] for value in SAM]
    )
    assert f"the row shows {chosen}" in " ".join(made["verdict"])


def text_of(made: dict[str, Any]) -> str:
    return " ".join(made["verdict"])


def test_a_clear_gain_a_clear_loss_and_an_open_case_read_differently() -> None:
    assert "sam is better than sgd here, by 25.0 points" in text_of(results({"sgd": runs(SGD), "sam": runs(SAM)}))
    assert "sgd is worse than sam here, by 25.0 points" in text_of(results({"sam": runs(SAM), "sgd": runs(SGD)}))
    open_case = text_of(results({"sgd": runs(SGD), "sam": runs([0.71, 0.69, 0.73])}))
    assert "sam against sgd is undecided" in open_case
    assert "includes 0" in open_case
    assert "not evidence that they are equal" in open_case
    assert "the same test accuracy from each" in text_of(results({"sgd": runs(SGD), "sam": runs(SGD)}))


def test_one_seed_claims_nothing() -> None:
    config = CompareConfig(methods="sgd,sam", seeds=1)
    made = assemble(config, load_data("digits"), {"sgd": runs([0.7]), "sam": runs([0.9])}, TIMING, {})
    assert made["methods"]["sam"]["test_accuracy"]["ci95"] is None
    assert "says nothing about chance" in " ".join(verdict(made))


def test_several_comparisons_noise_cost_and_scope_are_said() -> None:
    text = text_of(results({"sgd": runs(SGD), "sam": runs(SAM), "asam": runs(SAM)}))
    assert "all 2 hold at once is less sure (at least 90 %)" in text
    assert "40 % of the training labels made wrong" in text
    assert "sam takes 2.10 times and asam takes 2.20 times the time of sgd" in text
    assert "--equal-compute also gives sgd twice the epochs" in text
    assert "nothing about clean labels" in text
    assert "all 2 hold" not in text_of(results({"sgd": runs(SGD), "sam": runs(SAM)}))
    assert "with the labels as they are" in text_of(results({"sgd": runs(SGD), "sam": runs(SAM)}, label_noise=0.0))


def test_a_method_that_stopping_early_would_help_is_named() -> None:
    made = results({"sgd": runs(SGD, peak=0.1), "sam": runs(SAM, peak=0.01)})
    assert made["methods"]["sgd"]["best_validation"] == {"epoch": 2, "mean": pytest.approx(0.9)}
    text = text_of(made)
    assert "stopping early would have helped sgd (90.0 % at epoch 2, 80.0 % at the end)." in text
    assert "stopping early" not in text_of(results({"sgd": runs(SGD, peak=0.01), "sam": runs(SAM)}))


def test_a_collapse_is_called_one() -> None:
    made = results({"sgd": runs(SGD), "sam": runs([0.1, 0.1, 0.1], train=0.11)})
    assert "sam hardly left chance" in text_of(made)
    assert "hardly left chance" not in text_of(results({"sgd": runs(SGD), "sam": runs(SAM)}))


def table_of(made: dict[str, Any], encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_table(made, console_for(stream))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def test_the_table_shows_what_the_file_holds() -> None:
    made = results({"sgd": runs(SGD), "sam": runs(SAM)})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_of(made).splitlines() if "|" in line]
    half = 100 * made["paired"]["sam"]["difference"]["ci95"]
    accuracy = made["methods"]["sam"]["test_accuracy"]
    assert rows[0][:3] == ["method", "test accuracy, %", "minus sgd, points"]
    assert rows[2][0] == "sgd"
    assert rows[2][2] == ""
    assert rows[3] == [
        "sam (rho 0.5)", f"95.0 ± {100 * accuracy['ci95']:.1f}", f"+25.0 ± {half:.1f}", "2.00",
        "5.0", "2.10 (2.00-2.20)",
    ]  # fmt: skip


def test_the_table_fits_an_old_encoding_and_a_file() -> None:
    made = results({"sgd": runs(SGD), "sam": runs(SAM)})
    assert "+-" in table_of(made, "ascii")
    assert "\x1b" not in table_of(made)


def test_a_terminal_gets_a_frame() -> None:
    made = results({"sgd": runs(SGD), "sam": runs(SAM)})
    stream = io.StringIO()
    print_table(made, Console(file=stream, force_terminal=True, width=120))
    assert "╭" in stream.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_nothing_is_cut_off_on_a_terminal(width: int) -> None:
    made = results({"sgd": runs(SGD), "sam": runs(SAM)})
    stream = io.StringIO()
    print_table(made, Console(file=stream, force_terminal=True, width=width, highlight=False, color_system=None))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    # A name may go on in the next line, at a space; nothing of it may be missing.
    words = {"sgd", "sam", "(rho", "0.5)", "accuracy,", "points", "2.10", "(2.00-2.20)"}
    assert words <= set(text.replace("│", " ").split())
