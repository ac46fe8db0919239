"""``flatwise evaluate``: the test accuracy of a finished training again, from its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from flatwise.commands.flags import POSITIONAL

CONTINUES = False
DESCRIPTION = "Compute the test accuracy of a finished training again, from the weights in its folder."


@dataclass(frozen=True)
class Settings:
    """What is evaluated.

    Attributes:
        folder: of a finished training, as flatwise train prints it at its end.
        data_root: folder in which to look for the data (default: where the training looked).
    """

    folder: str = field(metadata={POSITIONAL: None})
    data_root: str | None = None


def run(settings: Settings) -> int:
    """Evaluate, and print what came out.

    Args:
        settings: which training.

    Returns:
        The exit code.
    """
    from flatwise.lab.train.finished import evaluate

    again = evaluate(settings.folder, settings.data_root)
    difference = again.scores.accuracy - again.recorded
    same = "as recorded" if difference == 0 else f"recorded: {100 * (1 - again.recorded):.2f} %"
    print(
        f"{settings.folder}: test error {100 * (1 - again.scores.accuracy):.2f} % ({same}), "
        f"loss {again.scores.loss:.4f}, {again.images} images"
    )
    return 0
