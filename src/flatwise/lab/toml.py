"""TOML files of the package and of the user, read with what this Python has."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from flatwise.errors import UserError


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file.

    Args:
        path: where it is.

    Returns:
        Its content.

    Raises:
        UserError: it is not there, cannot be read, or is no TOML; or Python 3.10 lacks ``tomli``.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise UserError("recipes need pip install 'flatwise[lab]' (Python 3.10 has no tomllib)") from error
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return content
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is no TOML: {' '.join(str(error).split())}") from error
