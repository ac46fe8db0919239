"""The command ``flatwise``: parse, call, print."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from flatwise.lab.config import CompareConfig

COMMANDS = ("compare", "variants")
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
        code = _run(words)
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
        print("\nInterrupted. The same command continues where this one stopped.", file=sys.stderr)
        return INTERRUPTED


def _run(words: list[str]) -> int:
    if words[:1] == ["variants"]:
        return _variants(words[1:])
    config = _parse(words)
    return 0 if config is None else _compare(config)


def _drop_output() -> None:
    """Let what is left in the buffer of standard output go nowhere, so that leaving Python does not fail again."""
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _compare(config: CompareConfig) -> int:
    from flatwise.lab.compare import compare, protocol
    from flatwise.lab.table import console_for, print_sentences, print_table

    results, folder, was_there = compare(config)
    console = console_for(sys.stdout)
    if was_there:
        console.print(f"Already finished; read from {folder.results} (--fresh trains again).", markup=False)
    if not config.quiet:
        print_sentences([protocol(config, results)], console)
    print_table(results, console)
    print_sentences(results["verdict"], console)
    if not config.quiet:
        console.print(f"Curves, epochs and every number: {folder.path}", markup=False)
    return 0


def _variants(words: list[str]) -> int:
    from flatwise.errors import UnknownNameError, UserError
    from flatwise.lab.table import console_for
    from flatwise.lab.variants import print_variant, print_variants
    from flatwise.variants import list_variants, variant_info

    names = [word for word in words if not word.startswith("-")]
    if {"-h", "--help"} & set(words):
        print("usage: flatwise variants [NAME ...]\n\nList the methods, or say everything about some of them.")
        return 0
    if len(names) < len(words):
        raise UserError(f"flatwise variants takes names of methods, not {words[0]!r}")
    for name in names:
        if name not in list_variants(adapters=True):
            raise UnknownNameError("method", name, list_variants(adapters=True))
    console = console_for(sys.stdout)
    if not names:
        print_variants([variant_info(name) for name in list_variants(adapters=True)], console)
    for name in names:
        print_variant(variant_info(name), console)
    return 0


def _parse(words: list[str]) -> CompareConfig | None:
    """Turn words into settings.

    Args:
        words: the command line.

    Returns:
        The settings, or None where help or the version was asked for and has been printed.

    Raises:
        UserError: a value that cannot be meant.
        UnknownNameError: a word that does not exist, with the nearest that does.
    """
    from flatwise.errors import UnknownNameError, UserError, nearest
    from flatwise.lab.config import CompareConfig

    if words in (["--version"], ["-V"]):
        from importlib.metadata import version

        print(f"flatwise {version('flatwise')}")
        return None
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return None
    if words[0] not in COMMANDS:
        raise UnknownNameError("command", words[0], COMMANDS)
    parser = _parser()
    if {"-h", "--help"} & set(words[1:]):
        # An option without a default of its own says in words what it does then.
        print(re.sub(r",\s+default:\s+null\)", ")", parser.format_help()), end="")
        return None
    flags = [option for action in parser._actions for option in action.option_strings]
    for word in words[1:]:
        if word.startswith("-") and word.partition("=")[0] not in flags and not _is_number(word):
            option = word.partition("=")[0]
            raise UserError(f"unknown option {option!r}{nearest(option, flags)} (flatwise compare --help lists all)")
    try:
        namespace = parser.parse_args(words[1:])
    except argparse.ArgumentError as error:
        raise UserError(_one_line(str(error))) from error
    return CompareConfig(**{field.name: namespace[field.name] for field in fields(CompareConfig)})


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from flatwise.lab.config import CompareConfig, flag

    parser = ArgumentParser(
        prog="flatwise compare",
        description="Train one network from the same seeds with several methods, and say which is better.",
        exit_on_error=False,
    )
    hints, helps = get_type_hints(CompareConfig), field_helps(CompareConfig)
    for entry in fields(CompareConfig):
        if hints[entry.name] is bool:
            parser.add_argument(flag(entry.name), action="store_true", help=helps[entry.name])
        else:
            parser.add_argument(flag(entry.name), type=hints[entry.name], default=entry.default, help=helps[entry.name])
    return parser


def field_helps(kind: type) -> dict[str, str]:
    """Read what each field means from the docstring of a dataclass, so that it is written once.

    Args:
        kind: a dataclass with an ``Attributes:`` section.

    Returns:
        The text of each field.
    """
    section = (kind.__doc__ or "").partition("Attributes:")[2]
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _one_line(message: str) -> str:
    """Shorten a parser's error to what was wrong, and add the nearest right value."""
    from flatwise.errors import nearest
    from flatwise.lab.config import CompareConfig, flag

    text = " ".join(message.split())
    found = re.search(r'[Pp]arser key "([\w-]+)":? ?(.*)', text)
    if found is None:
        return text
    name, reason = found[1].replace("-", "_"), found[2]
    value = re.search(r"(?:Got|Given) value: ?(\S*)", reason)
    hint: Any = get_type_hints(CompareConfig).get(name)
    choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
    if choices and value is not None:
        word = value[1].strip("'\"")
        return f"{flag(name)}: {word!r} is none of {', '.join(choices)}{nearest(word, choices)}"
    kinds = " or ".join(kind.__name__ for kind in (get_args(hint) or (hint,)) if kind is not type(None))
    return f"{flag(name)}: expected {kinds}, got {(value[1] or repr(value[1])) if value else reason}"


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _overview() -> str:
    return (
        "usage: flatwise COMMAND [options]\n\n"
        "  compare    train one network from the same seeds with several methods, and say which is better\n"
        "  variants   list the methods: what each changes, its cost, radii, source and evidence\n\n"
        "flatwise compare --help lists the options with their defaults; flatwise --version says the version."
    )
