"""Lightning: with the callback a run is SAM written by hand; what is counted, logged and saved is that of one pass."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.start import on_ranks
from tests.test_ranks import Sums
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
    trainer = package.Trainer(max_epochs=epochs, callbacks=[Seeds(), *callbacks], **{**quiet, **fixed, **options})
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


@pytest.mark.supports("Lightning", "equal to hand-written SAM")
@pytest.mark.supports("Lightning", "gradient accumulation")
@pytest.mark.supports("Lightning", "clipping of the last gradient")
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


def plain(params: Any) -> torch.optim.Optimizer:
    return sgd(params)


def still(params: Any) -> torch.optim.Optimizer:
    return sam(params, 0.0)


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "a partial last window": {"accumulate_grad_batches": 3},
    "clipping": CLIPS["norm"],
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.supports("Lightning", "rho = 0 is the plain run, bit for bit")
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_radius_zero_is_the_plain_run(options: dict[str, Any]) -> None:
    """Weights, batch statistics, buffers, metrics, attributes, random state, logs: all of it, after every batch."""
    dtype = torch.float32 if "precision" in options else torch.float64
    one = fit(Net(plain, dtype=dtype), **options)
    other = fit(Net(still, dtype=dtype), SAMCallback(), **options)
    for first, second in zip(snapshots(one), snapshots(other), strict=True):
        assert_same(first, second)
    assert one.logger.rows == other.logger.rows
    assert one.logger.direct == other.logger.direct
    assert one.callback_metrics.keys() == other.callback_metrics.keys()


@pytest.mark.supports("Lightning", "logged loss is the clean one, metrics count once")
@pytest.mark.parametrize("k", [1, 2])
def test_the_second_pass_leaves_no_trace(k: int) -> None:
    """Before the first update, one batch or window of SAM differs from that of the base in the weights only."""
    options = {"accumulate_grad_batches": k, "limit_train_batches": k, "epochs": 1}
    one, other = Net(plain), Net()
    a, b = fit(one, **options), fit(other, SAMCallback(), **options)
    assert Passes.count == 2 * k
    names = list(one.state_dict())
    moving = {n for n, name in enumerate(names) if name in dict(one.named_parameters())}
    moving |= set(range(len(names), len(names) + len(moving)))  # momentum
    pairs = list(enumerate(zip(snapshots(a)[-1], snapshots(b)[-1], strict=True)))
    assert all(torch.equal(first, second) for n, (first, second) in pairs if n not in moving)
    assert not all(torch.equal(first, second) for n, (first, second) in pairs if n in moving)
    assert a.logger.rows == b.logger.rows
    assert "log" not in vars(other)
    assert b.callback_metrics["loss_epoch"] == b.logger.rows[-1][1]["loss_epoch"]


def test_the_epoch_ends_with_the_metrics_of_one_pass() -> None:
    net = Net()
    trainer = fit(net, SAMCallback(), epochs=1)
    assert float(trainer.callback_metrics["loss_epoch"]) == pytest.approx(sum(trainer.logger.direct) / BATCHES)
    assert len(net.outputs) == net.count == float(net.total) == BATCHES
    assert int(net.seen) == len(Y)


class Scaled(MixedPrecision):
    """Losses are scaled, nothing is cast: so nothing is rounded, and a run is bit for bit that without."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000))

    def autocast_context_manager(self) -> Any:
        return torch.autocast("cpu", enabled=False)


@pytest.mark.supports("Lightning", "GradScaler")
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("clip", CLIPS)
def test_a_scale_changes_nothing(clip: str | None, k: int) -> None:
    options = {**CLIPS[clip], "accumulate_grad_batches": k}
    one, other = fit(Net(), SAMCallback(), **options), fit(Net(), SAMCallback(), plugins=[Scaled()], **options)
    for first, second in zip(snapshots(one), snapshots(other), strict=True):
        assert_same(first, second)


def adamw(params: Any) -> torch.optim.Optimizer:
    return flatwise.SAM(torch.optim.AdamW(params, lr=0.01), RHO)


def fused(params: Any) -> torch.optim.Optimizer:
    return flatwise.SAM(torch.optim.AdamW(params, lr=0.01, fused=True), RHO)


