"""What the networks compute, beside the formulas of their papers written out once more, from the weights alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flatwise.lab.models import build_model

torch.set_num_threads(1)

Weights = dict[str, Tensor]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """Batch norm in evaluation, as its formula."""
    scale = w[f"{name}.weight"] / (w[f"{name}.running_var"] + 1e-5).sqrt()
    shift = w[f"{name}.bias"] - scale * w[f"{name}.running_mean"]
    return x * scale[:, None, None] + shift[:, None, None]


def conv(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    kernel = w[f"{name}.weight"]
    return F.conv2d(x, kernel, w.get(f"{name}.bias"), stride, padding=kernel.shape[-1] // 2)


def head(w: Weights, x: Tensor) -> Tensor:
    return x.flatten(2).mean(2) @ w["head.weight"].T + w["head.bias"]


def blocks(w: Weights) -> list[str]:
    return [f"stages.{i}" for i in sorted({int(name.split(".")[1]) for name in w if name.startswith("stages.")})]


def wide(w: Weights, x: Tensor) -> Tensor:
    """B(3, 3): BN-ReLU-conv, BN-ReLU-conv. One block in each stage, the second and third halve."""
    x = conv(w, "stem", x)
    for name, stride in zip(blocks(w), (1, 2, 2), strict=True):
        o = norm(w, f"{name}.first_norm", x).clamp(min=0)
        h = conv(w, f"{name}.first", o, stride)
        h = conv(w, f"{name}.second", norm(w, f"{name}.second_norm", h).clamp(min=0))
        x = h + (conv(w, f"{name}.shortcut", o, stride) if f"{name}.shortcut.weight" in w else x)
    return head(w, norm(w, "norm", x).clamp(min=0))


def plain(w: Weights, x: Tensor) -> Tensor:
    """The same without batch norm, with biases and a factor for each branch."""
    x = conv(w, "stem", x)
    for name, stride in zip(blocks(w), (1, 2, 2), strict=True):
        o = x.clamp(min=0)
        h = conv(w, f"{name}.second", conv(w, f"{name}.first", o, stride).clamp(min=0)) * w[f"{name}.factor"]
        x = h + (conv(w, f"{name}.shortcut", o, stride) if f"{name}.shortcut.weight" in w else x)
    return head(w, x.clamp(min=0))


def shake_shake(w: Weights, x: Tensor) -> Tensor:
    """ReLU-conv-BN-ReLU-conv-BN twice, half and half; the shortcut's second half sees the image a pixel further."""
    x = norm(w, "stem_norm", conv(w, "stem", x))
    for name, stride in zip(blocks(w), (1, 2, 2), strict=True):
        total = torch.zeros(())
        for branch in ("first", "second"):
            h = norm(w, f"{name}.{branch}.2", conv(w, f"{name}.{branch}.1", x.clamp(min=0), stride))
            total = total + norm(w, f"{name}.{branch}.5", conv(w, f"{name}.{branch}.4", h.clamp(min=0))) / 2
        moved = torch.zeros_like(x)
        moved[:, :, :-1, :-1] = x[:, :, 1:, 1:]
        halves = [
            conv(w, f"{name}.shortcut.straight", x, stride),
            conv(w, f"{name}.shortcut.shifted", moved, stride),
        ]
        x = total + norm(w, f"{name}.shortcut.norm", torch.cat(halves, 1))
    return head(w, x.clamp(min=0))


def pyramid(w: Weights, x: Tensor) -> Tensor:
    """BN-1×1-BN-ReLU-3×3-BN-ReLU-1×1-BN, p times that with ShakeDrop; zeros for the new channels of the shortcut."""
    x = norm(w, "stem_norm", conv(w, "stem", x))
    for number, (name, stride) in enumerate(zip(blocks(w), (1, 2, 2), strict=True), start=1):
        h = conv(w, f"{name}.first", norm(w, f"{name}.first_norm", x))
        h = conv(w, f"{name}.second", norm(w, f"{name}.second_norm", h).clamp(min=0), stride)
        h = norm(w, f"{name}.last_norm", conv(w, f"{name}.third", norm(w, f"{name}.third_norm", h).clamp(min=0)))
        if stride == 2:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        out = (1 - number / 3 * 0.5) * h
        out[:, : x.shape[1]] += x
        x = out
    return head(w, norm(w, "norm", x).clamp(min=0))


CASES: dict[str, Callable[[Weights, Tensor], Tensor]] = {
    "wrn-10-2": wide,
    "wrn-10-1": wide,
    "wrn-10-2-nobn": plain,
    "shakeshake-8-2x6d": shake_shake,
    "pyramidnet-11-9-shakedrop": pyramid,
}


@pytest.mark.parametrize("name", CASES)
def test_a_network_computes_the_formulas_of_its_paper(name: str) -> None:
    model = build_model(name, (3, 8, 8), 10, seed=0).double().eval()
    torch.manual_seed(0)
    weights = model.state_dict()
    for key, value in weights.items():  # nothing at 0 or 1, where a wrong formula could hide
        if value.is_floating_point():
            value.copy_(0.5 + torch.rand_like(value) if "running_var" in key else 0.3 * torch.randn_like(value))
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), CASES[name](weights, images), rtol=1e-9, atol=1e-9)


def test_the_channels_of_a_pyramid_grow_by_alpha() -> None:
    with torch.device("meta"):
        state = build_model("pyramidnet-29-20", (3, 8, 8), 10, seed=0).state_dict()
    widths = [state[f"stages.{i}.first.weight"].shape[0] for i in range(9)]
    assert widths == [18, 20, 22, 24, 27, 29, 31, 33, 36]  # 16 + 20 k / 9, cut
    assert all(state[f"stages.{i}.third.weight"].shape[0] == 4 * width for i, width in enumerate(widths))
