"""Draw the pictures of docs/landscape.md: a small network on scikit-learn's digits, trained with SGD and with SAM.

python examples/landscape.py            # draws into a temporary folder
python examples/landscape.py FOLDER     # or into this one, such as docs/results
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flatwise
from flatwise.measure import TrajectoryRecorder, landscape

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def trained(rho: float, data: Batch, epochs: int = 12) -> tuple[nn.Module, TrajectoryRecorder]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = flatwise.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=rho)
    recorder = TrajectoryRecorder(model, every=4)
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0])).split(50):
            optimizer.step(lambda batch: loss_fn(model, batch), (data[0][rows], data[1][rows]))
            recorder.step()
    return model, recorder


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    inputs, targets = load_digits(return_X_y=True)
    data = torch.tensor(inputs / 16, dtype=torch.float32)[:600], torch.tensor(targets)[:600]
    sgd, recorder = trained(0.0, data)
    sam, _ = trained(0.2, data)
    models: dict[str, nn.Module] = {"SGD": sgd, "SAM, rho 0.2": sam}
    seen = [(data[0][rows], data[1][rows]) for rows in torch.arange(400).split(100)]
    options: dict[str, Any] = {"progress": False}
    random = landscape(models, loss_fn, seen, **options)
    line = landscape(models, loss_fn, seen, dimensions=1, **options)
    sharpest = landscape(models, loss_fn, seen, directions="hessian", extent=0.8, **options)
    run = landscape({"SGD": sgd}, loss_fn, seen, directions="pca", trajectory=recorder, **options)
    between = landscape(models, loss_fn, seen, directions="checkpoints", **options)
    random.plot(folder / "landscape_random.png", dpi=100, title="Along random directions")
    line.plot(folder / "landscape_line.png", dpi=100, title="Along one random direction")
    sharpest.plot(folder / "landscape_hessian.png", "contour", dpi=100, title="Along each network's sharpest two")
    run.plot(folder / "landscape_run.png", "contour", dpi=100, title="The way of the SGD run")
    between.plot(folder / "landscape_between.png", dpi=100, title="From one network to the other")
    text = "\n".join(str(entry) for entry in (random, line, sharpest, run, between))
    (folder / "landscape.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