@pytest.mark.supports("Lightning", "fp16 overflow in either pass")
@pytest.mark.parametrize("clip", [None, "norm"])
@pytest.mark.parametrize("bad", [5, 6], ids=["first", "second"])
@pytest.mark.parametrize("make", [sam, adamw, fused])
def test_an_overflow_in_either_pass_is_no_step(make: Any, bad: int, clip: str | None) -> None:
    net = Net(make, dtype=torch.float32)
    net.bad = {bad: math.inf}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    trainer = fit(net, SAMCallback(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], epochs=1, **CLIPS[clip])
    (seeds,) = (c for c in trainer.callbacks if isinstance(c, Seeds))
    assert seeds.scales == [1024.0, 1024.0, 512.0, 512.0, 512.0], "one back-off, not two"
    names, params = list(net.state_dict()), dict(net.named_parameters())
    state = sum(len(s) for s in trainer.optimizers[0].state.values())
    kept = [n for n, name in enumerate(names) if name in params] + [len(names) + n for n in range(state)]
    _, before, after, later, _ = seeds.snapshots
    assert all(torch.equal(before[n], after[n]) for n in kept)
    assert not torch.equal(after[kept[0]], later[kept[0]])
    assert trainer.optimizers[0].last.reason == "perturbed"


@pytest.mark.supports("Lightning", "autocast")
def test_bf16_is_the_same_as_the_loop() -> None:
    net, hand = Net(dtype=torch.float32), Net(dtype=torch.float32)
    fit(net, SAMCallback(), precision="bf16-mixed", epochs=1)
    opt = sam(hand.body.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    for index, (x, y) in enumerate(loader()):

        def closure(index: int = index, x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(hand.body(x.float()), y)
            loss.backward()
            return loss

        torch.manual_seed(index)
        opt.step(closure)
        schedule.step()
    assert torch.equal(net.weights(), hand.weights())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # Lightning's, where it makes no first step
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_training_step_may_return_none(k: int, scaled: bool) -> None:
    runs = []
    for make, callbacks in ((plain, []), (still, [SAMCallback()]), (sam, [SAMCallback()])):
        net = Net(make)
        net.skipped = {1, 2}
        plugins = [Scaled()] if scaled else []
        runs.append(fit(net, *callbacks, accumulate_grad_batches=k, plugins=plugins))
    for first, second in zip(*map(snapshots, runs[:2]), strict=True):
        assert_same(first, second)
    assert runs[0].global_step == runs[2].global_step
    assert runs[2].optimizers[0].last.reason == "perturbed"


@pytest.mark.supports("Lightning", "resume, bit for bit")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_that_is_resumed_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    whole, begun, resumed = Net(), Net(), Net()
    saved = {"enable_checkpointing": True}
    fit(whole, SAMCallback())
    half = fit(begun, SAMCallback(), ModelCheckpoint(tmp_path, save_last=True), epochs=1, **saved)
    assert half.global_step == BATCHES
    trainer = fit(resumed, SAMCallback(), ModelCheckpoint(tmp_path / "new"), ckpt=str(tmp_path / "last.ckpt"), **saved)
    assert torch.equal(whole.weights(), resumed.weights())
    last = trainer.optimizers[0].last
    assert (last.step, trainer.global_step) == (2 * BATCHES - 1, 2 * BATCHES)


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch", "ignore:Swapping scheduler")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (EMAWeightAveraging, {"decay": 0.5}),
        (StochasticWeightAveraging, {"swa_lrs": 0.05, "swa_epoch_start": 1, "annealing_epochs": 1}),
    ],
)
def test_averages_of_weights_are_those_of_the_steps(kind: Any, options: Any) -> None:
    one, zero, net = Net(plain), Net(still), Net()
    fit(one, kind(**options), epochs=3)
    fit(zero, SAMCallback(), kind(**options), epochs=3)
    assert torch.equal(one.weights(), zero.weights())
    trainer = fit(net, SAMCallback(), kind(**options), epochs=3)
    assert trainer.optimizers[0].last.reason == "perturbed"
    (seeds,) = (c for c in trainer.callbacks if isinstance(c, Seeds))
    assert not torch.equal(net.body[0].weight, seeds.snapshots[-1][0]), "the training ends with the average"


@pytest.mark.supports("Lightning", "sharpness for loggers")
@pytest.mark.parametrize("k", [1, 2])
def test_the_sharpness_is_logged(k: int) -> None:
    net = Net()
    callback = SAMCallback(log_sharpness=True)
    trainer = fit(net, callback, accumulate_grad_batches=k, log_every_n_steps=2, epochs=4)
    rows = [(step, row["sharpness"]) for step, row in trainer.logger.rows if "sharpness" in row]
    steps = [step for step, row in trainer.logger.rows if "loss_step" in row]
    assert [step for step, _ in rows] == steps
    assert all(value > 0 for _, value in rows)
    last = trainer.optimizers[0].last
    assert last.perturbed_loss > last.loss > 0
    assert last.loss == pytest.approx(sum(trainer.logger.direct[-(1 if k == 1 else BATCHES % k) :]) / k)
    if trainer.global_step % 2 == 0:
        assert rows[-1][1] == pytest.approx(last.sharpness)


