"""What a training is: one frozen dataclass is the flags, a recipe's fields and the Python call."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.config import flag

# These change where and how fast a training runs, or what is kept of it, never a number in it.
NOT_PART_OF_THE_RESULT = frozenset(
    {"data_root", "keep_epochs", "checkpoint_minutes", "tracker", "loader_workers", "out", "fresh", "quiet"}
)
AUGMENTATIONS = ("basic", "cutout", "autoaugment", "randaugment", "inception")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training.

    Attributes:
        dataset: its name, or the path of a folder with one folder per class.
        data_root: folder in which to look for the data.
        resolution: side of the images in pixels, where the data set has images of many sizes.
        train_size: training images to use, the held-out part included (default: all).
        val_fraction: part of the training images that is held out; 0 trains on all of them.
        label_noise: exact share of the training labels that are made wrong.
        noise: "symmetric" draws any other class, "asymmetric" takes the next class.
        noise_file: a file with one noisy label per training image, in the format of CIFAR-N; file.pt:key names one.
        labels_from: folder of a finished training, whose predictions replace the training labels (bootstrapping).
        augment: "none", or names joined by "+": basic (mirror, pad and crop), cutout, autoaugment, randaugment,
            inception (crops of random size).
        cutout: side of the square that cutout blanks, in pixels.
        mixup: alpha of mixup; 0 is none.
        cutmix: alpha of CutMix; 0 is none.
        model: the network.
        pretrained: begin with timm's pretrained weights.
        keep_head: keep the pretrained last layer, where the classes are the same.
        freeze_norm: batch normalisation uses its running statistics, and does not change them.
        method: "base" (no SAM), or a method of the family with options, as in sam:p=inf.
        rho: radius, where the method states none itself (default: the method's own).
        m: samples that share one perturbation (default: all that a process has in a step).
        perturbation: in several processes, each has its own ("local", as in the paper) or all share one ("global").
        optimizer: the base optimizer.
        lr: peak learning rate.
        momentum: of sgd and rmsprop.
        nesterov: of sgd.
        weight_decay: of the base optimizer, or in the loss.
        decay: decay "all" weights, or only "matrices" (neither biases nor normalisation).
        decay_in_loss: add half the weight decay times the squared norm to both passes' loss, as the authors' code.
        schedule: how the learning rate falls after the warm-up.
        milestones: shares of the training after which "step" lowers the learning rate.
        gamma: by what "step" multiplies it.
        warmup: epochs in which the learning rate rises linearly from 0.
        epochs: passes over the training data.
        steps: length in steps, instead of epochs.
        batch_size: images in a step, over all processes; the last, smaller batch of an epoch is dropped.
        accumulate: parts into which a process splits its share of a step, to save memory.
        clip: largest norm of the gradient that the base optimizer gets; 0 is no limit.
        label_smoothing: share of each label that is spread over all classes.
        ema: decay per step of an average of the weights, which is then what is evaluated; 0 is none.
        precision: of the passes; weights and optimizer stay float32.
        compile: compile the network.
        channels_last: order of memory of images and convolutions.
        seed: decides weights, split, noise, order, augmentation and dropout.
        evaluate_every: epochs between two evaluations; the last epoch is evaluated in any case.
        keep_epochs: epochs, separated by commas, after which the weights are kept; 0 is the start.
        checkpoint_minutes: longest time between two checkpoints; the end of each epoch writes one too.
        tracker: "none", "tensorboard", "wandb" or "mlflow"; several with commas.
        loader_workers: processes that read images from disk.
        out: folder in which the run's own folder is made, under a name derived from the settings.
        fresh: forget what the folder holds and train again.
        quiet: no progress, only the result.
    """

    dataset: str = "cifar10"
    data_root: str | None = None
    resolution: int | None = None
    train_size: int | None = None
    val_fraction: float = 0.0
    label_noise: float = 0.0
    noise: Literal["symmetric", "asymmetric"] = "symmetric"
    noise_file: str | None = None
    labels_from: str | None = None
    augment: str = "basic"
    cutout: int = 16
    mixup: float = 0.0
    cutmix: float = 0.0
    model: str = "wrn-28-10"
    pretrained: bool = False
    keep_head: bool = False
    freeze_norm: bool = False
    method: str = "sam"
    rho: float | None = None
    m: int | None = None
    perturbation: Literal["local", "global"] = "local"
    optimizer: Literal["sgd", "adamw", "rmsprop"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0005
    decay: Literal["all", "matrices"] = "all"
    decay_in_loss: bool = False
    schedule: Literal["cosine", "step", "linear", "constant"] = "cosine"
    milestones: str = "0.3,0.6,0.8"
    gamma: float = 0.2
    warmup: float = 0.0
    epochs: int = 200
    steps: int | None = None
    batch_size: int = 256
    accumulate: int = 1
    clip: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    channels_last: bool = False
    seed: int = 0
    evaluate_every: int = 1
    keep_epochs: str = ""
    checkpoint_minutes: float = 10.0
    tracker: str = "tensorboard"
    loader_workers: int = 2
    out: str = "runs/train"
    fresh: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant.

        Raises:
            UserError: a number outside its range, or two settings that exclude each other.
            UnknownNameError: an augmentation, or another word, that does not exist.
        """
        for name, hint in get_type_hints(TrainConfig).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise UnknownNameError(name, getattr(self, name), get_args(hint))
        for name in ("epochs", "steps", "batch_size", "accumulate", "train_size", "m", "resolution", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{flag(name)} must be at least 1, not {value}")
        for name in (
            "rho",
            "lr",
            "weight_decay",
            "clip",
            "gamma",
            "warmup",
            "mixup",
            "cutmix",
            "checkpoint_minutes",
            "loader_workers",
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{flag(name)} must be a number of at least 0, not {value}")
        for name in ("label_noise", "val_fraction", "label_smoothing", "ema", "momentum"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"{flag(name)} must be from 0 up to, not including, 1, not {value}")
        for word in self.augmentations:
            if word not in AUGMENTATIONS:
                raise UnknownNameError("augmentation", word, ("none", *AUGMENTATIONS))
        if self.noise_file is not None and self.label_noise:
            raise UserError("--noise-file has the noisy labels: leave out --label-noise")
        if self.mixup and self.cutmix:
            raise UserError("--mixup and --cutmix exclude each other: set one of them to 0")
        if self.keep_head and not self.pretrained:
            raise UserError("--keep-head keeps a pretrained last layer: add --pretrained")
        self.kept_epochs, self.fall  # noqa: B018  -- both are read, and refuse what is no number

    @property
    def augmentations(self) -> tuple[str, ...]:
        """The names in ``augment``, without "none"."""
        return tuple(word.strip() for word in self.augment.split("+") if word.strip() not in ("", "none"))

    @property
    def kept_epochs(self) -> tuple[int, ...]:
        """The epochs after which the weights are kept.

        Raises:
            UserError: one is no whole number.
        """
        found = _numbers("keep_epochs", self.keep_epochs)
        if any(epoch < 0 or epoch % 1 != 0 for epoch in found):
            raise UserError(f"--keep-epochs must be whole numbers of at least 0, not {self.keep_epochs!r}")
        return tuple(int(epoch) for epoch in found)

    @property
    def fall(self) -> tuple[float, ...]:
        """The shares of the training after which "step" lowers the learning rate.

        Raises:
            UserError: one is no share, such as the number of an epoch.
        """
        found = tuple(_numbers("milestones", self.milestones))
        if not all(0 < share < 1 for share in found):
            raise UserError(
                f"--milestones must be shares of the training, between 0 and 1, not {self.milestones!r}: epoch 60 of "
                "200 is 0.3"
            )
        return found

    def identity(self) -> str:
        """Compress everything that decides the numbers into one short word.

        Returns:
            Ten hexadecimal digits, the same for the same settings.
        """
        kept = {name: value for name, value in asdict(self).items() if name not in NOT_PART_OF_THE_RESULT}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:10]

    def folder_name(self) -> str:
        """Name the run's folder.

        Returns:
            Data set, model, method, seed and the identity.
        """
        words = (self.dataset.rstrip("/").rpartition("/")[2], self.model, self.method.partition(":")[0])
        return f"{'-'.join(words)}-seed{self.seed}-{self.identity()}"


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise UserError(f"{flag(name)} must be numbers separated by commas, not {text!r}") from error


def train_config_from(values: dict[str, Any]) -> TrainConfig:
    """Build a configuration from names and values, as a recipe or ``config.json`` holds them.

    Args:
        values: fields by name; the others take their defaults.

    Returns:
        The configuration.

    Raises:
        UnknownNameError: a field that does not exist, with the nearest that does.
    """
    names = [field.name for field in fields(TrainConfig)]
    for name in values:
        if name not in names:
            raise UnknownNameError("field", name, names)
    return TrainConfig(**values)
