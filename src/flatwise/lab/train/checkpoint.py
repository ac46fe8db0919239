"""The file from which a training continues: whole, its own, and never the only one.

A file is a line that says what it is, the SHA-256 of the rest, and the rest, which ``torch.load(weights_only=True)``
reads. Two files take turns, so that whatever happens to the newer one, the older is there.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from flatwise.files import write_atomically

HEAD = b"flatwise training checkpoint 1\n"
DIGITS = 64
DAMAGES = (OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)
"""What torch raises on a damaged file; which of them depends on where the damage is."""


class _Hashed(io.RawIOBase):
    """Passes on what is written, and digests it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


class Checkpoints:
    """The two files of one training.

    Args:
        paths: where they are.
        settings: what the training's numbers depend on; a file with another word must not continue it.
    """

    def __init__(self, paths: tuple[Path, Path], settings: str) -> None:
        self._paths, self._settings = paths, settings
        self._next = 0

    def save(self, content: dict[str, Any]) -> None:
        """Write over the older file; it stays as it was if that fails.

        Args:
            content: of tensors, numbers, strings, lists and dicts; its ``"step"`` tells which file is newer.
        """

        def write(file: BinaryIO) -> None:
            file.write(HEAD + b"0" * DIGITS + b"\n")
            body = _Hashed(file)
            torch.save({**content, "settings": self._settings}, cast("BinaryIO", body))
            file.seek(len(HEAD))
            file.write(body.digest.hexdigest().encode())

        # Both files may be younger than what the disk has by itself: a loss of power must not take the two.
        write_atomically(self._paths[self._next], write, durable=True)
        self._next = 1 - self._next

    def load(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Read the newest file that can be continued.

        Returns:
            Its content or None, and a sentence for each file that is of no use.
        """
        found: dict[int, dict[str, Any]] = {}
        notices = []
        for place, path in enumerate(self._paths):
            if path.exists():
                content, reason = self._read(path)
                if content is not None:
                    found[place] = content
                else:
                    notices.append(f"{path} {reason}")
        if not found:
            after = "; this training starts again from its beginning"
            return None, [notice + after for notice in notices]
        newest = max(found, key=lambda place: int(found[place]["step"]))
        self._next = 1 - newest
        name, step = self._paths[newest].name, found[newest]["step"]
        after = f"; this training goes on from {name}, which is whole (step {step})"
        return found[newest], [notice + after for notice in notices]

    def remove(self) -> None:
        """Remove both files."""
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _read(self, path: Path) -> tuple[dict[str, Any] | None, str]:
        try:
            data = path.read_bytes()
        except OSError as error:
            return None, f"cannot be read ({error.strerror or error})"
        if not data.startswith(HEAD):
            return None, "is no checkpoint of a training"
        start = len(HEAD) + DIGITS + 1
        body = memoryview(data)[start:]
        if hashlib.sha256(body).hexdigest().encode() != data[len(HEAD) : start - 1]:
            return None, "is damaged: it is cut off, or was changed after it was written"
        try:
            content = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        except DAMAGES as error:
            return None, f"cannot be read ({' '.join(str(error).split())[:100]})"
        if not isinstance(content, dict) or content.get("settings") != self._settings:
            return None, "is from a training with other settings, labels or number of processes"
        return content, ""
