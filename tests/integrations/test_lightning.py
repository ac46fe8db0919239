"""Lightning: with the callback a run is SAM written by hand, and what Lightning counts, logs and saves is that of one pass."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.start import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatwise

lightning = pytest.importorskip("lightning.pytorch", reason="needs flatwise[lightning]")
import torchmetrics  # noqa: E402  # comes with Lightning
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging  # noqa: E402
from lightning.pytorch.loggers.logger import Logger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from flatwise.integrations.lightning import SAMCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]
BATCHES, RHO = 5, 0.1
X = torch.randn(4 * BATCHES, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(4 * BATCHES) % 3


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def sam(params: Any, rho: float = RHO, **options: Any) -> torch.optim.Optimizer:
    return flatwise.SAM(sgd(params), rho, **options)


class Passes:
    """How often a training_step ran: an attribute of a class, which nothing takes back."""

    count = 0


def net_class(package: Any) -> Any:
    """The module of the tests, of one package or the other."""

    class Net(package.LightningModule):  # type: ignore[misc,name-defined]
        """Batch statistics, dropout, a metric, a buffer and attributes of its own, and everything is logged."""

        def __init__(self, make: Callable[..., Any] = sam, *, dtype: torch.dtype = torch.float64) -> None:
            super().__init__()
            torch.manual_seed(0)
            body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
            self.body = body.to(dtype)
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
            self.collection = torchmetrics.MetricCollection(
                [torchmetrics.classification.MulticlassPrecision(3), torchmetrics.classification.MulticlassRecall(3)]
            )
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))
            self.make, self.dtype_, self.outputs, self.count, self.total = make, dtype, [], 0, torch.zeros(())
            self.bad: dict[int, float] = {}
            self.calls = 0
            self.skipped: set[int] = set()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            Passes.count += 1
            logits = self.body(batch[0])
            loss = F.cross_entropy(logits, batch[1]) * self.bad.get(Passes.count, 1.0)
            self.seen += len(batch[1])
            self.count += 1
            self.total += 1
            self.outputs.append(loss.detach())
            self.accuracy.update(logits, batch[1])
            self.collection(logits, batch[1])
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            self.log_dict(self.collection, on_step=False, on_epoch=True)
            self.logger.experiment.append(float(loss.detach()))
            return None if batch_idx in self.skipped else {"loss": loss, "size": len(batch[1])}

        def configure_optimizers(self) -> Any:
            opt = self.make(self.body.parameters())
            schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def snapshot(self) -> list[Tensor]:
            """Weights, buffers, the optimizer's state, metrics and attributes."""
            opt = self.trainer.optimizers[0]
            state = [v for s in opt.state_dict()["state"].values() for v in s.values() if isinstance(v, Tensor)]
            metrics = [self.accuracy, *self.collection.values()]
            state += [t for m in metrics for t in (*m.metric_state.values(), torch.tensor(m.update_count))]
            state += [torch.tensor(self.count), self.total, torch.stack(self.outputs), torch.get_rng_state()]
            return [t.detach().clone() for t in (*self.state_dict().values(), *state)]

        def weights(self) -> Tensor:
            return torch.cat([p.detach().flatten() for p in self.body.parameters()])

    return Net


Net = net_class(lightning)


class Records(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.direct: list[float] = []

    name, version = "records", 0

    @property
    def experiment(self) -> list[float]:
        return self.direct

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Seeds(Callback):
    """Makes the masks of a batch those of the loop below, and takes snapshots."""

    def __init__(self) -> None:
        self.snapshots: list[list[Tensor]] = []
        self.scales: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.snapshots.append(pl_module.snapshot())
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scales.append(scaler.get_scale() if scaler else 1.0)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=4)


def fit(net: Any, *callbacks: Any, epochs: int = 2, package: Any = lightning, ckpt: Any = None, **options: Any) -> Any:
    Passes.count = 0
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fixed = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "logger": Records()}
    trainer = package.Trainer(
        max_epochs=epochs, callbacks=[Seeds(), *callbacks], **{**quiet, **fixed, **options}
    )
    data = loader()
    if net.dtype_ != torch.float64:
        data = DataLoader(TensorDataset(X.to(net.dtype_), Y), batch_size=4)
    trainer.fit(net, data, ckpt_path=ckpt)
    return trainer


def snapshots(trainer: Any) -> list[list[Tensor]]:
    (seeds,) = (c for c in trainer.callbacks if isinstance(c, Seeds))
    return seeds.snapshots


def by_hand(rho: float = RHO, *, k: int = 1, clip: str | None = None, epochs: int = 2) -> tuple[Any, list[float]]:
    """SAM as the paper writes it, on the batches and the masks of the runs."""
    net = Net()
    params, opt = list(net.body.parameters()), sgd(net.body.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    parts = list(loader())
    losses: list[float] = []

    def gradients(window: list[int]) -> list[Tensor]:
        total = [torch.zeros_like(p) for p in params]
        for index in window:
            torch.manual_seed(index)
            loss = F.cross_entropy(net.body(parts[index][0]), parts[index][1]) / k
            losses.append(float(loss.detach()))
            for t, g in zip(total, torch.autograd.grad(loss, params), strict=True):
                t += g
        return total

    for _ in range(epochs):
        for start in range(0, BATCHES, k):
            window = list(range(start, min(start + k, BATCHES)))
            g = gradients(window)
            buffers = copy.deepcopy(dict(net.body.named_buffers()))
            norm = math.sqrt(sum(float((t**2).sum()) for t in g))
            before = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, t in zip(params, g, strict=True):
                    p.add_(t, alpha=rho / norm)
            second = gradients(window)
            del losses[-len(window) :]
            with torch.no_grad():
                for p, b, t in zip(params, before, second, strict=True):
                    p.copy_(b)
                    p.grad = t
                for name, buffer in net.body.named_buffers():
                    buffer.copy_(buffers[name])
            if clip == "norm":
                nn.utils.clip_grad_norm_(params, 0.2)
            elif clip == "value":
                nn.utils.clip_grad_value_(params, 0.02)
            opt.step()
            schedule.step()
    return net, losses


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    assert all(map(torch.equal, first, second))


CLIPS: dict[str | None, dict[str, Any]] = {
    None: {},
    "norm": {"gradient_clip_val": 0.2},
    "value": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_run_is_sam_written_by_hand(k: int, clip: str | None) -> None:
    hand, losses = by_hand(k=k, clip=clip)
    net = Net()
    trainer = fit(net, SAMCallback(), accumulate_grad_batches=k, **CLIPS[clip])
    assert torch.allclose(net.weights(), hand.weights(), rtol=0, atol=1e-12)
    assert all(map(torch.allclose, net.body.buffers(), hand.body.buffers()))
    steps = 2 * math.ceil(BATCHES / k)
    assert trainer.global_step == net.trainer.optimizers[0].last.step + 1 == steps
    assert Passes.count == 2 * 2 * BATCHES
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5 ** (steps // 2)
    assert net.trainer.optimizers[0].last.reason == "perturbed"
    # The loss that is logged directly is that of every clean pass, and no other.
    assert trainer.logger.direct == pytest.approx([k * loss for loss in losses], abs=1e-12)


def test_a_run_of_the_other_package_is_the_same() -> None:
    other = pytest.importorskip("pytorch_lightning")
    net, again = Net(), net_class(other)()
    fit(net, SAMCallback())
    trainer = fit(again, SAMCallback(), package=other)
    assert torch.equal(net.weights(), again.weights())
    assert len(trainer.logger.direct) == 2 * BATCHES
