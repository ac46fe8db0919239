"""Flat-LoRA (Li et al., ICML 2025, arXiv 2409.14396): noise on the merged weights while only adapters learn.

A flat minimum of the adapters alone need not be flat for the weights that are used, ``W' = W + s B A``. So the frozen W
of every adapted layer moves by Gaussian noise for the one pass of a step, ``eps_ij = rho ||W'_i|| / sqrt(n) xi_ij``,
with the norm of row i of W' and its number n of elements, and comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from flatwise.directions import Direction
from flatwise.memory import Memory
from flatwise.norms import COARSE
from flatwise.schedule import StepNoise
from flatwise.shards import is_sharded
from flatwise.weights import Piece

NO_LAYERS = """flat-lora moves the frozen weights below adapters, and this model has none: pass model=model, made by \
peft.get_peft_model (a layer with get_base_layer() and get_delta_weight(adapter)); without adapters use random"""


@dataclass
class Adapted:
    """A layer with an adapter.

    Attributes:
        layer: the module, as the library peft makes it.
        weight: the frozen weight below.
        params: what of the adapter learns.
    """

    layer: Any
    weight: Tensor
    params: Sequence[Tensor]

    def rows(self) -> Tensor:
        """Return the norm of each row of the merged weight over the root of its size; broadcasts to the weight."""
        merged = self.weight.detach().float() if self.weight.dtype in COARSE else self.weight.detach().clone()
        for adapter in self.layer.active_adapters:
            merged += self.layer.get_delta_weight(adapter).to(merged)
        # Some layers keep the transposed matrix.
        dims = (0,) if getattr(self.layer, "fan_in_fan_out", False) else tuple(range(1, merged.dim()))
        size = merged.numel() // merged.shape[1 if dims == (0,) else 0]
        norms: Tensor = torch.linalg.vector_norm(merged, dim=dims, keepdim=True) / size**0.5
        return norms


@dataclass(frozen=True)
class MergedNoise(Direction):
    """Gaussian noise on the weights below adapters, scaled by the rows of the merged weights: Flat-LoRA.

    The noise is a function of ``noise_seed`` and the step, as in :class:`flatwise.Noise`. During a pass, the frozen
    weights that have adapters are there twice, in their own dtype.

    Attributes:
        noise_seed: seed of the noise.
        layers: what was found in the model; filled in by the optimizer.
    """

    noise_seed: int = 0
    layers: tuple[Adapted, ...] = field(default=(), repr=False, compare=False)
    uses_gradient: ClassVar[bool] = False
    streams: ClassVar[bool] = True

    def check_ball(self, *, normalised: bool, adaptive: bool) -> None:  # noqa: D102
        if normalised or adaptive:
            raise ValueError("the noise of flat-lora has its own length: leave normalised at False and adaptive out")

    def bound(self, model: Module | None) -> MergedNoise:  # noqa: D102
        found = []
        modules: Iterable[Any] = () if model is None else model.modules()
        for layer in modules:
            if not (hasattr(layer, "get_delta_weight") and hasattr(layer, "get_base_layer")):
                continue
            weight = layer.get_base_layer().weight
            learns = [p for p in layer.parameters() if p.requires_grad and p is not weight]
            if not learns:
                continue
            if is_sharded(weight):
                raise ValueError("flat-lora needs whole weights, and some are cut by fully_shard or tensor parallelism")
            if not weight.is_floating_point():
                raise ValueError(
                    f"flat-lora moves the weights below adapters, and these are quantized ({weight.dtype}): "
                    "load them in bfloat16 or float32"
                )
            found.append(Adapted(layer, weight, learns))
        if not found:
            raise ValueError(NO_LAYERS)
        return replace(self, layers=tuple(found))

    @torch.no_grad()
    def offer(  # noqa: D102
        self, params: Sequence[Tensor], memory: Memory, base: Optimizer, step: int, part: int
    ) -> Iterator[Piece]:
        draws, known = StepNoise(self.noise_seed, step, part), set(params)
        for adapted in self.layers:
            owner = next((param for param in adapted.params if param in known), None)
            if owner is None:
                continue
            if getattr(adapted.layer, "merged", False):
                raise RuntimeError("an adapter is merged into its layer and cannot learn: call model.unmerge_adapter()")
            weight = adapted.weight.detach()
            dtype, device = torch.float32 if weight.dtype in COARSE else weight.dtype, weight.device
            noise = torch.randn(weight.shape, generator=draws.generator(device), dtype=dtype, device=device)
            noise *= adapted.rows()
            yield Piece(weight, noise.to(weight.dtype), owner, noise)
