"""Everything that the next step depends on, out of a trainer and into it.

Of parameters that are cut over processes (FSDP2) a saved state holds the whole: it says nothing about processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flatwise.lab.train.loop import Trainer
from flatwise.lab.train.tensors import cut, put_state, whole, whole_tree


def capture(trainer: Trainer) -> dict[str, Any]:
    """Read the state; every process must call it.

    Args:
        trainer: after a step.

    Returns:
        Tensors on their devices, which must be written before the next step.
    """
    scaler = trainer.world.scaler
    return {
        "model": {name: whole(value) for name, value in trainer.module.state_dict().items()},
        "optimizer": whole_tree(trainer.optimizer.state_dict()),
        "average": None if trainer.average is None else {n: whole(v) for n, v in trainer.average.values.items()},
        "scaler": None if scaler is None else scaler.state_dict(),
        "samples_differentiated": trainer.loss.samples_differentiated,
    }


@torch.no_grad()
def restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Bring a trainer, as it was built, to a saved state.

    Args:
        trainer: not yet trained.
        state: as :func:`capture` returned it.
    """
    put_state(trainer.module.state_dict(), state["model"])
    if trainer.average is not None:
        put_state(trainer.average.values, state["average"])
    params = [param for group in trainer.optimizer.param_groups for param in group["params"]]
    saved = state["optimizer"]
    entries = {
        index: {name: cut(value, params[index]) for name, value in entry.items()}
        for index, entry in saved["state"].items()
    }
    trainer.optimizer.load_state_dict({**saved, "state": entries})
    if trainer.world.scaler is not None:
        trainer.world.scaler.load_state_dict(state["scaler"])
    trainer.loss.samples_differentiated = state["samples_differentiated"]


def state_bytes(trainer: Trainer) -> tuple[int, int]:
    """Estimate how large saved states are.

    Args:
        trainer: as it was built.

    Returns:
        Bytes of the weights and buffers, and of everything that the next step depends on: two numbers beside each
        weight, which is what a base optimizer remembers at most, what the method remembers, and the average.
    """
    model = sum(value.numel() * value.element_size() for value in trainer.module.state_dict().values())
    slots = (getattr(trainer.optimizer, name, None) for name in ("_ascent", "_descent"))
    remembered = sum(len(getattr(getattr(slot, "direction", slot), "remembers", ())) for slot in slots)
    return model, model * (3 + remembered + (trainer.average is not None))
