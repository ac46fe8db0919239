"""Subset, validation part and wrong labels: exact, paired, and clean where they must be."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from flatwise.errors import UserError
from flatwise.lab.data import load_data
from flatwise.lab.split import Split, make_split, with_noise
from flatwise.seeds import stream


def split(seed: int = 0, **settings: object) -> Split:
    chosen = {"train_size": None, "validation_share": 0.1, "label_noise": 0.4, **settings}
    return make_split(load_data("digits"), seed, **chosen)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.999])
def test_the_share_of_wrong_labels_is_exact(share: float) -> None:
    labels = torch.arange(1000) % 10
    noisy = with_noise(labels, share, 10, stream(0, "noise"))
    assert int((noisy != labels).sum()) == round(share * 1000)
    assert int(noisy.min()) >= 0
    assert int(noisy.max()) <= 9


def test_each_other_class_is_equally_likely() -> None:
    labels = torch.full((20000,), 3)
    counts = torch.bincount(with_noise(labels, 0.9, 10, stream(1, "noise")), minlength=10)
    others = torch.cat([counts[:3], counts[4:]])
    assert int(counts[3]) == 2000
    assert chisquare(others.numpy()).pvalue > 1e-4


def test_validation_and_test_labels_stay_right() -> None:
    data = load_data("digits")
    noisy, clean = split(), split(label_noise=0.0)
    assert torch.equal(noisy.validation_labels, clean.validation_labels)
    assert torch.equal(noisy.true_labels, clean.labels)
    # Each validation image is in the data set, under the label that it has there.
    for image, label in zip(noisy.validation_inputs[:30], noisy.validation_labels[:30], strict=True):
        same = (data.train_inputs == image).flatten(1).all(1)
        assert int(label) in data.train_labels[same].tolist()


def test_training_and_validation_share_no_image() -> None:
    parts = split()
    assert len(parts.labels) + len(parts.validation_labels) == len(load_data("digits").train_labels)
    both = torch.cat([parts.inputs, parts.validation_inputs]).flatten(1)
    distinct = torch.unique(load_data("digits").train_inputs.flatten(1), dim=0)
    assert len(torch.unique(both, dim=0)) == len(distinct)


def test_the_seed_alone_decides() -> None:
    torch.manual_seed(5)
    first = split(seed=3)
    torch.rand(7)
    second, other = split(seed=3), split(seed=4)
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.labels, other.labels)
    assert not torch.equal(first.inputs, other.inputs)


def test_train_size_counts_the_validation_part() -> None:
    parts = split(train_size=200, validation_share=0.25)
    assert (len(parts.labels), len(parts.validation_labels)) == (150, 50)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"train_size": 5000}, "more than the 1438"), ({"train_size": 2}, "leaves 2 to train on")],
)
def test_sizes_that_do_not_fit(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split(**settings)
