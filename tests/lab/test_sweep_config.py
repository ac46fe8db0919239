"""The settings of a sweep: what is refused, and what may not change within one study."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flatwise.errors import UserError
from flatwise.lab.sweep import SweepConfig
from flatwise.lab.sweep.config import differences

DIGITS = {"dataset": "digits", "model": "mlp", "epochs": 2}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"trials": 0}, "--trials must be at least 1"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"minutes": 0.0}, "--minutes must be a number above 0"),
        ({"study": "a/b"}, "--study must be a plain name"),
        ({"study": ".."}, "--study must be a plain name"),
        ({"fresh": True, "storage": "sqlite://"}, "--fresh would delete"),
        ({"fixed": {"val_fraction": 0.0}}, "--val-fraction must be above 0"),
        ({"fixed": {"rho": 0.1}}, "rho is set by the sweep"),
        ({"fixed": {"epochs": 0}}, "--epochs must be at least 1"),
        ({"lr": "1:0.1"}, "--lr must have its smaller number first"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        SweepConfig(**settings)


def test_the_study_is_named_after_data_and_model() -> None:
    assert SweepConfig(fixed=DIGITS).name == "digits-mlp"
    assert SweepConfig(fixed={**DIGITS, "dataset": "some/where/cats/"}).name == "cats-mlp"
    assert SweepConfig(fixed=DIGITS, study="mine").name == "mine"


def test_a_tenth_is_held_out_unless_something_else_is_said() -> None:
    assert SweepConfig(fixed=DIGITS).training.val_fraction == 0.1
    assert SweepConfig(fixed={**DIGITS, "val_fraction": 0.3}).training.val_fraction == 0.3


def test_what_only_changes_where_and_how_long_is_no_difference() -> None:
    here = SweepConfig(fixed=DIGITS)
    there = replace(here, trials=9, minutes=1.0, workers=2, out="x", quiet=True, fixed={**DIGITS, "data_root": "y"})
    assert differences(there.settings(), here.settings()) == []


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"fixed": {**DIGITS, "epochs": 3}}, "--epochs is 2 there, 3 here"),
        ({"fixed": {**DIGITS, "label_noise": 0.4}}, "--label-noise is 0.0 there, 0.4 here"),
        ({"methods": "sam"}, "--methods is sam,asam there, sam here"),
        ({"lr": "0.1"}, "--lr is 0.01:0.3:log there, 0.1 here"),
        ({"seeds": 2}, "--seeds is 1 there, 2 here"),
        ({"pruner": "none"}, "--pruner is median there, none here"),
    ],
)
def test_a_difference_is_said_with_both_values(change: dict[str, Any], phrase: str) -> None:
    here = SweepConfig(fixed=DIGITS)
    assert phrase in differences(here.settings(), replace(here, **change).settings())


def test_a_setting_that_a_later_version_added_had_its_default() -> None:
    here = SweepConfig(fixed=DIGITS)
    there = here.settings()
    del there["cutmix"], there["val_fraction"]
    assert differences(there, here.settings()) == []
    assert differences(there, replace(here, fixed={**DIGITS, "val_fraction": 0.2}).settings())


def test_the_address_of_the_database_is_not_in_the_words_for_the_settings() -> None:
    config = SweepConfig(fixed=DIGITS, storage="postgresql://me:secret@host/db")
    assert "secret" not in repr(config)
    assert "secret" not in str(config.settings())
