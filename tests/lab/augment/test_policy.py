"""AutoAugment and RandAugment: how often each thing is drawn, and that each image gets its own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tests.lab.augment.conftest import images_of
from torch import Tensor

from flatwise.lab.augment import sample_keys
from flatwise.lab.augment.keys import below
from flatwise.lab.augment.operations import Operation, operation, perform
from flatwise.lab.augment.policies import POLICIES
from flatwise.lab.augment.policy import (
    RAND_LEVEL,
    RAND_LEVELS,
    RAND_OPERATIONS,
    SUB_POLICY,
    WITHOUT_STRENGTH,
    autoaugment_plans,
    follow,
    randaugment_plans,
)

COUNT = 50_000


@pytest.fixture(scope="module")
def many() -> Tensor:
    return sample_keys(2, 1, torch.arange(COUNT))


def near(seen: int, share: float, of: int) -> bool:
    return abs(seen - share * of) <= 5 * (share * (1 - share) * of) ** 0.5


@pytest.mark.parametrize("policy", list(POLICIES))
def test_sub_policies_steps_and_signs_come_as_often_as_they_should(policy: str, many: Tensor) -> None:
    table = POLICIES[policy]
    plans = autoaugment_plans(many, policy, 32, 32)
    chosen = below(many, SUB_POLICY, len(table)).tolist()
    counts = Counter(chosen)
    assert set(counts) == set(range(25))
    assert all(near(count, 1 / 25, COUNT) for count in counts.values())
    for step, plan in enumerate(plans):
        for number in range(25):
            name, probability, level = table[number][step]
            mine = [one for one, sub in zip(plan, chosen, strict=True) if sub == number]
            done = [one for one in mine if one is not None]
            assert near(len(done), probability, len(mine))
            ways = Counter(done)
            expected = {operation(name, level, 10, 32, 32, negative) for negative in (False, True)}
            assert set(ways) <= expected
            if len(expected) == 2 and done:
                assert all(near(ways[one], 0.5, len(done)) for one in expected)


def test_the_two_steps_are_drawn_independently(many: Tensor) -> None:
    first, second = autoaugment_plans(many, "imagenet", 32, 32)
    chosen = below(many, SUB_POLICY, 25).tolist()
    mine = [(one is not None, two is not None) for one, two, sub in zip(first, second, chosen, strict=True) if sub == 0]
    assert near(mine.count((True, True)), 0.4 * 0.6, len(mine))
    assert near(mine.count((False, False)), 0.6 * 0.4, len(mine))


def test_randaugment_draws_two_of_fourteen_with_repetition(many: Tensor) -> None:
    first, second = randaugment_plans(many, 32, 32)
    pairs = Counter((one and one.name, two and two.name) for one, two in zip(first, second, strict=True))
    assert len(pairs) == 14 * 14
    assert all(near(count, 1 / 196, COUNT) for count in pairs.values())
    assert {one for one in first if one is not None} == {
        operation(name, None if name in WITHOUT_STRENGTH else RAND_LEVEL, RAND_LEVELS, 32, 32, negative)
        for name in RAND_OPERATIONS[1:]
        for negative in (False, True)
    }
    shears = Counter(one.strength for one in first if one is not None and one.name == "ShearX")
    assert all(near(count, 0.5, shears.total()) for count in shears.values())
    assert max(shears) == pytest.approx(0.9 * 0.3)  # level 9 of 10


@pytest.mark.parametrize("channels", [1, 3])
def test_following_the_plans_in_groups_is_following_them_one_image_at_a_time(channels: int) -> None:
    images = images_of(96, channels)
    before = images.clone()
    keys = sample_keys(0, 0, torch.arange(96))
    plans = autoaugment_plans(keys, "cifar", 32, 32) + randaugment_plans(keys, 32, 32)
    got = follow(images, plans)
    for place in range(96):
        expected = images[place : place + 1]
        for plan in plans:
            one = plan[place]
            expected = expected if one is None else perform(expected, one)
        assert torch.equal(got[place], expected[0])
    assert torch.equal(images, before)


def test_images_that_share_an_operation_go_through_one_call() -> None:
    calls = []

    def counted(images: Tensor, one: Operation) -> Tensor:
        calls.append((len(images), one))
        return images

    invert, turn = Operation("Invert", 0.0), Operation("Rotate", 3.0)
    follow(images_of(5), [[invert, None, turn, invert, invert], [None] * 5], counted)
    assert sorted(calls) == [(1, turn), (3, invert)]
