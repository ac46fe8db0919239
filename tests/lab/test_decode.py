"""One file to one image: what is broken is named, every kind of image becomes RGB, and the geometry is as stated."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.lab import data_files as files

from flatwise.errors import UserError
from flatwise.lab.augment.inception import crop_boxes
from flatwise.lab.sets.decode import decode


def photograph(width: int = 90, height: int = 70) -> Image.Image:
    small = Image.fromarray(files.random_bytes(7, 9, 3))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def jpeg() -> bytes:
    written = io.BytesIO()
    photograph().save(written, "JPEG")
    return written.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.jpg", jpeg()[:-300], "truncated"),
        ("text.jpg", b"this is no image", "cannot identify image file"),
        ("empty.png", b"", "it is empty"),
        ("header.png", b"\x89PNG\r\n\x1a\n\0\0", "broken image"),
        ("missing.jpg", None, "No such file"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        decode(path, 16, None)
    text = str(caught.value)
    assert text.startswith(f"broken image {path}: ")
    assert text.count(str(path)) == 1
    assert said in text
    assert "\n" not in text


def test_every_cut_of_a_file_is_an_error_or_an_image(tmp_path: Path) -> None:
    whole, path = jpeg(), tmp_path / "cut.jpg"
    for length in range(0, len(whole), 41):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="broken image"):
            decode(path, 16, None)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some damage before it raises
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"])
def test_whatever_bytes_are_changed_only_a_user_error_comes_out(tmp_path: Path, kind: str) -> None:
    written, path = io.BytesIO(), tmp_path / f"changed.{kind.lower()}"
    image = photograph(40, 30)
    (image.quantize(8) if kind == "GIF" else image).save(written, kind)
    broken = 0
    for seed in range(60):
        draws, content = random.Random(seed), bytearray(written.getvalue())
        for _ in range(draws.randint(1, 4)):
            content[draws.randrange(len(content) if seed % 2 else 80)] = draws.randrange(256)
        path.write_bytes(content)
        try:
            assert decode(path, 16, None).shape == (3, 16, 16)
        except UserError as error:
            broken += 1
            assert str(error).startswith(f"broken image {path}: ")  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    assert broken


RED = (255, 0, 0)
KINDS = {
    "gray.png": (Image.new("L", (30, 30), 77), (77, 77, 77)),
    "gray with opacity.png": (Image.new("LA", (30, 30), (77, 10)), (77, 77, 77)),
    "opacity.png": (Image.new("RGBA", (30, 30), (10, 20, 30, 40)), (10, 20, 30)),
    "two colours.png": (Image.new("1", (30, 30), 1), (255, 255, 255)),
    "palette.png": (Image.new("RGB", (30, 30), RED).quantize(4), RED),
    "sixteen bits.png": (Image.fromarray(np.full((30, 30), 77 * 257, dtype=np.uint16)), (77, 77, 77)),
    "photograph.webp": (Image.new("RGB", (30, 30), (40, 40, 40)), (40, 40, 40)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, name: str) -> None:
    image, colour = KINDS[name]
    image.save(tmp_path / name, lossless=True) if name.endswith("webp") else image.save(tmp_path / name)
    for key in (None, 5):
        found = decode(tmp_path / name, 16, key)
        assert found.dtype == torch.uint8
        assert found.shape == (3, 16, 16)
        assert found.amax((1, 2)).tolist() == found.amin((1, 2)).tolist() == list(colour)


def test_a_palette_with_opacities_does_not_warn(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 30), RED).quantize(4)
    image.save(tmp_path / "palette.png", transparency=bytes([200, 0, 0, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "palette.png", 8, None)[:, 4, 4].tolist() == list(RED)


def test_cmyk_is_converted_not_cut(tmp_path: Path) -> None:
    Image.new("CMYK", (30, 30), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    found = decode(tmp_path / "print.jpg", 8, None)
    assert (found[:, 4, 4].int() - torch.tensor(RED)).abs().max() <= 3


@pytest.mark.parametrize(("width", "height"), [(90, 70), (70, 90), (20, 20), (300, 40)])
def test_without_a_key_the_centre_of_the_resized_image(tmp_path: Path, width: int, height: int) -> None:
    image = photograph(width, height)
    image.save(tmp_path / "photograph.png")
    # resolution 28: the shorter side becomes 32, and 2 pixels are cut off at each border of it
    scale = 32 / min(width, height)
    resized = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 28) / 2), round((resized.height - 28) / 2)
    expected = np.asarray(resized.crop((left, top, left + 28, top + 28)))
    assert np.array_equal(decode(tmp_path / "photograph.png", 28, None).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("key", [0, 1, -(2**63), 2**63 - 1])
def test_with_a_key_its_box_resized(tmp_path: Path, key: int) -> None:
    image = photograph()
    image.save(tmp_path / "photograph.png")
    top, left, height, width = crop_boxes(torch.tensor([key]), 70, 90)[:, 0].tolist()
    cut = image.crop((left, top, left + width, top + height))
    expected = np.asarray(cut.resize((24, 24), Image.Resampling.BILINEAR))
    assert np.array_equal(decode(tmp_path / "photograph.png", 24, key).permute(1, 2, 0).numpy(), expected)
