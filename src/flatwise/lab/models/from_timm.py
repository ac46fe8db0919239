"""Networks of timm by name, with new weights or pretrained ones. timm is imported where it is used."""

from __future__ import annotations

import difflib
from types import ModuleType
from typing import Any

from torch import nn

from flatwise.errors import UnknownNameError, UserError, nearest
from flatwise.lab.models.initial import authors_head
from flatwise.lab.models.names import OWN, Shape

# timm's names have the size of patch and image in them.
SHORT = {
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "mixer_b16": "mixer_b16_224",
}

TIMM = (
    "resnet50",
    "resnet101",
    "resnet152",
    *(f"tf_efficientnet_b{size}" for size in range(8)),
    "tf_efficientnet_l2",
    *SHORT,
)
"""The networks of the papers; any other name of timm will do as well."""

# Dropout before the last layer of an EfficientNet, beside branches that are dropped with 0.2 (Tan & Le, ICML 2019; the
# SAM authors' code). timm's default is no dropout.
_DROPOUT = {"b0": 0.2, "b1": 0.2, "b2": 0.3, "b3": 0.3, "b4": 0.4, "b5": 0.4, "b6": 0.5, "b7": 0.5, "l2": 0.5}


def timm_network(name: str, shape: Shape, classes: int, *, pretrained: bool, keep_head: bool) -> nn.Module:
    """Build a network of timm.

    Args:
        name: timm's, with the tag of its pretrained weights where wanted (``tf_efficientnet_b7.ra_in1k``), or one of
            ``SHORT``.
        shape: channels, height and width of the images.
        classes: number of classes.
        pretrained: begin with timm's weights; they are fetched once, which needs a connection.
        keep_head: keep the pretrained last layer. Otherwise it is new: drawn as in the SAM authors' code for an
            EfficientNet, and as timm does for all others.

    Returns:
        The network, in training mode.

    Raises:
        UserError: timm is not installed, the name has no pretrained weights or they cannot be fetched or do not fit
            the images, or the kept head has another number of classes.
        UnknownNameError: neither the lab nor timm has such a network.
    """
    timm = _timm(name)
    full = SHORT.get(name, name)
    if not timm.is_model(full):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
        known = dict.fromkeys((*OWN, *TIMM, *close))
        raise UnknownNameError("model", name, known)
    config = _weights(timm, full)
    options = _options(full)
    if config.fixed_input_size and tuple(config.input_size[1:]) != tuple(shape[1:]):
        options["img_size"] = shape[1:]
    if not pretrained:
        return _created(timm, full, shape, num_classes=classes, **options)
    if not config.has_weights:
        others = ", ".join(timm.list_pretrained(full.partition(".")[0] + "*")[:3]) or "none of its kind"
        raise UserError(f"timm has no pretrained weights of {name} (it has them of {others}): leave out --pretrained")
    if keep_head and config.num_classes != classes:
        raise UserError(
            f"the pretrained last layer of {name} has {config.num_classes} classes and the data {classes}: "
            "leave out --keep-head"
        )
    network = _created(timm, full, shape, num_classes=config.num_classes, pretrained=True, **options)
    if not keep_head:
        network.reset_classifier(classes)  # type: ignore[operator]
        if "efficientnet" in full:
            authors_head(network.get_classifier())  # type: ignore[operator]
    return network


def _timm(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        if name in TIMM:
            raise UserError(f"{name} is a network of timm: pip install 'flatwise[timm]'") from error
        raise UserError(
            f"model {name!r} is none of flatwise's own{nearest(name, OWN) or '.'} "
            "For those of timm: pip install 'flatwise[timm]'"
        ) from error
    module: ModuleType = timm
    return module


def _weights(timm: Any, name: str) -> Any:
    """Return what timm knows of the weights of a name; they may not exist."""
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag that it does not know
        known = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        raise UnknownNameError("weights", name, known) from error


def _options(name: str) -> dict[str, Any]:
    family, _, size = name.partition(".")[0].rpartition("_")
    if family in ("efficientnet", "tf_efficientnet") and size in _DROPOUT:
        return {"drop_rate": _DROPOUT[size], "drop_path_rate": 0.2}
    return {}


def _created(timm: Any, name: str, shape: Shape, *, pretrained: bool = False, **options: Any) -> nn.Module:
    if not pretrained:
        network: nn.Module = timm.create_model(name, in_chans=shape[0], **options)
        return network
    try:
        network = timm.create_model(name, pretrained=True, in_chans=shape[0], **options)
    except Exception as error:  # of the hub, its transport, the cache, or a state_dict of another shape
        size = "×".join(map(str, shape))
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the pretrained weights of {name} cannot be had for images of {size} ({reason}). "
            "timm fetches them once from the Hugging Face Hub: connect, or copy them into its cache (HF_HOME)"
        ) from error
    return network
