"""Augmentation of whole batches of uint8 images on their device; every draw is a function of the image's key."""

from __future__ import annotations

from flatwise.lab.augment.inception import crop_boxes
from flatwise.lab.augment.keys import sample_keys
from flatwise.lab.augment.mixing import mix
from flatwise.lab.augment.pipeline import ImageFacts, Pipeline, build_pipeline, normalise
from flatwise.lab.augment.shift import augment

__all__ = ["ImageFacts", "Pipeline", "augment", "build_pipeline", "crop_boxes", "mix", "normalise", "sample_keys"]
