"""Recipes: each equals the paper's tables, typed in here once more; a user's file, and every mistake in one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from flatwise.cli import main
from flatwise.errors import UserError
from flatwise.lab.config import CompareConfig
from flatwise.lab.methods import parse_methods
from flatwise.lab.recipe_text import as_toml
from flatwise.lab.recipes import expand, find_recipe, load_recipe, read_family, recipe_names
from flatwise.lab.train.config import TrainConfig, train_config_from

# Section 11 of the authors' code, which the paper leaves open: the same for every recipe.
CODE = {
    "optimizer": "sgd", "momentum": 0.9, "nesterov": True, "decay": "all", "decay_in_loss": True,
    "schedule": "cosine", "clip": 5.0, "perturbation": "local",
}  # fmt: skip
SMALL = {**CODE, "batch_size": 256}
AUGMENT = {"": "basic", "-cutout": "basic+cutout", "-autoaugment": "basic+autoaugment"}

# Table 6: LR, WD, rho on CIFAR-10, rho on CIFAR-100; and the network with its epochs.
TABLE_6 = {
    "wrn28-10": ("wrn-28-10", 200, 0.1, 5e-4, 0.05, 0.1),
    "wrn28-10-1800": ("wrn-28-10", 1800, 0.05, 1e-3, 0.05, 0.1),
    "shakeshake": ("shakeshake-26-2x96d", 1800, 0.02, 1e-3, 0.02, 0.05),
    "pyramidnet": ("pyramidnet-272-200", 200, 0.05, 5e-4, 0.05, 0.2),
}
# Its last two rows: LR by data set.
SHAKEDROP = {"cifar10": (0.02, 5e-4, 0.05), "cifar100": (0.05, 5e-4, 0.05)}
# Table 7: LR, WD, rho.
TABLE_7 = {
    ("svhn", "wrn28-10"): (0.01, 5e-4, 0.01),
    ("svhn", "shakeshake"): (0.01, 5e-4, 0.01),
    ("fashion-mnist", "wrn28-10"): (0.1, 5e-4, 0.05),
    ("fashion-mnist", "shakeshake"): (0.1, 5e-4, 0.02),
}
NETWORKS = {"wrn28-10": "wrn-28-10", "shakeshake": "shakeshake-26-2x96d"}


def both(stem: str, shared: dict[str, Any], rho: float, m: int) -> dict[str, dict[str, Any]]:
    """The SAM recipe and its twin."""
    return {
        f"{stem}-sam": {**shared, "method": "sam", "rho": rho, "m": m},
        f"{stem}-sgd": {**shared, "method": "base"},
    }


def expected_cifar() -> dict[str, dict[str, Any]]:
    found = {}
    for word, augment in AUGMENT.items():
        for data in ("cifar10", "cifar100"):
            for row, (model, epochs, lr, wd, *rho) in TABLE_6.items():
                shared = {**SMALL, "dataset": data, "model": model, "epochs": epochs, "lr": lr, "weight_decay": wd}
                radius = rho[data == "cifar100"]
                found.update(both(f"{data}-{row}{word}", {**shared, "augment": augment}, radius, 32))
            lr, wd, radius = SHAKEDROP[data]
            shared = {**SMALL, "dataset": data, "model": "pyramidnet-272-200-shakedrop", "epochs": 1800, "lr": lr}
            stem = f"{data}-pyramidnet-shakedrop{word}"
            found.update(both(stem, {**shared, "weight_decay": wd, "augment": augment}, radius, 32))
    return found


def expected_small_images() -> dict[str, dict[str, Any]]:
    found = {}
    for (data, row), (lr, wd, rho) in TABLE_7.items():
        shared = {**SMALL, "dataset": data, "model": NETWORKS[row], "epochs": 200, "lr": lr, "weight_decay": wd}
        # SVHN: its policy and cutout, no crops; Fashion-MNIST's "auto augment" is cutout.
        word, augment = ("-autoaugment", "autoaugment+cutout") if data == "svhn" else ("-cutout", "basic+cutout")
        found.update(both(f"{data}-{row}", {**shared, "augment": "basic"}, rho, 32))
        found.update(both(f"{data}-{row}{word}", {**shared, "augment": augment}, rho, 32))
    return found


def expected_imagenet() -> dict[str, dict[str, Any]]:
    found = {}
    for depth in (50, 101, 152):
        for epochs in (100, 200, 400):
            shared = {
                **CODE, "dataset": "imagenet", "resolution": 224, "model": f"resnet{depth}", "epochs": epochs,
                "batch_size": 4096, "lr": 1.0, "label_smoothing": 0.1, "weight_decay": 1e-4, "augment": "inception",
            }  # fmt: skip
            found.update(both(f"imagenet-resnet{depth}-{epochs}", shared, 0.05, 4096 // 32))
    return found


def expected_fine_tuning() -> dict[str, dict[str, Any]]:
    found = {}
    frozen = {**CODE, "pretrained": True, "freeze_norm": True, "weight_decay": 1e-5, "augment": "inception"}
    networks = {
        "b7": {"model": "tf_efficientnet_b7.ra_in1k", "resolution": 600, "batch_size": 1024},
        "l2": {"model": "tf_efficientnet_l2.ns_jft_in1k_475", "resolution": 475, "batch_size": 512},
    }
    lengths = {"b7": {"lr": 0.016, "steps": 5000}, "l2": {"lr": 0.008, "steps": 10_000}}
    cores = {"b7": 64, "l2": 128}
    for size, network in networks.items():
        m = network["batch_size"] // cores[size]  # type: ignore[operator]
        for data in ("aircraft", "flowers", "pets", "cars", "birdsnap", "food101", "cifar10", "cifar100"):
            shared = {**frozen, **network, **lengths[size], "dataset": data}
            if data.startswith("cifar"):
                shared["augment"] = "basic+autoaugment"
            found.update(both(f"{data}-efficientnet-{size}", shared, 0.05, m))
        whole = {**frozen, **network, "dataset": "imagenet", "keep_head": True, "epochs": 10, "lr": 0.1}
        # From the README's command for L2, where the paper is silent.
        whole.update(clip=1.0, label_smoothing=0.1)
        found.update(both(f"imagenet-efficientnet-{size}", whole, 0.05, m))
    return found


def expected_noise() -> dict[str, dict[str, Any]]:
    found = {}
    for share in (20, 40, 60, 80):
        shared = {
            **SMALL, "dataset": "cifar10", "model": "resnet32", "epochs": 200, "lr": 0.1, "weight_decay": 5e-4,
            "label_noise": share / 100, "noise": "symmetric", "augment": "basic",
        }  # fmt: skip
        stem = f"cifar10-resnet32-noise{share}"
        pair = both(stem, shared, 0.05 if share == 80 else 0.1, 32)
        mixup = {**shared, "method": "base", "mixup": 8.0}
        again = {"labels_from": "the folder of the first training: --labels-from FOLDER"}
        found.update({**pair, f"{stem}-mixup": mixup, f"{stem}-bootstrap-mixup": {**mixup, **again}})
        found[f"{stem}-bootstrap-sam"] = {**pair[f"{stem}-sam"], **again}
    return found


def expected_ablations() -> dict[str, dict[str, Any]]:
    usual = {**SMALL, "epochs": 200, "lr": 0.1, "weight_decay": 5e-4, "augment": "basic"}
    ten = {**usual, "dataset": "cifar10"}
    found = {}
    for data, rho in (("cifar10", 0.05), ("cifar100", 0.1)):
        for steps in (1, 2, 3, 5):
            method = {"method": f"sam:ascent_steps={steps}", "rho": rho, "m": 32}
            found[f"{data}-wrn28-10-inner{steps}-sam"] = {**usual, "dataset": data, "model": "wrn-28-10", **method}
    norms = {"p2": ("sam", 0.05), "pinf": ("lp:p=inf", 1e-5), "random": ("random:filter_scaled=False", 1e-5)}
    for word, (method, rho) in norms.items():
        found[f"cifar10-wrn28-10-{word}"] = {**ten, "model": "wrn-28-10", "method": method, "rho": rho, "m": 32}
    found.update(both("cifar10-wrn40-2", {**ten, "model": "wrn-40-2"}, 0.05, 32))
    second = {"method": "second-order", "rho": 0.05, "m": 32}
    found["cifar10-wrn40-2-second-order"] = {**ten, "model": "wrn-40-2", **second}
    spectra = {**ten, "model": "wrn-40-10-nobn", "epochs": 300, "keep_epochs": "1,50,300", "lr": 0.01}
    found.update(both("cifar10-wrn40-10-nobn", spectra, 0.05, 32))
    small = {**ten, "model": "resnet20"}
    found["cifar10-resnet20-sgd"] = {**small, "method": "base"}
    for m in (1, 4, 16, 64, 256):
        found[f"cifar10-resnet20-m{m}-sam"] = {**small, "method": "sam", "rho": 0.05, "m": m}
    return found


EXPECTED = {
    **expected_cifar(), **expected_small_images(), **expected_imagenet(), **expected_fine_tuning(),
    **expected_noise(), **expected_ablations(),
}  # fmt: skip


def test_there_is_a_recipe_for_every_row_and_no_other() -> None:
    assert sorted(recipe_names()) == sorted(EXPECTED)
    assert len(EXPECTED) == 60 + 16 + 18 + 36 + 20 + 22


@pytest.mark.parametrize("name", EXPECTED)
def test_the_resolved_configuration_is_the_papers_field_by_field(name: str) -> None:
    assert asdict(train_config_from(load_recipe(name))) == asdict(TrainConfig(**EXPECTED[name]))


@pytest.mark.parametrize("name", recipe_names())
def test_it_says_where_in_the_paper_it_stands_and_its_method_exists(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.paper.startswith(("Table ", "Figure"))
    assert recipe.comment.count("\n") >= 4
    config = train_config_from(dict(recipe.fields))
    (method,) = parse_methods(CompareConfig(methods=config.method, rho=config.rho))
    assert (method.variant is None) == (config.method == "base") == (config.m is None) == (config.rho is None)


@pytest.mark.parametrize("name", recipe_names())
def test_printed_into_a_file_it_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(as_toml(find_recipe(name)), encoding="utf-8")
    assert load_recipe(str(file)) == load_recipe(name)


def test_the_defaults_in_the_printed_comment_are_fields_too(tmp_path: Path) -> None:
    text = as_toml(find_recipe("cifar10-wrn28-10-sam"))
    head, _, defaults = text.partition("# Left at their defaults:\n")
    file = tmp_path / "own.toml"
    file.write_text(head + defaults.replace("# ", ""), encoding="utf-8")
    assert len(load_recipe(str(file))) > 30
    assert train_config_from(load_recipe(str(file))) == train_config_from(load_recipe("cifar10-wrn28-10-sam"))


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str, name: str = "own.toml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_a_file_of_ones_own_changes_a_recipe(own: Callable[..., str]) -> None:
    path = own('recipe = "cifar10-wrn28-10-sam"\nmodel = "resnet20"\nlr = 1\n')
    fields = load_recipe(path)
    assert fields == {**load_recipe("cifar10-wrn28-10-sam"), "model": "resnet20", "lr": 1.0}
    assert type(fields["lr"]) is float
    second = own('recipe = "own.toml"\nrho = 0.2\n', "second.toml")  # beside it
    assert load_recipe(second) == {**fields, "rho": 0.2}


def test_the_caller_may_change_what_it_got() -> None:
    load_recipe("cifar10-wrn28-10-sam")["epochs"] = 1
    assert load_recipe("cifar10-wrn28-10-sam")["epochs"] == 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown field 'epoch'; did you mean 'epochs'?"),
        ("epochs = '3'", "epochs must be of type int, not '3'"),
        ("epochs = 3.5", "epochs must be of type int, not 3.5"),
        ("epochs = true", "epochs must be of type int, not True"),
        ("lr = '0.1'", "lr must be of type float, not '0.1'"),
        ("nesterov = 1", "nesterov must be of type bool, not 1"),
        ("schedule = 'cosin'", "is one of cosine, step, linear, constant, not 'cosin'; did you mean 'cosine'?"),
        ("lr = -1", "--lr must be a number of at least 0, not -1.0"),
        ("augment = 'cutot'", "unknown augmentation 'cutot'; did you mean 'cutout'?"),
        ("recipe = 'cifar10-wrn28-10-samm'", "'cifar10-wrn28-10-samm'; did you mean 'cifar10-wrn28-10-sam'?"),
        ("recipe = 'own.toml'", "begins with itself"),
        ("recipe = 'missing.toml'", "No such file"),
        ("mixup = 1.0\ncutmix = 1.0", "exclude each other"),
        ("epochs = ", "is no TOML"),
        ("[train]\nepochs = 3", "unknown field 'train'"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_clear_line(own: Callable[..., str], text: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_recipe(own(text))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none.toml: No such file"):
        load_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no TOML"):
        load_recipe(str(tmp_path / "bytes.toml"))


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'cifar100-shakeshake-cutout-sgd'"):
        load_recipe("cifar100-shakeshake-cutot-sgd")


def test_a_pattern_is_the_product_of_its_choices() -> None:
    assert list(expand("a{,-b}-{c,d}")) == [
        ("a-c", {"c"}), ("a-d", {"d"}), ("a-b-c", {"b", "c"}), ("a-b-d", {"b", "d"}),
    ]  # fmt: skip


def test_later_and_narrower_sections_win_and_a_word_that_nothing_chooses_is_refused(own: Callable[..., str]) -> None:
    text = 'names = "{x,y}-{sam,sgd}"\npaper = "T"\n[all]\nlr = 0.1\n[x]\nlr = 0.2\npaper = "X"\n["x sam"]\nlr = 0.3\n'
    found = {recipe.name: (recipe.fields["lr"], recipe.paper) for recipe in read_family(Path(own(text)))}
    assert found == {"x-sam": (0.3, "T, X"), "x-sgd": (0.2, "T, X"), "y-sam": (0.1, "T"), "y-sgd": (0.1, "T")}
    with pytest.raises(UserError, match=r"word of a section in own.toml 'cutot'"):
        read_family(Path(own(text + "[cutot]\nlr = 1.0\n")))


def test_the_command_lists_all_and_prints_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ") and " | " in line][1:]
    assert [row.split("|")[1].strip() for row in rows] == list(recipe_names())
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert cells["cifar100-wrn28-10-cutout-sam"] == [
        "Table 1, WRN-28-10, CIFAR-100, cutout", "cifar100", "wrn-28-10", "200 epochs", "sam, rho 0.1",
    ]  # fmt: skip
    assert cells["pets-efficientnet-b7-sgd"][3:] == ["5000 steps", "base"]
    assert main(["recipes", "flowers-efficientnet-l2-sam"]) == 0
    text = capsys.readouterr().out
    assert "\nsteps = 10000\n" in text
    assert "not printed" in text
    (tmp_path / "own.toml").write_text(text)
    assert main(["recipes", str(tmp_path / "own.toml")]) == 0
    assert "\nsteps = 10000\n" in capsys.readouterr().out


def test_the_page_has_the_commands_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page.partition("## All recipes")[2].split("\n\n")[2].splitlines() == printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes", "cifar10-wrn28-10-samm"], "did you mean 'cifar10-wrn28-10-sam'?"),
        (["recipes", "--all"], "takes names of recipes, not '--all'"),
    ],
)
def test_a_mistake_in_the_command_is_one_clear_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
