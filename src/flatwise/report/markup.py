"""HTML and SVG from functions: whatever is not :class:`Markup` is text, and is escaped."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from flatwise.files import finite

VOID = frozenset({"meta", "br", "input", "link"})
Value = str | int | float | bool | None


class Markup(str):
    """A string that is markup already, and is put into the page as it is."""

    __slots__ = ()


def tag(element: str, /, *children: str, **attributes: Value) -> Markup:
    """Write an element.

    Args:
        element: such as ``"p"``.
        *children: markup, or text that is escaped.
        **attributes: ``class_`` is written ``class``, ``aria_sort`` is written ``aria-sort``. True writes the name
            alone; None and False leave the attribute out.

    Returns:
        The element.
    """
    words = [element]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{escape(str(value))}"')
    start = f"<{' '.join(words)}>"
    if element in VOID:
        return Markup(start)
    return Markup(f"{start}{join(*children)}</{element}>")


def join(*children: str) -> Markup:
    """Put markup and text behind one another.

    Args:
        *children: markup, or text that is escaped.

    Returns:
        Markup.
    """
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def data_block(value: Any, **attributes: Value) -> Markup:
    """Embed data for the page's script, so that no string in it can end the element.

    Args:
        value: what JSON can hold; NaN and infinity become null.
        **attributes: of the ``script`` element.

    Returns:
        The element, which no browser runs.
    """
    text = json.dumps(finite(value), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return tag("script", Markup(text), type="application/json", **attributes)
