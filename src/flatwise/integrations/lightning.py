"""Lightning Trainers, ``lightning.pytorch`` and ``pytorch_lightning``: the second pass, before clipping and the update.

Lightning calls ``on_before_optimizer_step`` once a step, after the last micro-batch's backward pass. There the
micro-batches run again, at w + eps, and what they leave behind in loggers and attributes is taken back.
"""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.guards import LARGE
from flatwise.integrations.replay import Replay, find_sam
from flatwise.optimizer import SAM


def _package() -> str:
    """Return the name of the package that is in use, or else that is installed."""
    names = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
    for name in names:
        if name in sys.modules or find_spec(name.partition(".")[0]):
            return name
    raise ImportError('SAMCallback needs Lightning: pip install "flatwise[lightning]"')


_NAME = _package()
_Callback: Any = import_module(_NAME).Callback
_NoLogger: Any = import_module(f"{_NAME}.loggers.logger").DummyLogger
_takes: Any = import_module(f"{_NAME}.utilities.signature_utils").is_param_in_hook_signature

_KEEPERS = {"LightningModule", "Metric", "MetricCollection"}  # by name: two packages define the first
_OF_MODULE = frozenset(vars(Module()))


def _containers(values: Iterable[Any], seen: set[int]) -> list[tuple[Any, Any]]:
    """Return the containers among values, and inside of those, each with a copy of what it holds."""
    found = []
    for value in values:
        if isinstance(value, list | dict | set | deque) and id(value) not in seen:
            seen.add(id(value))
            found.append((value, copy.copy(value)))
            found += _containers(value.values() if isinstance(value, dict) else value, seen)
    return found


class _Attributes:
    """The plain attributes of a module: numbers, small tensors, lists, dictionaries; of a metric its states."""

    def __init__(self, module: Module) -> None:
        self._now = vars(module)
        self._kept = {name: value for name, value in self._now.items() if name not in _OF_MODULE}
        values = list(self._kept.values())
        self._filled = _containers(values, set())
        metric = hasattr(module, "metric_state")
        tensors = [v for v in values if isinstance(v, Tensor) and (metric or v.nbytes <= LARGE)]
        self._tensors = [(v, v.detach().clone(), v._version) for v in tensors]

    @torch.no_grad()
    def put(self) -> None:
        """Bring them back: the same objects, as they were."""
        for name in self._now.keys() - self._kept.keys() - _OF_MODULE:
            del self._now[name]
        self._now.update(self._kept)
        for value, kept in self._filled:
            value.clear()
            value.extend(kept) if isinstance(value, list | deque) else value.update(kept)
        for tensor, before, version in self._tensors:
            if tensor._version != version:
                tensor.copy_(before)


@contextmanager
def _no_trace(trainer: Any, pl_module: Module) -> Iterator[None]:
    """Log nothing inside, and keep nothing that is added to metrics and to what ``training_step`` counts or collects.

    Args:
        trainer: whose loggers rest.
        pl_module: whose attributes, and those of the metrics and Lightning modules in it, come back.

    Yields:
        Nothing.
    """
    keepers = [m for m in pl_module.modules() if _KEEPERS & {kind.__name__ for kind in type(m).__mro__}]
    kept, loggers = [_Attributes(module) for module in keepers], trainer.loggers
    try:
        trainer.loggers = [_NoLogger() for _ in loggers]
        for module in keepers:
            if hasattr(module, "log_dict"):
                vars(module)["log"] = vars(module)["log_dict"] = lambda *_, **__: None
        yield
    finally:
        trainer.loggers = loggers
        for attributes in kept:
            attributes.put()


