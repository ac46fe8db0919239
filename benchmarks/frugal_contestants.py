"""Who takes part in ``frugal.py``: each turns a base optimizer into a way to make a step.

    CONTESTANTS["sam 0.1"].begin(setting)    # has step(batch), result() and notes()

Some are not there on every version of the package: ``missing`` says why, and ``frugal.py`` skips them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flatwise import AutoRadius
from flatwise.lab.methods import Method, wrap
from frugal_tasks import Batch, Setting

GRID = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


class Plain:
    """The base optimizer as it is."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def step(self, batch: Batch) -> None:
        """Make a step."""
        self.setting.base.zero_grad()
        self.setting.loss(batch).backward()
        self.setting.base.step()

    def result(self) -> nn.Module:
        """Return the model that is judged."""
        return self.setting.model

    def notes(self) -> dict[str, Any]:
        """Return what the record should hold beside the score."""
        return {}


class Averaged(Plain):
    """The base optimizer; judged is a running average of its weights, and of BatchNorm's buffers."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.decay = ema_decay(setting.total_steps)
        self.average = AveragedModel(setting.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True)

    def step(self, batch: Batch) -> None:
        """Make a step, and let the average follow."""
        super().step(batch)
        self.average.update_parameters(self.setting.model)

    def result(self) -> nn.Module:
        """Return the average."""
        return self.average

    def notes(self) -> dict[str, Any]:
        """Return the decay."""
        return {"decay": round(self.decay, 5)}


def ema_decay(total_steps: int) -> float:
    """Return 0.99 up to 5,000 steps, as all tasks here have, and 0.999 from 50,000."""
    return min(0.999, max(0.99, 1 - 50 / total_steps))


class Wrapped(Plain):
    """A method of flatwise around the base optimizer."""

    def __init__(self, setting: Setting, variant: str, options: Mapping[str, Any]) -> None:
        super().__init__(setting)
        options = dict(options)
        if "auto" in options:
            options["rho"] = AutoRadius(**options.pop("auto"))
        self.optimizer = wrap(
            Method(variant, variant, options),
            setting.base,
            setting.total_steps,
            model=setting.model,
            train_size=setting.train_size,
            batch_size=setting.batch_size,
        )
        reduction = "none" if self.optimizer.wants_sample_losses else "mean"
        self.loss = lambda batch: setting.loss(batch, reduction)

    def step(self, batch: Batch) -> None:
        """Make a step."""
        self.optimizer.step(self.loss, batch)

    def notes(self) -> dict[str, Any]:
        """Return the radius of the end, which a controller may have chosen."""
        rho = self.optimizer.last.rho
        return {} if rho is None else {"last_rho": float(f"{float(rho):.4g}")}


class Peer(Plain):
    """temperon with its defaults: SAM with radius 0.05 in the last 30 % of the training."""

    def __init__(self, setting: Setting) -> None:
        from temperon import Temperon

        super().__init__(setting)
        self.optimizer = Temperon(setting.base, total_steps=setting.total_steps)

    def step(self, batch: Batch) -> None:
        """Make a step."""

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = self.setting.loss(batch)
            loss.backward()
            return loss

        self.optimizer.step(closure)


@dataclass(frozen=True)
class Contestant:
    """A row of the comparison.

    Attributes:
        name: in table and record.
        variant: flatwise's name of the method; or ``"base"``, ``"ema"``, ``"temperon"``.
        options: of the method; what is not said is its default.
        longer: how many times the base's epochs it trains.
    """

    name: str
    variant: str
    options: Mapping[str, Any] = field(default_factory=dict)
    longer: int = 1

    def begin(self, setting: Setting) -> Plain:
        """Take over a training that is about to begin."""
        if self.variant in OTHERS:
            return OTHERS[self.variant](setting)
        return Wrapped(setting, self.variant, self.options)

    @property
    def settings(self) -> dict[str, Any]:
        """What is kept in the record."""
        return {"variant": self.variant, "options": dict(self.options), "longer": self.longer}

    @property
    def cost(self) -> float:
        """About how long it trains, in trainings of the base: for the order and the time left only."""
        twice = {"sam": 2.0, "temperon": 1.3, "looksam": 1.2}
        return self.longer * twice.get(self.variant, 1.1)

    def missing(self) -> str | None:
        """Say why it cannot take part, or return None."""
        if self.variant in OTHERS:
            return "pip install temperon" if self.variant == "temperon" and find_spec("temperon") is None else None
        with torch.random.fork_rng(devices=[]):
            model = nn.Linear(2, 2)
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def loss(batch: Batch, reduction: str = "mean") -> torch.Tensor:
            return functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction)

        try:
            self.begin(Setting(model, base, loss, 10, 1, 2, 2)).step((torch.eye(2), torch.tensor([0, 1])))
        except (TypeError, ValueError) as error:
            return str(error)
        return None


OTHERS: dict[str, type[Plain]] = {"base": Plain, "ema": Averaged, "temperon": Peer}
SAMS = {rho: f"sam {rho:g}" for rho in GRID}
"""The grid's names."""

_ROWS = (
    Contestant("base", "base"),
    Contestant("base 2x", "base", longer=2),
    Contestant("ema", "ema"),
    *(Contestant(name, "sam", {"rho": rho}) for rho, name in SAMS.items()),
    Contestant("msam", "msam"),
    Contestant("looksam", "looksam"),
    Contestant("late", "late"),
    Contestant("temperon", "temperon"),
    Contestant("frugal", "frugal"),
    Contestant("sam auto", "sam", {"rho": "auto"}),
)
_ABLATIONS = (
    Contestant("no turn", "frugal", {"auto": {"turn": 1e-6}}),
    Contestant("no slope", "frugal", {"auto": {"slope": 0.0}}),
    Contestant("no rise", "frugal", {"auto": {"rise": 1e9}}),
    Contestant("no drag", "frugal", {"auto": {"drag": 1e9}}),
    Contestant("falls as it rises", "frugal", {"auto": {"down": 1.0, "slow": 1.0}}),
    Contestant("begins at 3", "frugal", {"auto": {"start": 0.5}}),
)
CONTESTANTS: dict[str, Contestant] = {row.name: row for row in (*_ROWS, *_ABLATIONS)}
USUAL, ABLATIONS = [row.name for row in _ROWS], [row.name for row in _ABLATIONS]
"""Those that take part where no others are named, and ``frugal`` without one of its parts."""
