"""The IDX format of the MNIST family: a magic number, the sizes, then bytes."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor

from flatwise.errors import UserError

UNSIGNED_BYTE = 0x08


def find_idx(folder: Path, stem: str) -> Path | None:
    """Find one IDX file, packed or not.

    Args:
        folder: where to look.
        stem: its name without ``.gz``, such as ``"train-images-idx3-ubyte"``.

    Returns:
        Its path, or None.
    """
    for name in (stem, f"{stem}.gz"):
        if (folder / name).is_file():
            return folder / name
    return None


def read_idx(path: Path) -> Tensor:
    """Read one IDX file of unsigned bytes.

    Args:
        path: the file; a name that ends in ``.gz`` is unpacked on the way.

    Returns:
        A uint8 tensor of the shape that the file states.

    Raises:
        UserError: the file is not IDX, holds another type, or is cut off.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != UNSIGNED_BYTE:
        raise UserError(f"{path} is not an IDX file of unsigned bytes")
    dimensions = raw[3]
    start = 4 + 4 * dimensions
    if len(raw) < start:
        raise UserError(f"{path} is cut off inside its header")
    shape = struct.unpack(f">{dimensions}I", raw[4:start])
    values = torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8) if len(raw) > start else torch.empty(0)
    expected = int(torch.tensor(shape, dtype=torch.int64).prod())
    if values.numel() != expected:
        raise UserError(f"{path} holds {values.numel()} values where its header states {expected}")
    return values.reshape(shape).to(torch.uint8)
