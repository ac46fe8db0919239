"""A task of another kind for ``suggest_rho.py``: a small transformer that predicts the next character of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import flatwise
from flatwise.measure import RhoSuggestion, suggest_rho
from flatwise.seeds import derive, stream

CONTEXT, WIDTH, BATCH, STEPS, RATE = 32, 32, 32, 600, 3e-3
Batch = tuple[Tensor, Tensor]


class Transformer(nn.Module):
    """Two causal layers, without dropout."""

    def __init__(self, characters: int, context: int = CONTEXT, width: int = WIDTH) -> None:
        super().__init__()
        self.symbols = nn.Embedding(characters, width)
        self.places = nn.Parameter(0.02 * torch.randn(context, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, characters)
        self.register_buffer("mask", torch.full((context, context), -math.inf).triu(1))

    def forward(self, symbols: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.symbols(symbols) + self.places
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask, is_causal=True)
        return self.head(hidden)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@dataclass(frozen=True)
class Chars:
    """The first 80 % of a text are trained on, the rest is the test; the score is minus its loss in nats."""

    path: Path
    digits: int = 3

    def _parts(self) -> tuple[Tensor, Tensor, int]:
        text = self.path.read_text()
        known = {character: number for number, character in enumerate(sorted(set(text)))}
        numbers = torch.tensor([known[character] for character in text])
        cut = int(0.8 * len(numbers))
        return numbers[:cut], numbers[cut:], len(known)

    def _model(self, seed: int, characters: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "weights"))
            return Transformer(characters)

    def _batches(self, text: Tensor, seed: int) -> Iterator[Batch]:
        places = stream(seed, "order")
        while True:
            starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=places)
            rows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
            yield rows[:, :-1], rows[:, 1:]

    def train(self, method: str | None, rho: Any, seed: int) -> float:
        """Train, and return the score."""
        training, test, characters = self._parts()
        model = self._model(seed, characters)
        base = torch.optim.AdamW(model.parameters(), lr=RATE)
        optimizer = base if method is None else flatwise.create(method, base, rho=rho)
        for step, batch in zip(range(STEPS), self._batches(training, seed), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            if method is None:
                base.zero_grad()
                loss_fn(model, batch).backward()
                base.step()
            else:
                optimizer.step(lambda part: loss_fn(model, part), batch)
        rows = test[: len(test) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
        model.eval()
        with torch.no_grad():
            return -loss_fn(model, (rows[:, :-1], rows[:, 1:])).item()

    def suggest(self, method: str, seed: int) -> RhoSuggestion:
        """Probe the start of the training."""
        training, _, characters = self._parts()
        model = self._model(seed, characters)
        base = torch.optim.AdamW(model.parameters(), lr=RATE)
        return suggest_rho(
            model, loss_fn, self._batches(training, seed), base, total_steps=STEPS, method=method, seed=seed,
            progress=False,
        )  # fmt: skip
