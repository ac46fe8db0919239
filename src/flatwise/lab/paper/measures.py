"""What studies measure of trained weights: sharpness by steps, m-sharpness, and how far two updates agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from flatwise import measure
from flatwise.files import read_json, write_json
from flatwise.lab.paper.trained import Trained, load_trained
from flatwise.lab.train import TrainConfig, train
from flatwise.lab.train.folder import TrainFolder

Values = dict[str, float]
Batch = tuple[Tensor, Tensor]
BATCHES = 8
COMMON_STEPS = 20
"""Steps uphill of the sharpness that all networks of a study are measured with alike."""
COMMON_RHO = 0.05
"""Radius of m-sharpness, for all networks alike."""
SIZES = (1, 4, 16, 64)
MICRO_BATCHES = 64


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the loss that was trained.

    Args:
        model: the network.
        batch: images and labels.

    Returns:
        The mean cross-entropy.
    """
    return functional.cross_entropy(model(batch[0]), batch[1])


def measured(name: str, config: TrainConfig) -> Values | None:
    """Read what was measured of a training.

    Args:
        name: of the measure.
        config: of the training.

    Returns:
        The values, or None where they are still to be measured.
    """
    values = read_json(_file(name, config))
    return values if isinstance(values, dict) else None


def measure_trained(name: str, config: TrainConfig) -> None:
    """Measure a finished training, and leave the values in its folder.

    Args:
        name: of the measure.
        config: of the training.
    """
    write_json(_file(name, config), MEASURES[name](config))


def _file(name: str, config: TrainConfig) -> Path:
    return TrainFolder.of(config).path / f"measured-{name}.json"


def by_steps(config: TrainConfig) -> Values:
    """Measure how far the loss of a batch rises within the ball, by SAM's one step and by more.

    Args:
        config: of the training; ``ascent_steps`` in its method says how many steps it climbed itself.

    Returns:
        Means over batches: by the training's own number of steps, and by a number common to all; nothing for the base,
        which has no radius.
    """
    if config.rho is None:
        return {}
    own = int(config.method.rpartition("ascent_steps=")[2] or 1) if "ascent_steps=" in config.method else 1
    trained = load_trained(config)
    found: dict[int, list[float]] = {own: [], COMMON_STEPS: []}
    for batch in trained.batches(config.batch_size, BATCHES):
        for steps, rises in found.items():
            names = ["one_step"] if steps == 1 else ["n_steps"]
            result = measure.sharpness(
                trained.model, loss_fn, [batch], measures=names, rho=config.rho, steps=steps, eigenvalues=0,
                trace=False, progress=False,
            )  # fmt: skip
            rises.append(result.row(names[0]).value)
    return {"sharpness_own_steps": _mean(found[own]), "sharpness_common_steps": _mean(found[COMMON_STEPS])}


def by_size(config: TrainConfig) -> Values:
    """Measure m-sharpness for several m, and the gap between training and test accuracy.

    Args:
        config: of the training.

    Returns:
        m-sharpness by m, the accuracy on the training images, and the gap.
    """
    trained = load_trained(config)
    result = measure.sharpness(
        trained.model, loss_fn, trained.batches(256, 4), measures=["m_sharpness"], rho=COMMON_RHO, m=SIZES,
        micro_batches=MICRO_BATCHES, eigenvalues=0, trace=False, progress=False,
    )  # fmt: skip
    values = {f"m_sharpness_{m}": result.row(f"m_sharpness_{m}").value for m in SIZES}
    with torch.no_grad():
        logits = torch.cat([trained.model(part) for part in torch.split(trained.inputs, 512)])
    accuracy = float((logits.argmax(dim=1) == trained.labels).double().mean())
    test = read_json(TrainFolder.of(config).result)["test_accuracy"]
    return {**values, "train_accuracy": accuracy, "gap": accuracy - test}


