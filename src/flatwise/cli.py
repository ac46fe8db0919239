"""The command ``flatwise``: a table of commands, each of which parses, calls and prints."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from flatwise.commands import SUMMARIES
from flatwise.commands.flags import field_helps, parse_flags

__all__ = ["field_helps", "main", "parse"]

INTERRUPTED = 130
BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the words after ``flatwise``; None reads them from the command line.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a mistake in the command, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name with an umlaut must not stop an ASCII terminal
    try:
        import jsonargparse  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        print(f"flatwise: error: the command line needs pip install 'flatwise[lab]' ({error})", file=sys.stderr)
        return 1
    from flatwise.errors import UserError

    try:
        settings = parse(words)
        code: int = 0 if settings is None else _module(words[0]).run(settings)
        sys.stdout.flush()  # here, where what cannot be written is still one line
        return code
    except UserError as error:
        print(f"flatwise: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `flatwise variants | head` has read enough
        _drop_output()
        return BROKEN_PIPE
    except OSError as error:
        _drop_output()
        place = f": {error.filename}" if error.filename else ""
        print(f"flatwise: error: {error.strerror or error}{place}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        continues = bool(words) and words[0] in SUMMARIES and _module(words[0]).CONTINUES
        rest = " The same command continues where this one stopped." if continues else ""
        print(f"\nInterrupted.{rest}", file=sys.stderr)
        return INTERRUPTED


def parse(words: Sequence[str]) -> Any:
    """Turn the command line into a command's settings.

    Args:
        words: the command and what follows it.

    Returns:
        The settings, or None where help or the version was asked for and has been printed.

    Raises:
        UnknownNameError: a command that does not exist, with the nearest that does.
    """
    from flatwise.errors import UnknownNameError

    if list(words) in (["--version"], ["-V"]):
        from importlib.metadata import version

        print(f"flatwise {version('flatwise')}")
        return None
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return None
    if words[0] not in SUMMARIES:
        raise UnknownNameError("command", words[0], SUMMARIES)
    module, rest = _module(words[0]), words[1:]
    if hasattr(module, "parse"):
        return module.parse(rest)
    return parse_flags(module.Settings, rest, words[0], module.DESCRIPTION)


def _module(command: str) -> Any:
    return importlib.import_module(f"flatwise.commands.{command}")


def _drop_output() -> None:
    """Let what is left in the buffer of standard output go nowhere, so that leaving Python does not fail again."""
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _overview() -> str:
    lines = [f"  {name:<10} {summary}" for name, summary in SUMMARIES.items()]
    return (
        "usage: flatwise COMMAND [options]\n\n"
        + "\n".join(lines)
        + "\n\nflatwise COMMAND --help, such as flatwise compare --help, lists the options with their defaults;\n"
        "flatwise --version says the version."
    )