FRAMEWORK_ERRORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "fp16": {"plugins": [Scaled()]},
}


@pytest.mark.supports("Lightning", "misuse is refused by name")
@pytest.mark.parametrize("options", FRAMEWORK_ERRORS.values(), ids=FRAMEWORK_ERRORS)
def test_a_run_without_the_callback_names_it(options: dict[str, Any]) -> None:
    net = Net()
    before = net.weights()
    with pytest.raises(RuntimeError, match="SAMCallback"):
        fit(net, **options)
    assert torch.equal(net.weights(), before)


@pytest.mark.supports("Lightning", "an exception in either pass leaves w")
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("failing", [5, 6, 7, 8])
def test_an_exception_in_any_pass_leaves_the_weights_at_w(failing: int, k: int) -> None:
    net = Net()

    class Fails(dict[int, float]):
        def get(self, number: int, _: Any = None) -> float:
            if number == failing:
                raise KeyError("the data ended")
            return 1.0

    net.bad = Fails()
    seeds = Seeds()
    with pytest.raises(KeyError, match="the data ended"):
        fit(net, seeds, SAMCallback(), accumulate_grad_batches=k)
    before = seeds.snapshots[-1]
    names = list(net.state_dict())
    for name, param in net.named_parameters():
        assert torch.equal(param, before[names.index(name)])
    assert "log" not in vars(net)
    assert isinstance(net.trainer.logger, Records)


def test_a_callback_without_its_optimizer_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"SAMCallback found no flatwise\.SAM"):
        fit(Net(plain), SAMCallback())


def test_a_strategy_that_makes_the_update_is_refused() -> None:
    class Engine(lightning.strategies.SingleDeviceStrategy):
        handles_gradient_accumulation = True

    with pytest.raises(RuntimeError, match="Engine makes the update by itself"):
        fit(Net(), SAMCallback(), strategy=Engine("cpu"), accelerator="auto")


@pytest.mark.filterwarnings(
    "ignore:You are using the `dataloader_iter` step", "ignore:Found `dataloader_iter` argument"
)
def test_a_training_step_that_draws_its_own_batches_is_refused() -> None:
    class Draws(Net):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=r"training_step\(dataloader_iter\) draws its own batches"):
        fit(Draws(), SAMCallback())


def test_a_training_step_without_an_index() -> None:
    class Plain(Net):
        def training_step(self, batch: Any) -> Any:
            return super().training_step(batch, 0)

    one, other = Net(), Plain()
    fit(one, SAMCallback(), epochs=1)
    fit(other, SAMCallback(), epochs=1)
    assert torch.equal(one.weights(), other.weights())


