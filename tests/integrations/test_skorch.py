"""skorch: hand-written SAM, with rho = 0 the plain net bit for bit, and callbacks once a step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise

skorch = pytest.importorskip("skorch")
adapter = pytest.importorskip("flatwise.integrations.skorch")
sklearn = pytest.importorskip("sklearn.model_selection")
from skorch import callbacks  # noqa: E402

SAMNetClassifier, SAMNetMixin = adapter.SAMNetClassifier, adapter.SAMNetMixin
RHO, LR, SIZE, EPOCHS = 0.2, 0.1, 8, 3

generator = np.random.default_rng(0)
X = generator.normal(size=(24, 6)).astype(np.float32)
Y = np.arange(24) % 3


class Net(nn.Module):
    """Batch statistics and dropout; what a classifier of skorch wants: probabilities."""

    def __init__(self, dtype: torch.dtype = torch.float32, drop: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(drop), nn.Linear(8, 3)
        ).to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.dtype)).softmax(-1)  # type: ignore[no-any-return]


PlainNet = skorch.NeuralNetClassifier


def net(kind: Any = SAMNetClassifier, **options: Any) -> Any:
    usual: dict[str, Any] = {"lr": LR, "max_epochs": EPOCHS, "batch_size": SIZE, "train_split": None, "verbose": 0}
    if options.pop("sam", True):
        usual |= {"optimizer": flatwise.SAM, "optimizer__base_optimizer": torch.optim.SGD, "optimizer__rho": RHO}
    return kind(Net, **(usual | {"optimizer__momentum": 0.9} | options))


def fit(model: Any) -> Any:  # the module, which is made anew, seeds
    return model.fit(X, Y)


def state(model: Any) -> list[Tensor]:
    entries = model.optimizer_.state_dict()["state"].values()
    moments = [v for entry in entries for v in entry.values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*model.module_.state_dict().values(), *moments)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def by_hand(clip: float | None) -> tuple[nn.Module, list[float]]:
    """SAM from the equations, with the same masks in both passes and batch statistics of the first."""
    model, means = Net(torch.float64), []
    params = list(model.parameters())
    base = torch.optim.SGD(params, lr=LR, momentum=0.9)
    for _ in range(EPOCHS):
        torch.empty((), dtype=torch.int64).random_()  # the iterator of a loader draws its seed
        losses = []
        for start in range(0, 24, SIZE):
            x, y = torch.tensor(X[start : start + SIZE]), torch.tensor(Y[start : start + SIZE])
            before = torch.get_rng_state()

            def gradients(x: Tensor = x, y: Tensor = y) -> Tensor:
                base.zero_grad()
                loss = F.nll_loss(model(x).log(), y)
                loss.backward()
                return loss

            losses.append(gradients().item())
            buffers, held = copy.deepcopy(list(model.buffers())), [p.detach().clone() for p in params]
            norm = torch.cat([p.grad.flatten() for p in params]).norm()
            with torch.no_grad():
                for p in params:
                    p += RHO * p.grad / norm
            torch.set_rng_state(before)
            gradients()
            with torch.no_grad():
                for p, h in zip([*params, *model.buffers()], [*held, *buffers], strict=True):
                    p.copy_(h)
            if clip is not None:
                nn.utils.clip_grad_norm_(params, clip)
            base.step()
        means.append(sum(losses) / len(losses))
    return model, means


@pytest.mark.supports("skorch", "equal to hand-written SAM")
@pytest.mark.supports("skorch", "clipping of the last gradient")
@pytest.mark.parametrize("clip", [None, 0.05])
def test_it_is_sam_written_by_hand(clip: float | None) -> None:
    clips = [callbacks.GradientNormClipping(clip)] if clip else []
    model = fit(net(module__dtype=torch.float64, callbacks=clips))
    expected, losses = by_hand(clip)
    for a, b in zip(model.module_.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert model.history[:, "train_loss"] == pytest.approx(losses, rel=1e-9), "the loss in the history is that at w"


class Watches(callbacks.Callback):  # type: ignore[misc]
    """Counts, and keeps what it is shown."""

    def __init__(self) -> None:
        self.grads: list[Tensor] = []
        self.inside: list[bool] = []
        self.batches = 0

    def on_grad_computed(self, net: Any, named_parameters: Any, **_: Any) -> None:
        self.grads.append(torch.cat([p.grad.flatten() for _, p in named_parameters]))
        self.inside.append(net.optimizer_._look is not None)

    def on_batch_end(self, net: Any, training: bool, **_: Any) -> None:
        self.batches += training


@pytest.mark.supports("skorch", "logged loss is the clean one, metrics count once")
def test_a_callback_sees_the_last_gradient_once_a_step() -> None:
    watches = Watches()
    model = fit(net(callbacks=[("watches", watches)], optimizer__momentum=0.0, max_epochs=1, batch_size=24))
    (seen,) = watches.grads
    assert watches.inside == [False]
    assert watches.batches == 1
    start = torch.cat([p.detach().flatten() for p in Net().parameters()])
    end = torch.cat([p.detach().flatten() for p in model.module_.parameters()])
    torch.testing.assert_close((start - end) / LR, seen, rtol=1e-4, atol=1e-5)


def test_a_plain_net_takes_the_same_steps_and_announces_every_pass() -> None:
    watches, plain = Watches(), Watches()
    ours = fit(net(callbacks=[("watches", watches)]))
    theirs = fit(net(PlainNet, callbacks=[("watches", plain)]))
    assert same(state(ours), state(theirs))
    assert ours.history[:, "train_loss"] == theirs.history[:, "train_loss"]
    assert len(plain.grads) == 2 * len(watches.grads) == 2 * EPOCHS * 3
    assert all(map(torch.equal, watches.grads, plain.grads[1::2]))


def scores() -> list[Any]:
    kept = callbacks.EpochScoring("accuracy", name="train_accuracy", on_train=True, lower_is_better=False)
    batch = callbacks.BatchScoring("neg_log_loss", name="batch_score", on_train=True)
    return [("kept", kept), ("batch", batch)]


@pytest.mark.supports("skorch", "rho = 0 is the plain run, bit for bit")
@pytest.mark.parametrize("split", [None, 3])
def test_without_a_radius_it_is_the_plain_net(split: int | None) -> None:
    cut = None if split is None else skorch.dataset.ValidSplit(split)
    options = {"callbacks": [*scores(), ("clip", callbacks.GradientNormClipping(0.1))], "train_split": cut}
    ours = fit(net(optimizer__rho=0.0, **options))
    stream = torch.get_rng_state()
    theirs = fit(net(PlainNet, sam=False, **options))
    assert same(state(ours), state(theirs))
    assert torch.equal(stream, torch.get_rng_state())
    for column in ("train_loss", "train_accuracy", "batch_score", *(["valid_loss", "valid_acc"] if split else [])):
        assert ours.history[:, column] == theirs.history[:, column]


def test_scores_on_the_training_data_are_those_at_w() -> None:
    """skorch scores an epoch with the predictions that its training steps made."""
    ours, forwards = net(callbacks=scores(), max_epochs=1, batch_size=24, module__drop=0.0), []
    ours.initialize()
    ours.module_.register_forward_hook(lambda module, inputs, output: forwards.append(output.detach()))
    ours.partial_fit(X, Y)
    assert len(forwards) == 2, "two passes, and none for the scores"
    assert ours.history[-1, "train_accuracy"] == float((forwards[0].argmax(1).numpy() == Y).mean())
    assert ours.history[-1, "train_loss"] == pytest.approx(F.nll_loss(forwards[0].log(), torch.tensor(Y)).item())


def test_a_grid_of_radii() -> None:
    search = sklearn.GridSearchCV(
        net(), {"optimizer__rho": [0.0, 0.2], "lr": [0.05, 0.1]}, cv=2, scoring="accuracy", refit=True
    )
    search.fit(X, Y)
    assert len(search.cv_results_["params"]) == 4
    best = search.best_estimator_
    assert best.optimizer_.param_groups[0]["rho"] == search.best_params_["optimizer__rho"]
    assert best.optimizer_.param_groups[0]["lr"] == search.best_params_["lr"]


def test_a_radius_can_be_set_on_a_net_that_was_trained() -> None:
    model = fit(net())
    model.set_params(optimizer__rho=0.0)
    model.partial_fit(X, Y)
    assert model.optimizer_.last.reason == "zero radius"


def test_groups_have_radii_of_their_own() -> None:
    model = net(optimizer__param_groups=[("layers.1.*", {"rho": 0.0})])
    model.initialize()
    assert [group["rho"] for group in model.optimizer_.param_groups] == [0.0, RHO]
    model.set_params(optimizer__param_groups__0__rho=0.1)
    assert model.optimizer_.param_groups[0]["rho"] == 0.1


def test_a_scheduler_drives_it() -> None:
    schedule = callbacks.LRScheduler("CosineAnnealingLR", T_max=EPOCHS)
    ours = fit(net(callbacks=[("schedule", schedule)], optimizer__rho=0.0))
    theirs = fit(net(PlainNet, sam=False, callbacks=[("schedule", schedule)]))
    assert ours.optimizer_.param_groups[0]["lr"] < LR
    assert same(state(ours), state(theirs))


@pytest.mark.supports("skorch", "resume, bit for bit")
def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    model = fit(net())
    files = {f"f_{name}": str(tmp_path / name) for name in ("params", "optimizer")}
    model.save_params(**files)
    stream = torch.get_rng_state()
    model.partial_fit(X, Y)
    other = net()
    other.initialize()
    other.load_params(**files)
    torch.set_rng_state(stream)
    other.partial_fit(X, Y)
    assert same(state(model), state(other))


def asam(params: Any, rho: float = 1.0, **options: Any) -> flatwise.SAM:
    return flatwise.create("asam", torch.optim.SGD(params, **options), rho=rho, ascent_steps=2)


def test_a_method_that_computes_gradients_of_its_own(tmp_path: Path) -> None:
    watches = Watches()
    model = SAMNetClassifier(
        Net, optimizer=asam, optimizer__rho=0.5, lr=LR, max_epochs=1, batch_size=SIZE, train_split=None, verbose=0,
        callbacks=[("watches", watches)],
    )  # fmt: skip
    fit(model)
    assert model.optimizer_.last.passes == 3
    assert len(watches.grads) == 3, "one for each step"
    again = copy.deepcopy(model)
    assert same(state(model), state(again))


@pytest.mark.supports("skorch", "misuse is refused by name")
def test_an_optimizer_without_sam_is_named() -> None:
    model = net(sam=False)
    with pytest.raises(TypeError, match=r"the optimizer is no flatwise\.SAM"):
        fit(model)


@pytest.mark.supports("skorch", "an exception in either pass leaves w")
def test_an_error_in_the_second_pass_leaves_the_weights_at_w() -> None:
    class Fails(SAMNetClassifier):  # type: ignore[misc, valid-type]
        calls = 0

        def train_step_single(self, batch: Any, **fit_params: Any) -> Any:
            self.calls += 1
            if self.calls == 2:
                raise KeyError("in the second pass")
            return super().train_step_single(batch, **fit_params)

    model = net(Fails)
    model.initialize()
    held = copy.deepcopy(list(model.module_.parameters()))
    with pytest.raises(KeyError):
        model.partial_fit(X, Y)
    assert all(map(torch.equal, held, model.module_.parameters()))
    hooks = len(model.optimizer_.base_optimizer._optimizer_step_pre_hooks)
    model.partial_fit(X, Y)
    assert model.optimizer_.last.active
    assert len(model.optimizer_.base_optimizer._optimizer_step_pre_hooks) == hooks, "no hook is left"


def test_accelerate_inside_of_skorch_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    from skorch.hf import AccelerateMixin

    class Both(SAMNetMixin, AccelerateMixin, PlainNet):  # type: ignore[misc, valid-type, name-defined]
        pass

    model = net(Both, accelerator=accelerate.Accelerator(cpu=True))
    with pytest.raises(TypeError, match="AccelerateMixin steps without a closure"):
        fit(model)
