"""Whatever is not markup is text."""

from __future__ import annotations

import json
import re

import pytest

from flatwise.report.markup import Markup, data_block, join, tag

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&"


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "a < b & c", tag("b", "d")) == "<p>a &lt; b &amp; c<b>d</b></p>"
    assert join("<", Markup("<br>")) == "&lt;<br>"


def test_attributes_are_escaped_renamed_and_left_out() -> None:
    element = tag("th", "x", class_="a", aria_sort="none", title=HOSTILE, hidden=True, lang=None, dir=False)
    assert element.startswith('<th class="a" aria-sort="none" title="')
    assert element.endswith(" hidden>x</th>")
    assert re.search(r'title="([^"<>]*)"', element)
    assert "lang" not in element
    assert "dir" not in element


def test_void_elements_have_no_end() -> None:
    assert tag("meta", name="a") == '<meta name="a">'


@pytest.mark.parametrize("text", [HOSTILE, "<!--", "]]>", "\u2028", "a\\b"])
def test_data_comes_back_and_ends_no_element(text: str) -> None:
    block = data_block({text: [text, float("nan"), 1.5]}, id="x")
    inside = block.removeprefix('<script type="application/json" id="x">').removesuffix("</script>")
    assert "<" not in inside
    assert json.loads(inside) == {text: [text, None, 1.5]}
