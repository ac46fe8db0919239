"""The five models on which ``step_cost.py`` measures, each with one fixed batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Task:
    """A model with a batch.

    Attributes:
        model: the module, in training mode.
        batch: inputs and labels.
    """

    model: nn.Module
    batch: tuple[Tensor, Tensor]

    @property
    def params(self) -> list[Tensor]:
        """The parameters as a list."""
        return list(self.model.parameters())

    def double(self) -> Task:
        """Turn model and inputs into float64."""
        inputs, labels = self.batch
        self.batch = (inputs.double() if inputs.is_floating_point() else inputs, labels)
        self.model.double()
        return self

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean loss of a batch."""
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    def loss_again(self) -> Tensor:
        """Return the mean loss of the task's batch."""
        return self.loss(self.batch)


def _mlp() -> Task:
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return Task(model, (torch.randn(128, 784), torch.randint(10, (128,))))


def _deep() -> Task:
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()) for _ in range(40)]
    return Task(nn.Sequential(*blocks, nn.Linear(64, 10)), (torch.randn(32, 64), torch.randint(10, (32,))))


def _resnet(size: int = 64, batch: int = 16) -> Task:
    from torchvision.models import resnet18

    return Task(resnet18(num_classes=10), (torch.randn(batch, 3, size, size), torch.randint(10, (batch,))))


def _vit() -> Task:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=64, patch_size=8, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10
    )
    nn.init.normal_(model.heads[-1].weight, std=0.02)  # torchvision starts it at zero: nothing to learn from
    return Task(model, (torch.randn(8, 3, 64, 64), torch.randint(10, (8,))))


def _embedding() -> Task:
    model = nn.Sequential(nn.EmbeddingBag(50_000, 256, mode="mean"), nn.Linear(256, 10))
    return Task(model, (torch.randint(50_000, (32, 20)), torch.randint(10, (32,))))


MODELS: dict[str, tuple[str, Callable[[], Task]]] = {
    "mlp": ("MLP 784-256-256-10, batch 128", _mlp),
    "deep": ("40 × Linear-LayerNorm-ReLU of width 64, batch 32", _deep),
    "resnet18": ("ResNet-18, 64×64, batch 16", _resnet),
    "vit": ("ViT-Tiny (192, 12 layers, 3 heads, patch 8), 64×64, batch 8", _vit),
    "embedding": ("EmbeddingBag 50,000 × 256 (dense gradient) + Linear, batch 32", _embedding),
}

# Asked for by name only: a gradient takes seconds.
LARGE: dict[str, tuple[str, Callable[[], Task]]] = {
    "resnet18-224": ("ResNet-18, 224×224, batch 32", lambda: _resnet(224, 32)),
}


def make_task(name: str, seed: int = 0) -> Task:
    """Make a model and its batch from a seed.

    Args:
        name: a key of ``MODELS`` or ``LARGE``.
        seed: of weights and batch.

    Returns:
        The task.
    """
    torch.manual_seed(seed)
    return {**MODELS, **LARGE}[name][1]()
