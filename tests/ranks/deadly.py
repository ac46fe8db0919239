"""Runs examples/elastic.py, and dies in the middle of a second pass: torchrun ... deadly.py FOLDER."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

DEATHS = {("0", "1"): 13, ("1", "0"): 7}
"""In which life, on which rank, in which step of that life."""


def example() -> Any:
    """The example as a module."""
    path = Path(__file__).parents[2] / "examples" / "elastic.py"
    spec = importlib.util.spec_from_file_location("elastic", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    torch.set_num_threads(1)
    elastic, folder = example(), Path(sys.argv[1])
    life = os.environ["TORCHELASTIC_RESTART_COUNT"]
    last = 2 * DEATHS.get((life, os.environ["RANK"]), 0)  # two calls a step
    loss_of, calls, before = elastic.loss_of, 0, torch.Tensor()

    def deadly(model: Any, batch: Any) -> Any:
        nonlocal calls, before
        calls += 1
        weight = next(model.parameters()).detach()
        if calls == last:
            away = not torch.equal(weight, before)
            (folder / f"death {life}").write_text("at w + eps" if away else "at w")
            os.kill(os.getpid(), signal.SIGKILL)
        before = weight.clone()
        return loss_of(model, batch)

    elastic.loss_of = deadly
    elastic.train(folder)


if __name__ == "__main__":
    main()
