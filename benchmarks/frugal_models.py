"""A small vision transformer for ``frugal.py``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyViT(nn.Module):
    """Patches of 7 × 7 pixels, three layers of width 48, the mean of the places; without dropout.

    Args:
        side: height and width of the images, which have one channel.
        classes: number of classes.
        width: of the layers.
        depth: number of layers.
    """

    def __init__(self, side: int, classes: int, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.places = nn.Parameter(0.02 * torch.randn((side // 7) ** 2, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.patches(images).flatten(2).transpose(1, 2) + self.places
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden.mean(1)))
