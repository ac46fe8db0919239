"""The pipeline: an image's result depends on its pixels and its key alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.lab.augment.conftest import facts_of, images_of
from torch import Tensor

from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.augment import build_pipeline, normalise, sample_keys
from flatwise.lab.augment.basic import cutout, mirror_and_crop
from flatwise.lab.augment.inception import crop_boxes, resize_boxes
from flatwise.lab.augment.pipeline import NAMES
from flatwise.lab.augment.policy import autoaugment_plans, follow, randaugment_plans
from flatwise.lab.train.config import AUGMENTATIONS

SETS = [
    (), ("basic",), ("basic", "cutout"), ("autoaugment", "cutout"), ("basic", "cutout", "autoaugment"),
    ("basic", "randaugment"), ("inception",), ("inception", "randaugment", "cutout"),
]  # fmt: skip


def test_the_names_are_those_of_the_configuration() -> None:
    assert NAMES == AUGMENTATIONS


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_neither_the_batch_nor_its_order_nor_the_memory_matters(names: tuple[str, ...], channels: int) -> None:
    images, indices = images_of(96, channels), torch.arange(96)
    pipeline = build_pipeline(names, facts_of(channels))
    whole = pipeline(images, sample_keys(4, 2, indices))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipeline(images[order], sample_keys(4, 2, order)), whole[order])
    singles = [pipeline(images[i : i + 1], sample_keys(4, 2, indices[i : i + 1])) for i in range(96)]
    assert torch.equal(torch.cat(singles), whole)
    for other in (images.contiguous(memory_format=torch.channels_last), images.flip(0).flip(0)[::1]):
        assert torch.equal(pipeline(other, sample_keys(4, 2, indices)), whole)
    if names:
        assert not torch.equal(pipeline(images, sample_keys(4, 3, indices)), whole)
        assert not torch.equal(pipeline(images, sample_keys(5, 2, indices)), whole)
    assert whole.dtype == torch.float32
    assert whole.is_contiguous()


HALF = """
import sys, torch
from flatwise.lab.augment import build_pipeline, sample_keys
from tests.lab.augment.conftest import facts_of, images_of
rank, threads = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
mine = torch.arange(rank, 64, 2)
pipeline = build_pipeline(sys.argv[3].split("+"), facts_of(3))
torch.save(pipeline(images_of(64)[mine], sample_keys(0, 9, mine)), sys.argv[4])
"""


@pytest.mark.parametrize("names", ["basic+cutout+autoaugment", "inception+randaugment"])
def test_two_processes_do_what_one_does(names: str, tmp_path: Path) -> None:
    whole = build_pipeline(names.split("+"), facts_of(3))(images_of(64), sample_keys(0, 9, torch.arange(64)))
    for rank in (0, 1):
        path = tmp_path / f"{rank}.pt"
        command = [sys.executable, "-c", HALF, str(rank), str(rank + 1), names, str(path)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[3], timeout=120)
        assert torch.equal(torch.load(path), whole[rank::2])


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_nothing_outside_is_changed(names: tuple[str, ...]) -> None:
    images, keys = images_of(32), sample_keys(0, 0, torch.arange(32))
    before, keys_before, state = images.clone(), keys.clone(), torch.get_rng_state()
    build_pipeline(names, facts_of(3))(images, keys)
    assert torch.equal(images, before)
    assert torch.equal(keys, keys_before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_order_is_crop_policy_mirror_and_shift_normalise_cutout(keys: Tensor) -> None:
    images, facts = images_of(64), facts_of(3)
    small = follow(images, autoaugment_plans(keys, "cifar", 32, 32))
    small = normalise(mirror_and_crop(small, keys, flips=True, padding=4), facts.mean, facts.std)
    names = ("cutout", "autoaugment", "basic")  # in any order
    assert torch.equal(build_pipeline(names, facts, cutout=9)(images, keys), cutout(small, keys, 9))
    large = resize_boxes(images, crop_boxes(keys, 32, 32))
    large = mirror_and_crop(follow(large, randaugment_plans(keys, 32, 32)), keys, flips=True, padding=0)
    assert torch.equal(
        build_pipeline(("inception", "randaugment"), facts)(images, keys), normalise(large, facts.mean, facts.std)
    )


def test_one_augmentation_more_does_not_move_the_draws_of_the_others(keys: Tensor) -> None:
    images = images_of(64)
    plain = build_pipeline(("basic",), facts_of(3))(images, keys)
    more = build_pipeline(("basic", "cutout"), facts_of(3))(images, keys)
    assert torch.equal(more, torch.where(more == 0, 0, plain))


def test_a_set_that_was_cropped_when_it_was_read_is_only_mirrored(keys: Tensor) -> None:
    images, facts = images_of(64), facts_of(3)
    got = build_pipeline(("inception",), facts, cropped=True)(images, keys)
    mirrored = mirror_and_crop(images, keys, flips=True, padding=0)
    assert torch.equal(got, normalise(mirrored, facts.mean, facts.std))


def test_no_augmentation_is_the_evaluations_image(keys: Tensor) -> None:
    pipeline = build_pipeline((), facts_of(3))
    assert torch.equal(pipeline(images_of(64), keys), pipeline.normalise(images_of(64)))


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_is_torchvisions(channels: int) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional", reason="needs flatwise[lab]")
    images, facts = images_of(9, channels), facts_of(channels)
    floats = functional.convert_image_dtype(images, torch.float32)
    expected = functional.normalize(floats, list(facts.mean), list(facts.std))
    assert torch.equal(normalise(images, facts.mean, facts.std), expected)
    assert torch.equal(normalise(images, torch.tensor(facts.mean), torch.tensor(facts.std)), expected)


def test_what_comes_in_at_the_border_is_black_and_what_cutout_blanks_is_the_mean() -> None:
    facts = facts_of(1, flips=False)
    images = torch.full((64, 1, 32, 32), 255, dtype=torch.uint8)
    keys = sample_keys(0, 0, torch.arange(64))
    moved = build_pipeline(("basic",), facts)(images, keys)
    white, black = torch.tensor([(1 - 0.5) / 0.2, -0.5 / 0.2])
    assert torch.equal(torch.unique(moved), torch.stack((black, white)))
    blanked = build_pipeline(("cutout",), facts)(images, keys)
    assert torch.equal(torch.unique(blanked), torch.stack((torch.tensor(0.0), white)))


@pytest.mark.parametrize(
    ("names", "changes", "error", "words"),
    [
        (("basics",), {}, UnknownNameError, "did you mean 'basic'"),
        (("autoaugment",), {"policy": "cifar10"}, UnknownNameError, "did you mean 'cifar'"),
        (("basic", "inception"), {}, UserError, "basic and inception exclude each other"),
        (("randaugment", "autoaugment"), {}, UserError, "autoaugment and randaugment exclude each other"),
        (("cutout",), {"cutout": 0}, UserError, "at least 1 pixel"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    names: tuple[str, ...], changes: dict[str, object], error: type[UserError], words: str
) -> None:
    side = changes.pop("cutout", 16)
    with pytest.raises(error, match=words):
        build_pipeline(names, facts_of(3, **changes), cutout=side)  # type: ignore[arg-type]
