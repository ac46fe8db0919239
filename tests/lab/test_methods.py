"""From the text of ``--methods`` to what is trained."""

from __future__ import annotations

import pytest
import torch

import flatwise
from flatwise.errors import UserError
from flatwise.lab.config import CompareConfig
from flatwise.lab.methods import parse_methods, trained_methods, wrap


def names(**settings: object) -> list[str]:
    return [method.name for method in parse_methods(CompareConfig(**settings))]


def test_the_base_has_the_optimizers_name() -> None:
    assert names(methods="base,sam") == ["sgd", "sam"]
    assert names(methods="adamw,sam", optimizer="adamw") == ["adamw", "sam"]


def test_options_make_columns_of_their_own() -> None:
    low, high = parse_methods(CompareConfig(methods="sam:rho=0.1,sam:rho=0.5:p=3"))
    assert (low.name, high.name) == ("sam:rho=0.1", "sam:rho=0.5:p=3")
    assert low.options == {"rho": 0.1}
    assert high.options == {"rho": 0.5, "p": 3}


def test_the_radius_is_the_methods_own_then_the_flag_then_the_default() -> None:
    def radius(text: str, **settings: object) -> float:
        return parse_methods(CompareConfig(methods=text, **settings))[0].options["rho"]

    assert radius("sam:rho=0.3", rho=0.2) == 0.3
    assert radius("sam", rho=0.2) == 0.2
    assert radius("sam") == 0.5
    assert radius("sam", dataset="fashion-mnist") == flatwise.variant_info("sam").rho


def test_a_radius_that_sets_itself() -> None:
    def radii(**settings: object) -> dict[str, object]:
        methods = parse_methods(CompareConfig(methods="frugal,frugal:rho=2.0,sam:rho=auto", **settings))  # type: ignore[arg-type]
        return {method.name: method.options["rho"] for method in methods}

    assert radii() == {"frugal": "auto", "frugal:rho=2.0": 2.0, "sam:rho=auto": "auto"}
    assert radii(rho=0.7) == {"frugal": 0.7, "frugal:rho=2.0": 2.0, "sam:rho=auto": "auto"}
    method = parse_methods(CompareConfig(methods="frugal"))[0]
    opt = wrap(method, torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9), total_steps=200)
    assert (opt._auto, opt._schedule.total_steps) == (flatwise.AutoRadius(), 200)


def test_options_may_follow_a_comma_too() -> None:
    base, gsam, asam = parse_methods(CompareConfig(methods="sgd,gsam:alpha=0.4, rho_min=0.02,asam"))
    assert gsam.name == "gsam:alpha=0.4:rho_min=0.02"
    assert gsam.options["alpha"] == 0.4
    assert gsam.options["rho_min"] == 0.02
    assert (base.name, asam.name) == ("sgd", "asam")


def test_m_is_the_micro_batch_size_and_brackets_hold_commas() -> None:
    method = parse_methods(CompareConfig(methods="sgd,sam:m=16:window=(0.5,1.0)"))[1]
    assert method.options["micro_batch_size"] == 16
    assert method.options["window"] == (0.5, 1.0)
    optimizer = wrap(method, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), total_steps=10)
    assert optimizer is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": "sgd,samm"}, "unknown method 'samm'; did you mean 'sam'"),
        ({"methods": "sam,sam"}, "listed twice"),
        ({"methods": "sam:rho"}, "'rho' is no option"),
        ({"methods": "sam:roh=0.1"}, r"(?s)sam:roh=0.1.*roh"),
        ({"methods": "sam:rho=-1"}, r"(?s)sam:rho=-1.*rho"),
        ({"methods": "sgd:lr=0.1"}, "its settings are flags"),
        ({"methods": "adamw,sam"}, "set --optimizer adamw"),
        ({"methods": "sam,asam", "equal_compute": True}, "add sgd to --methods"),
    ],
)
def test_mistakes_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_methods(CompareConfig(**settings))
    assert "\n" not in str(caught.value)


def test_equal_compute_trains_a_longer_base() -> None:
    methods = trained_methods(CompareConfig(equal_compute=True))
    assert [(method.name, method.longer) for method in methods][-1] == ("sgd-2x-epochs", 2)
    assert all(method.longer == 1 for method in methods[:-1])


def test_a_comma_too_many_is_no_method() -> None:
    assert names(methods="sgd,,sam,") == ["sgd", "sam"]
    assert CompareConfig(methods="sgd,,sam,").identity() == CompareConfig(methods="sgd,sam").identity()
    with pytest.raises(UserError, match="--methods names no method"):
        names(methods=" ,")


def test_infinity_is_a_number() -> None:
    (method,) = parse_methods(CompareConfig(methods="lp:p=inf"))
    assert method.options["p"] == float("inf")
