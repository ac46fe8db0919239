"""What a study is: settings, the methods trained in each, and the claims that their numbers are to decide.

A study is data. :mod:`~flatwise.lab.paper.protocol` says which trainings it takes, and
:mod:`~flatwise.lab.paper.findings` what follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Fields = Mapping[str, Any]
Better = Literal["more", "same"]
ACCURACY = "test_accuracy"


@dataclass(frozen=True)
class Arm:
    """One method in a setting.

    Attributes:
        name: as in the tables.
        fields: fields of the training that differ from the setting's; ``{seed}`` in the method is the run's seed.
        candidates: from which the held-out tenth chooses; one is no choice.
        like: the arm whose choice is taken over, beside that of the base.
        twice: also train for twice the epochs, and let the better on the held-out tenth stand.
        labels_from: the arm whose finished training of the same seed labels the training images anew.
        printed: row of the paper's table.
    """

    name: str
    fields: Fields = field(default_factory=dict)
    candidates: tuple[Fields, ...] = ({},)
    like: str | None = None
    twice: bool = False
    labels_from: str | None = None
    printed: str | None = None


@dataclass(frozen=True)
class Setting:
    """Data, network and length of training, and the arms that share them.

    Attributes:
        name: as in the tables.
        fields: fields of the training.
        arms: the methods; the first is the base, whose chosen learning rate and weight decay all others take over.
        printed: column of the paper's table.
    """

    name: str
    fields: Fields
    arms: tuple[Arm, ...]
    printed: str | None = None

    def arm(self, name: str) -> Arm:
        """Find an arm.

        Args:
            name: of the arm.

        Returns:
            The arm.
        """
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Claim:
    """What the paper says of two arms.

    Attributes:
        text: the claim in words.
        where: table, figure or section.
        arm: the arm that it is about.
        than: the arm that it is compared with.
        better: ``"more"``: the arm has more of the quantity; ``"same"``: the difference is below the margin.
        of: the quantity: ``"test_accuracy"`` or a measured one.
        of_than: the quantity of the other arm, where it is another.
        margin: for ``"same"``, in the quantity's own unit.
        settings: names of the settings that it is about; none: all.
    """

    text: str
    where: str
    arm: str
    than: str
    better: Better = "more"
    of: str = ACCURACY
    of_than: str | None = None
    margin: float = 0.0
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """An experiment of the paper, or of a later one, at a size of its own.

    Attributes:
        name: the word on the command line.
        title: what it is about.
        paper: which table or figure.
        settings: what is trained.
        claims: what is to be decided.
        table: name of the paper's table, where it prints one of this shape.
        versus: the arm that every other one of a table is compared with; None: the base.
        signed: whether each cell is to have the sign of the paper's difference.
        measure: what is measured of the trained weights (a name in ``measures.py``).
        quantities: what the table shows beside the accuracy: key of what was measured, and heading.
        rank: key of measured values whose rank correlation with the generalisation gap is taken, over the arms.
        kept: epochs after which the weights are kept for the measure.
        differs: in what this size differs from the paper, in sentences.
        seeds: of the reported trainings.
        tuning_seeds: of those that choose; no reported training has them.
    """

    name: str
    title: str
    paper: str
    settings: tuple[Setting, ...]
    claims: tuple[Claim, ...]
    table: str | None = None
    versus: str | None = None
    signed: bool = True
    measure: str | None = None
    quantities: tuple[tuple[str, str], ...] = ()
    rank: tuple[str, ...] = ()
    kept: str = ""
    differs: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (100, 101)

    def setting(self, name: str) -> Setting:
        """Find a setting.

        Args:
            name: of the setting.

        Returns:
            The setting.
        """
        return next(setting for setting in self.settings if setting.name == name)
