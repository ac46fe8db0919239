"""The training as one would write it down: one loop, the formulas of the settings, torch's own optimizers.

Only the samples (their indices, labels and augmentations have tests of their own) and the second pass (the core has)
are not written again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise.lab.augment import mix, sample_keys
from flatwise.lab.train import TrainConfig
from flatwise.lab.train import network as networks
from flatwise.lab.train.samples import load_samples
from flatwise.norms import joint_norm
from flatwise.seeds import derive, stream


def rate(config: TrainConfig, step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return config.lr * step / warmup
    share = (step - warmup) / (total - warmup)
    if config.schedule == "step":
        return config.lr * math.prod(config.gamma for part in config.fall if step >= part * total)
    shapes = {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share, "constant": 1.0}
    return config.lr * shapes[config.schedule]


def base_of(config: TrainConfig, weights: list[Tensor]) -> torch.optim.Optimizer:
    decay = 0.0 if config.decay_in_loss else config.weight_decay
    large, small = [w for w in weights if w.dim() > 1], [w for w in weights if w.dim() == 1]
    groups: list[Any] = [{"params": weights, "weight_decay": decay}]
    if config.decay == "matrices":
        groups = [{"params": large, "weight_decay": decay}, {"params": small, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=config.momentum, nesterov=config.nesterov)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=1.0)
    return torch.optim.RMSprop(groups, lr=1.0, momentum=config.momentum, alpha=0.9, eps=1e-3)


def clip(weights: list[Tensor], largest: float) -> None:
    # With the core's norm, whose sum may differ from torch's in the last digit; it has tests of its own.
    grads = [w.grad for w in weights if w.grad is not None]
    factor = torch.clamp(largest / (joint_norm(grads) + 1e-6), max=1.0)
    for grad in grads:
        grad.mul_(factor)


def by_hand(config: TrainConfig, variant: str | None = None, **options: Any) -> tuple[dict[str, Tensor], list[float]]:
    """Train; ``variant`` with options is the core's, None the base alone. Returns the state, and each step's loss."""
    samples, seed = load_samples(config), config.seed
    model: nn.Module = networks.build_model(config.model, samples.shape, samples.classes, derive(seed, "weights"))
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    weights = list(model.parameters())
    base = base_of(config, weights)
    optimizer = None if variant is None else flatwise.create(variant, base, model=model, **options)
    if config.clip:
        base.register_step_pre_hook(lambda *_: clip(weights, config.clip))
    size = min(config.batch_size, len(samples.training))
    per_epoch = len(samples.training) // size
    total = config.steps or config.epochs * per_epoch
    warmup = round(config.warmup * per_epoch)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for step in range(total):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(samples.training), generator=stream(seed, "order", epoch))
        positions = order[place * size : (place + 1) * size]
        indices = samples.training[positions]
        images = samples.pipeline(samples.images.train.batch(indices), sample_keys(seed, epoch, indices))
        labels = samples.labels[positions]
        if config.mixup or config.cutmix:
            key = derive(seed, "mix", step)
            images, labels = mix(images, labels, samples.classes, mixup=config.mixup, cutmix=config.cutmix, key=key)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        for group in base.param_groups:
            group["lr"] = rate(config, step, warmup, total)
        model.train()
        if config.freeze_norm:
            for module in model.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    module.eval()

        def loss_fn(batch: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                logits = model(batch[0])
            loss = F.cross_entropy(logits.float(), batch[1], label_smoothing=config.label_smoothing)
            if config.decay_in_loss:
                chosen = [w for w in weights if config.decay == "all" or w.dim() > 1]
                loss = loss + 0.5 * config.weight_decay * torch.stack([(w**2).sum() for w in chosen]).sum()
            return loss

        torch.manual_seed(derive(seed, "dropout", step))
        parts = list(zip(torch.tensor_split(images, config.accumulate), torch.tensor_split(labels, config.accumulate),
                         strict=True))  # fmt: skip

        def closure(parts: Any = parts) -> Tensor:
            base.zero_grad()
            terms = []
            for part in parts:
                terms.append(loss_fn(part) * (len(part[0]) / size))
                terms[-1].backward()
            return sum(term.detach() for term in terms)

        if optimizer is None:
            losses.append(float(closure()))
            base.step()
        elif config.accumulate > 1:
            losses.append(float(optimizer.step(closure)))
        else:
            losses.append(float(optimizer.step(loss_fn, (images, labels))))
        if config.ema:
            kept = min(config.ema, (1 + step) / (10 + step))
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    average[name].lerp_(value, 1 - kept)
                else:
                    average[name].copy_(value)
    return (average if config.ema else {n: v.clone() for n, v in model.state_dict().items()}), losses
