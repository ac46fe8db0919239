"""What is searched: ranges are read, scaled for each method, and refused in one line where they cannot be meant."""

from __future__ import annotations

import optuna
import pytest

import flatwise
from flatwise.errors import UserError
from flatwise.lab.sweep.space import Domain, read_domain, read_space

RANGES = {"lr": "0.01:0.3:log", "weight_decay": "0.0005"}


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("0.01:1:log", Domain(0.01, 1.0, log=True)),
        ("0.1:0.5", Domain(0.1, 0.5)),
        ("0:0.5", Domain(0.0, 0.5)),
        ("0.05", Domain(choices=(0.05,))),
        ("0.01,0.05, 0.1", Domain(choices=(0.01, 0.05, 0.1))),
        ("1e-4:1e-2:log", Domain(1e-4, 1e-2, log=True)),
    ],
)
def test_a_range_is_read_and_written_back(text: str, domain: Domain) -> None:
    assert read_domain("lr", text) == domain
    assert read_domain("lr", str(domain)) == domain


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "numbers"),
        ("fast", "numbers"),
        ("0.1:", "numbers"),
        ("0.1:0.2:linear", "low:high"),
        ("0.1:0.2:log:log", "low:high"),
        ("1:0.1", "smaller number first"),
        ("0.1:0.1", "smaller number first"),
        ("0:1:log", "above 0"),
        ("-1:1", "at least 0"),
        ("0.1:inf", "at least 0"),
        ("nan", "at least 0"),
        ("0.1,0.1", "different"),
    ],
)
def test_a_range_that_cannot_be_meant_is_one_clear_line(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as raised:
        read_domain("weight_decay", text)
    assert "--weight-decay" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rho_is_sams_and_the_others_take_it_in_the_ratio_of_their_default_radii() -> None:
    space = read_space("base,sam,asam,msam", rho="0.01:1:log", **RANGES)
    assert space.radii["sam"] == Domain(0.01, 1.0, log=True)
    assert space.radii["asam"] == Domain(0.1, 10.0, log=True)
    ratio = flatwise.variant_info("msam").rho / flatwise.variant_info("sam").rho
    assert space.radii["msam"] == Domain(0.01 * ratio, ratio, log=True)
    assert "base" not in space.radii


def test_a_method_can_have_its_own_radii_or_one_that_is_not_searched() -> None:
    space = read_space("sam,asam,gsam:rho=0.3,alpha=0.2", rho="0.01,0.1,asam=0.5:5:log", **RANGES)
    assert space.methods == ("sam", "asam", "gsam:rho=0.3:alpha=0.2")
    assert space.radii == {"sam": Domain(choices=(0.01, 0.1)), "asam": Domain(0.5, 5.0, log=True)}
    assert read_space("asam", rho="asam=1:2", **RANGES).radii == {"asam": Domain(1.0, 2.0)}


@pytest.mark.parametrize(
    ("methods", "rho", "complaint"),
    [
        ("", "0.1", "names no method"),
        ("sam,sma", "0.1", "unknown method 'sma'; did you mean 'sam'"),
        ("sam,sam", "0.1", "twice"),
        ("sam,asam", "asam=1:2", "--rho must be"),
        ("sam", "0.1,asma=1:2", "unknown method in --rho 'asma'"),
    ],
)
def test_a_mistake_in_the_methods_is_named(methods: str, rho: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read_space(methods, rho=rho, **RANGES)


def test_each_method_searches_a_radius_of_its_own_name_inside_its_own_range() -> None:
    space = read_space("base,sam,asam", rho="0.01:1:log", **RANGES)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: dict[str, list[float]] = {}
    for _ in range(60):
        trial = study.ask()
        chosen = space.suggest(trial)
        assert chosen["weight_decay"] == 0.0005
        assert 0.01 <= chosen["lr"] <= 0.3
        named = {name for name in trial.params if name.startswith("rho:")}
        assert named == (set() if chosen["method"] == "base" else {f"rho:{chosen['method']}"})
        if chosen["rho"] is not None:
            seen.setdefault(chosen["method"], []).append(chosen["rho"])
    assert min(seen["sam"]) >= 0.01
    assert max(seen["sam"]) <= 1
    assert min(seen["asam"]) >= 0.1
    assert 1 < max(seen["asam"]) <= 10
