"""``flatwise train``: one training, of any size, on one device or many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flatwise.commands.flags import parse_given

if TYPE_CHECKING:
    from flatwise.lab.train import TrainConfig

CONTINUES = True
DESCRIPTION = (
    "Train one network. Start it with torchrun or accelerate launch to use several devices; the same command continues "
    "a training that was interrupted. What is true or false has --name and --no-name."
)
MORE = {"recipe": "begin with a recipe's settings (flatwise recipes lists them), which every flag overrides"}


def parse(words: Sequence[str]) -> TrainConfig | None:
    """Read the command line.

    Args:
        words: what follows ``train``.

    Returns:
        The settings, or None where help was printed.
    """
    from flatwise.lab.train.config import TrainConfig, train_config_from

    given = parse_given(TrainConfig, words, "train", DESCRIPTION, MORE)
    if given is None:
        return None
    name = given.pop("recipe", None)
    settings: dict[str, Any] = {}
    if name is not None:
        from flatwise.lab.recipes import load_recipe

        settings = load_recipe(name)
    return train_config_from({**settings, **given})


def run(config: TrainConfig) -> int:
    """Train, and print the result and where the rest is.

    Args:
        config: the settings.

    Returns:
        The exit code.

    Raises:
        UserError: what keeps it from training; what all processes find, the first one says.
    """
    from pathlib import Path

    from flatwise.errors import UserError
    from flatwise.files import read_json
    from flatwise.lab.train import train
    from flatwise.lab.train.bar import StepBar
    from flatwise.lab.train.folder import TrainFolder

    folder = TrainFolder(Path(config.out) / config.folder_name())
    first = os.environ.get("RANK", "0") == "0"
    if first and not config.fresh and (read_json(folder.result) or {}).get("finished"):
        print(f"Already finished; read from {folder.result} (--fresh trains again).")
    try:
        with StepBar(shown=first and not config.quiet) as bar:
            result = train(config, bar.epoch, on_step=bar.step, on_notice=bar.notice)
    except UserError as error:
        if not first and error.everywhere:
            return error.exit_code
        raise
    if first:
        print(sentence(result))
        print(f"Weights, epochs and every number: {folder.path}")
    return 0


def sentence(result: dict[str, Any]) -> str:
    """Say what came out.

    Args:
        result: of a training.

    Returns:
        One line.
    """
    method, config = result["method"], result["config"]
    parts = [
        f"{config['dataset']}, {config['model']}, {method['name']}, seed {config['seed']}: test error "
        f"{100 * (1 - result['test_accuracy']):.2f} % after {result['epochs']} epochs",
    ]
    if result["validation_accuracy"] is not None:
        parts.append(f"validation error {100 * (1 - result['validation_accuracy']):.2f} %")
    if result["wrong_labels_fitted"] is not None:
        parts.append(f"{100 * result['wrong_labels_fitted']:.1f} % of {result['wrong_labels']} wrong labels fitted")
    parts.append(f"m = {result['effective_m']}")
    parts.append(f"{result['gradient_evaluations_per_step']:.3g} gradients a step")
    parts.append(f"{result['seconds']:.1f} s of training")
    return "; ".join(parts)