class SAMCallback(_Callback):  # type: ignore[misc]  # which class it is, the installation decides
    """Makes ``trainer.fit`` right for a :class:`flatwise.SAM` that ``configure_optimizers`` returns.

    With manual optimization it has nothing to do: call ``opt.step(closure)``.

    Args:
        log_sharpness: log ``sharpness``, the loss at w + eps minus the loss at w, whenever the trainer logs.
    """

    def __init__(self, *, log_sharpness: bool = False) -> None:
        super().__init__()
        self._log_sharpness = log_sharpness
        self._replay, self._apart = Replay(), ExitStack()
        self._loss: Tensor | None = None
        self._perturbed_loss: Tensor | None = None
        self._differentiated = self._stepped = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the optimizer, and tell it what scales its losses.

        Args:
            trainer: the trainer.
            pl_module: the module.

        Raises:
            RuntimeError: if there is no such optimizer, or the passes cannot be made again.
        """
        found = [sam for optimizer in trainer.optimizers if (sam := find_sam(optimizer)) is not None]
        if not found:
            raise RuntimeError(
                "SAMCallback found no flatwise.SAM: return flatwise.SAM(base_optimizer, rho) from configure_optimizers"
            )
        if trainer.strategy.handles_gradient_accumulation:
            raise RuntimeError(
                f"{type(trainer.strategy).__name__} makes the update by itself, so SAM cannot place its second pass "
                "before it: use another strategy, such as 'ddp'"
            )
        if pl_module.automatic_optimization and _takes(pl_module.training_step, "dataloader_iter", explicit=True):
            raise RuntimeError(
                "training_step(dataloader_iter) draws its own batches, so the second pass would see others: "
                "write training_step(batch, batch_idx)"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for sam in found:
            if scaler is not None:
                sam.attach_scaler(scaler)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remember the micro-batch."""
        sam = self._sam(trainer, pl_module)
        if sam is None:
            return
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._replay.clear()
            self._loss = None
            sam._abandon()  # a scaler may have left out the step before, which then waits for nobody
            sam._guard.forget_start()
            sam._guard.saw(trainer.model)  # buffers of the module itself, and what sums gradients over ranks
        self._differentiated = self._stepped = False
        if sam._method.ranks.local and not sam._method.one_pass:
            self._apart.enter_context(trainer.strategy.block_backward_sync())
        self._replay.add(sam, partial(self._again, trainer, pl_module, batch, batch_idx))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Note that ``training_step`` returned a loss."""
        self._differentiated = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Make the second pass."""
        self._apart.close()
        sam = self._sam(trainer, pl_module)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if sam is None or (scaler is not None and not self._differentiated):  # the latter is no step for Lightning
            return
        apart = getattr(trainer.strategy, "block_backward_sync", nullcontext)
        self._perturbed_loss = None
        with torch.enable_grad(), _no_trace(trainer, pl_module):
            self._replay.second_pass(sam, apart)
        sam.last._perturbed_loss = self._perturbed_loss
        if scaler is not None:
            scaler.unscale_(sam)  # Lightning has left it to the optimizer, and clips next
        self._stepped = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Complete the record of the step, and log the sharpness."""
        self._apart.close()
        sam = self._sam(trainer, pl_module)
        if sam is None:
            return
        if outputs:
            self._loss = outputs["loss"] if self._loss is None else self._loss + outputs["loss"]
        if not self._stepped:
            return
        last, every = sam.last, trainer.log_every_n_steps
        last._loss = self._loss
        if not self._log_sharpness or self._loss is None or self._perturbed_loss is None:
            return
        if every and trainer.global_step % every == 0:
            pl_module.log("sharpness", self._perturbed_loss - self._loss, on_step=True, on_epoch=False)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let gradients be summed again."""
        self._apart.close()
        self._replay.clear()

    def _sam(self, trainer: Any, pl_module: Any) -> SAM | None:
        return find_sam(trainer.optimizers[0]) if pl_module.automatic_optimization and trainer.optimizers else None

    def _again(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Run a micro-batch as Lightning does, in the same share."""
        indexed = _takes(pl_module.training_step, "batch_idx", min_args=2)
        output = trainer.strategy.training_step(*((batch, batch_idx) if indexed else (batch,)))
        loss = output["loss"] if isinstance(output, Mapping) else output
        if loss is None:
            return
        loss = loss / trainer.accumulate_grad_batches
        trainer.strategy.backward(loss, trainer.optimizers[0])
        loss = loss.detach()
        self._perturbed_loss = loss if self._perturbed_loss is None else self._perturbed_loss + loss