class Manual(Net):
    """Manual optimization, of two parts of the network where ``parts``."""

    def __init__(self, make: Any = sam, *, two: bool = False, **options: Any) -> None:
        super().__init__(make, **options)
        self.automatic_optimization, self.two = False, two

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for opt in self.optimizers() if self.two else [self.optimizers()]:

            def closure(opt: Any = opt) -> Tensor:
                opt.zero_grad()
                loss = F.cross_entropy(self.body(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            self.log("loss", opt.step(closure))
        for schedule in self.lr_schedulers() if self.two else [self.lr_schedulers()]:
            schedule.step()

    def configure_optimizers(self) -> Any:
        if not self.two:
            return super().configure_optimizers()
        opts = [self.make(self.body[0].parameters()), self.make(self.body[4].parameters())]
        return opts, [torch.optim.lr_scheduler.StepLR(opt, 2, 0.5) for opt in opts]

    def snapshot(self) -> list[Tensor]:
        return [self.weights()]


@pytest.mark.parametrize("callbacks", [[], [SAMCallback()]], ids=["alone", "with the callback"])
def test_manual_optimization_takes_a_closure(callbacks: list[Any]) -> None:
    hand, _ = by_hand()
    net = Manual()
    trainer = fit(net, *callbacks)
    assert torch.allclose(net.weights(), hand.weights(), rtol=0, atol=1e-12)
    assert trainer.global_step == 2 * BATCHES
    for first, second in zip(net.body.buffers(), hand.body.buffers(), strict=True):
        assert torch.allclose(first, second)


def test_manual_optimization_of_two_parts() -> None:
    net, zero, base = Manual(two=True), Manual(still, two=True), Manual(two=True)
    base.make = lambda params: flatwise.SAM(sgd(params), 0.0)
    fit(net), fit(zero), fit(base)
    assert torch.equal(zero.weights(), base.weights())
    assert not torch.equal(zero.weights(), net.weights())
    assert all(opt.last.reason == "perturbed" for opt in net.trainer.optimizers)


class Hands(Manual):
    """Manual optimization without a closure, as it must be where losses are scaled."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(F.cross_entropy(self.body(batch[0]), batch[1]))
        if opt.optimizer.perturb():
            self.manual_backward(F.cross_entropy(self.body(batch[0]), batch[1]))
            opt.optimizer.restore()
        opt.step()
        self.lr_schedulers().step()


@pytest.mark.parametrize("options", [{}, {"plugins": [Scaled()]}], ids=["plain", "scaled"])
def test_manual_optimization_without_a_closure(options: dict[str, Any]) -> None:
    hand, _ = by_hand()
    net = Hands()
    fit(net, SAMCallback(), **options)
    assert torch.allclose(net.weights(), hand.weights(), rtol=0, atol=1e-12)


def test_bsam_names_manual_optimization() -> None:
    net = Net(lambda params: flatwise.create("bsam", params, train_size=20, lr=0.1))
    with pytest.raises(RuntimeError, match="set automatic_optimization = False"):
        fit(net)


@pytest.mark.parametrize("name", ["asam", "pgn", "gsam", "msam", "looksam", "every-k", "vasso"])
def test_other_methods_are_those_of_the_loop(name: str) -> None:
    def make(params: Any) -> Any:
        return flatwise.create(name, sgd(params))

    net, hand = Net(make), Net(make)
    fit(net, SAMCallback(), epochs=2)
    opt = make(hand.body.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    for _ in range(2):
        for index, batch in enumerate(loader()):
            torch.manual_seed(index)
            opt.step(lambda batch: F.cross_entropy(hand.body(batch[0]), batch[1]), batch)
            schedule.step()
    assert torch.allclose(net.weights(), hand.weights(), rtol=0, atol=1e-12)


def test_what_needs_gradients_of_its_own_is_refused() -> None:
    net = Net(lambda params: sam(params, ascent_steps=2))
    with pytest.raises(RuntimeError, match=r"perturb\(\) cannot serve"):
        fit(net, SAMCallback())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatwise.integrations import lightning as adapter

    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r'SAMCallback needs Lightning: pip install "flatwise\[lightning\]"'):
        adapter._package()


class Part(lightning.LightningModule):
    """What two ranks train, with no statistics of their own."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.options = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), options

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.body(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return sam(self.body.parameters(), **self.options)

    weights = Net.weights


class Counts(Callback):
    """Counts how often gradients are summed over ranks."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.sums = Sums(trainer.model)


def on_two_ranks(rank: int, options: dict[str, Any], k: int, scaled: bool) -> tuple[Tensor, int]:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "0"})
    net, counts = Part(options), Counts()
    data = DataLoader(TensorDataset(*(t[rank * 6 : rank * 6 + 6] for t in (X, Y))), batch_size=6 // k)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        accumulate_grad_batches=k, plugins=[Scaled()] if scaled else [], callbacks=[counts, SAMCallback()],
    )  # fmt: skip
    trainer.fit(net, data)
    return net.weights(), counts.sums.count


@pytest.mark.supports("Lightning", "two processes")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sync", "k", "scaled"), [(True, 1, False), (True, 2, True), (False, 1, True), (False, 2, False)]
)
def test_two_processes_are_one(sync: bool, k: int, scaled: bool, tmp_path: Path) -> None:
    options = {} if sync else {"sync_ascent": False}
    (first, sums), (second, _) = on_ranks(on_two_ranks, tmp_path, options, k, scaled)
    assert torch.equal(first, second)
    assert sums == 4 * (2 if sync else 1)
    net = Part({} if sync else {"micro_batch_size": 6})
    opt = net.configure_optimizers()
    for _ in range(4):
        opt.step(net.loss, (X[:12], Y[:12]))
    assert torch.allclose(first, net.weights(), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_each_package_works_alone(name: str) -> None:
    code = f"""
import sys
import {name} as pl
from flatwise.integrations.lightning import SAMCallback
assert issubclass(SAMCallback, pl.Callback)
assert not {{"lightning.pytorch", "pytorch_lightning"}} - {{"{name}"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_call_on_the_wrapper_is_sent_to_the_optimizer() -> None:
    """Lightning's wrapper is of a class that inherits ours: what is called on it would be kept in the wrong object."""

    class Wrong(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(F.cross_entropy(self.body(batch[0]), batch[1]))
            self.optimizers().perturb()

    with pytest.raises(RuntimeError, match=r"framework's wrapper: call opt\.optimizer\.perturb\(\)"):
        fit(Wrong())