def by_epoch(config: TrainConfig) -> Values:
    """Measure the cosine between SAM's update and the one with the second-order term, over training.

    Args:
        config: of the training, which kept its weights after several epochs.

    Returns:
        The cosine after each kept epoch, the mean over those of the first half, and that at the end; nothing for the
        base, which has no radius.
    """
    rho = config.rho
    if rho is None:
        return {}
    _keep_weights(config)
    cosines = {}
    for epoch in (*config.kept_epochs, config.epochs):
        trained = load_trained(config, None if epoch == config.epochs else epoch)
        batches = trained.batches(config.batch_size, BATCHES)
        cosines[epoch] = _mean([cosine_of_updates(trained.model, batch, rho) for batch in batches])
    first_half = [value for epoch, value in cosines.items() if 0 < epoch <= config.epochs / 2]
    summary = {"cosine_first_half": _mean(first_half), "cosine_end": cosines[config.epochs]}
    return {**{f"cosine_{epoch}": value for epoch, value in cosines.items()}, **summary}


def by_spectrum(config: TrainConfig) -> Values:
    """Measure the largest eigenvalue of the Hessian and its ratio to the fifth, over training.

    Args:
        config: of the training, which kept its weights after several epochs.

    Returns:
        Both after each kept epoch, on eight batches of training images.
    """
    _keep_weights(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = {}
    for epoch in config.kept_epochs:
        trained = load_trained(config, epoch)
        batches = [(x.to(device), y.to(device)) for x, y in trained.batches(config.batch_size, BATCHES)]
        found = measure.hessian_eigenvalues(
            trained.model.to(device), loss_fn, batches, 5, which="largest", progress=False
        ).values
        values[f"largest_{epoch}"] = float(found[0])
        values[f"ratio_{epoch}"] = float(found[0] / found[4])
    return values


def _keep_weights(config: TrainConfig) -> None:
    """Train again, to the same bits, where the first time no weights were kept between the epochs."""
    folder = TrainFolder.of(config)
    if not all(folder.kept_weights(epoch).exists() for epoch in config.kept_epochs):
        train(replace(config, fresh=True))


def cosine_of_updates(model: nn.Module, batch: Batch, rho: float) -> float:
    """Compare SAM's update with the one that keeps the term which SAM drops (Foret et al., section 3 and C.4).

    With ``eps(w) = rho g / ||g||``, SAM steps with ``g' = grad L(w + eps)``, and the whole derivative of
    ``L(w + eps(w))`` is ``g' + (d eps / d w)^T g'``.

    Args:
        model: at w, in evaluation mode.
        batch: one.
        rho: radius.

    Returns:
        The cosine between the two, over all weights together.
    """
    names, weights = zip(*model.named_parameters(), strict=True)
    inputs, labels = batch

    def gradients(values: tuple[Tensor, ...], *, again: bool) -> tuple[Tensor, ...]:
        outputs = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (inputs,))
        return torch.autograd.grad(functional.cross_entropy(outputs, labels), values, create_graph=again)

    g = gradients(weights, again=True)
    norm = torch.sqrt(sum((part.square().sum() for part in g), start=torch.zeros(())))
    eps = tuple(rho * part / norm for part in g)
    moved = tuple((w + e).detach().requires_grad_() for w, e in zip(weights, eps, strict=True))
    first = gradients(moved, again=False)
    term = torch.autograd.grad(eps, weights, grad_outputs=first)
    one, other = _flat(first), _flat(first) + _flat(term)
    return float(torch.dot(one, other) / (one.norm() * other.norm()))


def _flat(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.detach().double().flatten() for part in parts])


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


MEASURES: Mapping[str, Callable[[TrainConfig], Values]] = {
    "by-steps": by_steps,
    "by-size": by_size,
    "by-epoch": by_epoch,
    "by-spectrum": by_spectrum,
}

__all__ = ["MEASURES", "Trained", "cosine_of_updates", "measure_trained", "measured"]
