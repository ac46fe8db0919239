"""One step of training, and what a step needs: model, samples, optimizer, learning rate, average.

Whatever a step draws depends on the seed and on the number of the step alone (the order on the epoch, an image's
augmentation on the epoch and the image). So a training that continues at any step needs no saved random state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from flatwise.errors import UserError
from flatwise.lab.augment import mix
from flatwise.lab.train.config import TrainConfig
from flatwise.lab.train.distributed import World
from flatwise.lab.train.ema import Average
from flatwise.lab.train.loss import Batch, Loss
from flatwise.lab.train.network import new_model
from flatwise.lab.train.optimizer import build_optimizer, decayed, parse_train_method
from flatwise.lab.train.samples import Samples
from flatwise.lab.train.schedule import relative_rate
from flatwise.lab.train.tensors import whole
from flatwise.seeds import derive, stream


class Trainer:
    """A model, its samples and its optimizer.

    Args:
        config: the settings.
        samples: what is trained on.
        world: the processes.

    Raises:
        UserError: settings that do not fit the data or the processes.
    """

    def __init__(self, config: TrainConfig, samples: Samples, world: World) -> None:
        self.config, self.samples, self.world = config, samples, world
        self.method = parse_train_method(config)
        self.batch_size = min(config.batch_size, len(samples.training))
        if self.batch_size % world.size:
            raise UserError(f"--batch-size {self.batch_size} cannot be divided among {world.size} processes")
        self.share = self.batch_size // world.size
        if self.share < config.accumulate:
            raise UserError(f"--accumulate {config.accumulate} is more than the {self.share} images of a process")
        m = self.method.options.get("micro_batch_size")
        if m is not None and m > self.share:
            raise UserError(f"--m {m} is more than the {self.share} images that a process has in a step")
        if m is not None and world.size > 1 and not world.local:
            raise UserError("--perturbation global has one perturbation for the whole batch: leave --m out")
        self.steps_per_epoch = len(samples.training) // self.batch_size
        self.total_steps = config.steps or config.epochs * self.steps_per_epoch
        self.warmup_steps = round(config.warmup * self.steps_per_epoch)
        if self.warmup_steps >= self.total_steps:
            raise UserError(f"--warmup {config.warmup:g} epochs leaves none of the {self.total_steps} steps")
        self.module = self._build()
        self.model = world.prepare(self.module)
        self.optimizer = build_optimizer(
            config,
            self.method,
            self.model,
            total_steps=self.total_steps,
            train_size=len(samples.training),
            batch_size=self.share,
            sync_ascent=world.sync_ascent,
            scaler=world.scaler,
        )
        if config.accumulate > 1 and self.method.variant is not None and self._cuts:
            raise UserError(
                f"--accumulate {config.accumulate} with method {self.method.name!r}, which cuts the batch itself: "
                "leave --accumulate out"
            )
        decay = config.weight_decay if config.decay_in_loss else 0.0
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.loss = Loss(self.forward, config.label_smoothing, decayed(config, trained), decay)
        self.loss.reduction = "none" if self.optimizer.wants_sample_losses else "mean"
        self.average = Average(self.module, config.ema) if config.ema else None
        self._positions: dict[int, Tensor] = {}
        self._images: Iterator[Tensor] = iter(())

    def _build(self) -> nn.Module:
        module = new_model(self.config, self.samples).to(self.world.device)
        if self.config.channels_last:
            module.to(memory_format=torch.channels_last)
        if self.config.compile:
            module.compile()
        return module

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Let the network be what is evaluated while the block runs: the average, where there is one.

        Yields:
            Nothing.
        """
        with nullcontext() if self.average is None else self.average.in_place():
            yield

    def whole_state(self) -> dict[str, Tensor]:
        """Gather weights and buffers; every process must call it.

        Returns:
            The state of the network, as copies.
        """
        self.world.spread(list(self.module.buffers()))
        return {name: whole(value).clone() for name, value in self.module.state_dict().items()}

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(weight.numel() for weight in self.module.parameters())

    @property
    def _cuts(self) -> bool:
        batching = getattr(self.optimizer, "_batching", None)
        return batching is None or batching.splits

    @property
    def effective_m(self) -> int:
        """The samples of one perturbation."""
        if self.world.size > 1 and not self.world.local:
            return self.batch_size
        options = self.method.options
        # A method that needs m and is given none has a default, which only its optimizer knows.
        default = getattr(getattr(self.optimizer, "_batching", None), "micro_batch_size", None)
        return min(int(options.get("micro_batch_size") or default or self.share), self.share)

    def forward(self, images: Tensor) -> Tensor:
        """Run the network in the precision of the passes.

        Args:
            images: (images, channels, height, width).

        Returns:
            (images, classes).
        """
        with self.world.accelerator.autocast():
            logits: Tensor = self.model(images)
        return logits

    def begin_epoch(self, step: int) -> None:
        """Put the model into the mode of training, and begin to gather images.

        Args:
            step: the first of this epoch that is still to be made, counted from 0 over the whole training.
        """
        self.model.train()
        if self.config.freeze_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()
        epoch, first = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.samples.training), generator=stream(self.config.seed, "order", epoch))
        last = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
        self._positions = {
            epoch * self.steps_per_epoch + place: self.world.share(
                order[place * self.batch_size : (place + 1) * self.batch_size]
            )
            for place in range(first, last)
        }
        self._images = self.samples.augmented(self.config.seed, epoch, list(self._positions.values()))

    def _batch(self, step: int) -> Batch:
        """Gather this process's share of a step's batch: images, and labels or a probability for each class."""
        images = next(self._images)
        labels = self.samples.labels[self._positions.pop(step)].to(self.world.device)
        if not self._positions:
            self._images = iter(())  # the processes that read images end with the epoch
        if self.config.mixup or self.config.cutmix:
            key = derive(self.config.seed, "mix", step, *self._rank)
            classes, mixup, cutmix = self.samples.classes, self.config.mixup, self.config.cutmix
            images, labels = mix(images, labels, classes, mixup=mixup, cutmix=cutmix, key=key)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    @property
    def _rank(self) -> tuple[int, ...]:
        """What keeps apart the draws of processes; the first one draws what a single process does."""
        return (self.world.rank,) if self.world.rank else ()

    def rate(self, step: int) -> float:
        """Return the learning rate of a step.

        Args:
            step: counted from 0 over the whole training.

        Returns:
            The rate.
        """
        return self.config.lr * relative_rate(self.config, step, self.warmup_steps, self.total_steps)

    def step(self, step: int) -> Tensor:
        """Take the next step of the epoch that was begun.

        Args:
            step: its number, counted from 0 over the whole training.

        Returns:
            The loss at the weights before it, of this process's samples.
        """
        batch = self._batch(step)
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(derive(self.config.seed, "dropout", step, *self._rank))
        loss: Tensor
        if self.config.accumulate == 1:
            loss = self.optimizer.step(self.loss, batch)
        else:
            loss = self.optimizer.step([partial(self._part, part, len(batch[0])) for part in self._parts(batch)])
        if self.world.scaler is not None:
            self.world.scaler.update()
        if self.average is not None:
            self.average.update(step)
        return loss

    def _parts(self, batch: Batch) -> list[Batch]:
        pieces = (torch.tensor_split(tensor, self.config.accumulate) for tensor in batch)
        return list(zip(*pieces, strict=True))

    def _part(self, part: Batch, whole: int) -> Tensor:
        loss = self.loss(part) * (len(part[0]) / whole)
        scaler = self.world.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss.detach()
