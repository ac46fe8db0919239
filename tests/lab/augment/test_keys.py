"""Keys and draws: known answers, a loop over Python's whole numbers, and what makes them good random numbers."""

from __future__ import annotations

import math

import pytest
import torch

from flatwise.lab.augment.keys import below, bits, sample_keys, scramble, uniform
from flatwise.seeds import derive

# The first outputs of SplitMix64 from the state 1234567, as published with its reference code.
PUBLISHED = (
    6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
)  # fmt: skip
WHOLE = 1 << 64


def splitmix(state: int) -> int:
    z = state % WHOLE
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WHOLE
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WHOLE
    return z ^ (z >> 31)


def signed(value: int) -> int:
    return value - WHOLE if value >= WHOLE // 2 else value


def test_the_draws_of_a_key_are_the_outputs_of_splitmix64() -> None:
    drawn = bits(torch.tensor([1234567]), torch.arange(5))[:, 0].tolist()
    assert [value % WHOLE for value in drawn] == list(PUBLISHED)


def test_scramble_equals_whole_number_arithmetic() -> None:
    values = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=torch.Generator().manual_seed(0))
    assert scramble(values).tolist() == [signed(splitmix(value)) for value in values.tolist()]


def test_a_sample_key_is_a_hash_of_seed_epoch_and_index() -> None:
    start = derive(3, "augmentation", 7)
    expected = [signed(splitmix(splitmix(index * 0x9E3779B97F4A7C15) ^ start)) for index in range(20)]
    assert sample_keys(3, 7, torch.arange(20)).tolist() == expected


def test_no_two_keys_are_alike() -> None:
    keys = torch.cat([sample_keys(s, e, torch.arange(50_000)) for s in (0, 1) for e in (0, 1, 2)])
    assert len(torch.unique(keys)) == len(keys)


def test_an_index_has_the_same_key_in_any_batch() -> None:
    indices = torch.tensor([5, 90, 17])
    assert torch.equal(sample_keys(0, 1, torch.arange(100))[indices], sample_keys(0, 1, indices))


def test_uniform_and_below_read_the_high_bits() -> None:
    keys = sample_keys(0, 0, torch.arange(50))
    raw = [[value % WHOLE for value in row] for row in bits(keys, torch.tensor([4, 9])).tolist()]
    assert uniform(keys, 4, 9).tolist() == [[(value >> 11) / 2**53 for value in row] for row in raw]
    assert below(keys, 4, 9).tolist() == [(value >> 32) * 9 >> 32 for value in raw[0]]
    bounds = torch.arange(1, 51)
    assert below(keys, 9, bounds).tolist() == [(v >> 32) * b >> 32 for v, b in zip(raw[1], range(1, 51), strict=True)]


@pytest.mark.parametrize("draw", [0, 1, 34, 1000])
def test_a_draw_is_even_over_its_range(draw: int) -> None:
    count, cells = 100_000, 250
    keys = sample_keys(11, 3, torch.arange(count))
    for cell in (below(keys, draw, cells), (uniform(keys, draw)[0] * cells).to(torch.int64)):
        expected = count / cells
        chi = float(((torch.bincount(cell, minlength=cells) - expected) ** 2 / expected).sum())
        # chi square with 249 degrees of freedom: 249 +- 22; five deviations
        assert abs(chi - (cells - 1)) < 5 * math.sqrt(2 * (cells - 1))


def test_draws_keys_epochs_and_seeds_are_independent() -> None:
    count = 100_000
    indices = torch.arange(count)
    here = sample_keys(0, 0, indices)
    columns = [
        uniform(here, 0)[0], uniform(here, 1)[0], uniform(here, 2)[0],
        uniform(here, 0)[0].roll(1), uniform(here, 0)[0].roll(32),
        uniform(sample_keys(0, 1, indices), 0)[0], uniform(sample_keys(1, 0, indices), 0)[0],
    ]  # fmt: skip
    table = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert float(table.abs().max()) < 5 / math.sqrt(count)
    # and not only uncorrelated: pairs of neighbouring draws fill the square evenly
    cells = below(here, 0, 16) * 16 + below(here, 1, 16)
    chi = float(((torch.bincount(cells, minlength=256) - count / 256) ** 2 / (count / 256)).sum())
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


def test_each_bit_of_the_key_turns_half_the_bits_of_a_draw() -> None:
    keys = sample_keys(0, 0, torch.arange(2000))
    places = torch.arange(64)
    before = bits(keys, torch.tensor([0]))[0]
    for place in range(64):
        after = bits(keys ^ (1 << place if place < 63 else -(2**63)), torch.tensor([0]))[0]
        turned = (((before ^ after)[:, None] >> places) & 1).to(torch.float64).mean(0)
        # 0.5 +- 0.011; the largest of 64 x 64 stays within five deviations
        assert float((turned - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(2000)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_draws_the_same() -> None:
    indices = torch.arange(1000)
    there = sample_keys(5, 6, indices.cuda())
    assert torch.equal(there.cpu(), sample_keys(5, 6, indices))
    assert torch.equal(uniform(there, 3, 4).cpu(), uniform(there.cpu(), 3, 4))
