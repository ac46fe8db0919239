"""One dataclass is a command's flags: names, types, defaults and help are written once, and a mistake is one line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from flatwise.errors import UserError, nearest
from flatwise.lab.config import flag

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Settings = TypeVar("Settings")
POSITIONAL = "positional"
"""Key of a field's metadata; its value says how many words there may be: None (one), "?" or "+"."""


def asks_for_help(words: Sequence[str]) -> bool:
    """Tell whether help is asked for.

    Args:
        words: what follows the command's name.

    Returns:
        Whether ``-h`` or ``--help`` is among them.
    """
    return bool({"-h", "--help"} & set(words))


def parse_flags(kind: type[Settings], words: Sequence[str], command: str, description: str) -> Settings | None:
    """Turn words into settings.

    Args:
        kind: the dataclass.
        words: what follows the command's name.
        command: its name.
        description: what it does, for the help.

    Returns:
        The settings, or None where help was asked for and has been printed. A word that does not exist, or a value that
        cannot be meant, raises a UserError.
    """
    parser = _parser(kind, command, description)
    if asks_for_help(words):
        _print_help(parser)
        return None
    namespace = _parsed(parser, kind, words, command)
    return kind(**{entry.name: namespace[entry.name] for entry in _fields(kind)})


def _print_help(parser: ArgumentParser) -> None:
    # An option without a default of its own says in words what it does then.
    print(re.sub(r",\s+default:\s+null\)", ")", parser.format_help()), end="")


def _parsed(parser: ArgumentParser, kind: type, words: Sequence[str], command: str, *, defaults: bool = True) -> Any:
    flags = [option for action in parser._actions for option in action.option_strings]
    for word in words:
        option = word.partition("=")[0]
        if word.startswith("-") and option not in flags and not _is_number(word):
            raise UserError(f"unknown option {option!r}{nearest(option, flags)} (flatwise {command} --help lists all)")
    try:
        return parser.parse_args(list(words), defaults=defaults)
    except argparse.ArgumentError as error:
        raise UserError(_one_line(str(error), kind)) from error


def parse_given(
    kind: type, words: Sequence[str], command: str, description: str, more: Mapping[str, str]
) -> dict[str, Any] | None:
    """Turn words into the settings that were given, so that what was not given can come from elsewhere.

    What is true or false has two flags, ``--name`` and ``--no-name``: either can be given.

    Args:
        kind: the dataclass.
        words: what follows the command's name.
        command: its name.
        description: what it does, for the help.
        more: flags that are no fields and take a word, and their help.

    Returns:
        The values that were given, by name; None where help was asked for and has been printed.
    """
    parser = _parser(kind, command, description, more=more, both=True)
    if asks_for_help(words):
        _print_help(parser)
        return None
    namespace = _parsed(parser, kind, words, command, defaults=False)
    return dict(vars(namespace))


def _fields(kind: type) -> tuple[Field[Any], ...]:
    return fields(kind)


def _parser(
    kind: type, command: str, description: str, *, more: Mapping[str, str] | None = None, both: bool = False
) -> ArgumentParser:
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(prog=f"flatwise {command}", description=description, exit_on_error=False)
    hints, helps = get_type_hints(kind), field_helps(kind)
    for name, text in (more or {}).items():
        parser.add_argument(flag(name), type=str, help=text)
    for entry in _fields(kind):
        name, text = entry.name, helps[entry.name]
        if POSITIONAL in entry.metadata:
            count = entry.metadata[POSITIONAL]
            default = {} if entry.default is MISSING else {"default": entry.default}
            parser.add_argument(name, type=str, help=text, metavar=name.upper(), nargs=count, **default)
        elif hints[name] is bool and (both or entry.default is True):
            # --nesterov and --no-nesterov: what is on needs a way to turn it off.
            parser.add_argument(flag(name), action=ActionYesNo(no_prefix="no-"), default=entry.default, help=text)
        elif hints[name] is bool:
            parser.add_argument(flag(name), action="store_true", help=text)
        else:
            parser.add_argument(flag(name), type=hints[name], default=entry.default, help=text)
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


def _one_line(message: str, kind: type) -> str:
    """Shorten a parser's error to what was wrong, and add the nearest right value."""
    text = " ".join(message.split())
    found = re.search(r'[Pp]arser key "([\w-]+)":? ?(.*)', text)
    if found is None:
        return text
    name, reason = found[1].replace("-", "_"), found[2]
    value = re.search(r"(?:Got|Given) value: ?(\S*)", reason)
    hint: Any = get_type_hints(kind).get(name)
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
